// Where tiles of the paged cache lie, and the ways to bring rows of a page in.
#pragma once
#include "layout.cuh"
#include "params.cuh"
#include "ptx.cuh"
#include "work.cuh"

constexpr u32 kTileTokensLog2 = 6;
static_assert(kTileTokens == 1 << kTileTokensLog2, "");

// Where the pages of a worker's tiles lie. A unit is what a TMA box may cover at most: a page, or a tile of a larger
// one. A lane holds the page id of one unit, so that one load brings those of 32 units and none waits for its own.
class PageIds {
 public:
  __device__ __forceinline__ PageIds(const DecodeParams& params)
      : params_(params), unit_log2_(min(params.page_size_log2, i32(kTileTokensLog2))) {}

  __device__ __forceinline__ i32 tiles() const { return i32(kWarpThreads) >> (i32(kTileTokensLog2) - unit_log2_); }
  __device__ __forceinline__ i32 unit_tokens() const { return 1 << unit_log2_; }
  __device__ __forceinline__ i32 first_token() const { return first_token_; }
  // Of a token, the row in its page.
  __device__ __forceinline__ i32 row(i32 token) const { return token & ((1 << params_.page_size_log2) - 1); }

  // Tiles [tile, tile + tiles()) of a sequence. Entries past the table's end give -1, which is no page. Nothing of it
  // stays in L1: what was read before the previous kernel had ended must not be found there again.
  __device__ __forceinline__ void load(i32 sequence, i32 tile) {
    first_token_ = i32(u32(tile) * kTileTokens);  // a hint may overflow
    const i32 token = i32(u32(first_token_) + threadIdx.x % kWarpThreads * u32(unit_tokens()));
    const i32 entry = token >> params_.page_size_log2;
    page_ = u32(sequence) < u32(params_.batch) && u32(entry) < u32(params_.max_pages)
                ? ld_relaxed_gpu(params_.block_table + sequence * params_.block_table_stride + entry)
                : -1;
  }
  // Page of a token within those tiles; all lanes of the warp call it.
  __device__ __forceinline__ i32 page(i32 token) const {
    return __shfl_sync(0xffffffffu, page_, (token - first_token_) >> unit_log2_);
  }

 private:
  const DecodeParams& params_;
  i32 unit_log2_, first_token_, page_;
};

// One TMA box, to this CTA or to all of the cluster. A page id outside the pool reads as zeros: TMA does not leave the
// tensor.
template <u32 kClusterCtas>
__device__ __forceinline__ void load_box(u32 destination, const TensorMap* map, u32 barrier, u32 chunk, i32 page_row,
                                         i32 kv_head, i32 page, u64 policy) {
  if constexpr (kClusterCtas == 1) {
    cp_async_bulk_tensor_5d(destination, map, barrier, 0, page_row, i32(chunk), kv_head, page, policy);
  } else {
    constexpr u16 kAllCtas = (1 << kClusterCtas) - 1;
    cp_async_bulk_tensor_5d_multicast(destination, map, barrier, 0, page_row, i32(chunk), kv_head, page, kAllCtas);
  }
}

// kRows of a page into L2, ahead of the loads that bring them to shared memory. Not of a page id outside the pool. For
// one KV head and rows without gaps.
template <u32 kRows>
__device__ __forceinline__ void prefetch_rows(const DecodeParams& params, i32 page, i32 row) {
  constexpr i32 kRowElems = MLA_HEAD_DIM_QK;
  if (u32(page) >= u32(params.num_pages)) return;
  cp_async_bulk_prefetch(params.kv + page * params.kv_stride_page + row * kRowElems, kRows * kRowElems * sizeof(u16));
}
