// The producer warp: tiles of the paged cache into the ring of stages, by TMA.
#pragma once
#include "cluster.cuh"
#include "params.cuh"
#include "pipeline.cuh"
#include "prefetch.cuh"
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

  // Tiles [tile, tile + tiles()) of a sequence. Entries past the table's end give -1, which is no page.
  __device__ __forceinline__ void load(i32 sequence, i32 tile) {
    first_token_ = i32(u32(tile) * kTileTokens);  // a hint may overflow
    const i32 token = first_token_ + i32(threadIdx.x % kWarpThreads) * unit_tokens();
    const i32 entry = token >> params_.page_size_log2;
    page_ = u32(sequence) < u32(params_.batch) && u32(entry) < u32(params_.max_pages)
                ? params_.block_table[sequence * params_.block_table_stride + entry]
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

// One box, to this CTA or to all of the cluster.
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

// All tiles of the worker's items, as far ahead as the stages allow. A tile comes in kParts parts of its columns, each
// with its own barrier and, where a CTA loads whole tiles of one page, in one box: issuing a box takes 0.05 us, in
// which the stage is empty. Of a cluster, each CTA loads a share of the rows and multicasts them to all, a chunk at a
// time. (Two CTAs that load columns of all rows need fewer boxes, too: no faster at s_q=2, and at s_q=1 2 % slower once
// the power limit rules; b=128, h_q=128, 16K on an H100.) A stage is handed back in two halves of its latent columns.
// The first part lies in the first half, the last one (P may lie in its rope chunk, until the second half is free)
// needs the second, the one between them both. A page id outside the pool, or past the table's end, reads as zeros:
// TMA does not leave the tensor.
template <u32 kClusterCtas, u32 kStages, u32 kChunks, u32 kParts, u32 kHalves, u32 kChunkElems>
__device__ __forceinline__ void load_kv(u16 (&kv)[kStages][kChunks][kChunkElems], u64 (&kv_full)[kStages][kParts],
                                        u64 (&kv_empty)[kStages][kHalves], const TensorMap* kv_map,
                                        const DecodeParams& params, const Block& block, const Stretch& hint) {
  constexpr u32 kPartChunks = kChunks / kParts;
  constexpr u32 kShareRows = kTileTokens / kClusterCtas;
  constexpr u32 kBoxChunks = kClusterCtas == 1 ? kPartChunks : 1;  // unless pages are smaller than the share
  static_assert(kParts == 3 && kParts * kPartChunks == kChunks && kHalves == 2, "which part lies in which half");
  const u32 lane = threadIdx.x % kWarpThreads;
  const i32 share = kClusterCtas > 1 ? i32(cluster_ctarank() * kShareRows) : 0;
  RingPosition<kStages> ring;
  PageIds pages(params);
  const i32 box_rows = min(pages.unit_tokens(), i32(kShareRows)), page_mask = (1 << params.page_size_log2) - 1;
  // What one CTA alone reads is read once. The rest of L2 (partial states, Q, block tables, the kernel itself) will be
  // needed again: +3 % at b=128, h_q=16, s_k=4K on an H100.
  const u64 policy = params.row_blocks == 1 ? createpolicy_evict_first() : createpolicy_evict_normal();
  griddepcontrol_wait();
  pages.load(hint.first_sequence, hint.first_tile);  // on its way while the schedule and the length are
  WorkerItems items(params, block.worker, hint);
  await_start<kClusterCtas>();
  bool is_loaded = items.stretch().begins_like(hint);
  Item item;
  while (items.next(item)) {
    for (i32 base = item.begin_tile; base < item.end_tile; base += pages.tiles()) {
      if (!is_loaded) pages.load(item.sequence, base);
      is_loaded = false;
      const i32 end = min(base + pages.tiles(), item.end_tile);
      for (i32 tile = base; tile < end; ++tile, ring.advance()) {
        const i32 first_token = tile * i32(kTileTokens) + share, page = pages.page(first_token);
        if constexpr (kClusterCtas > 1) {
          const i32 ahead = first_token + params.prefetch_tiles * i32(kTileTokens);
          // The first tiles are on their way at once: a prefetch would only hold them up.
          const bool is_early = item.is_first && tile < item.begin_tile + i32(kStages);
          if (params.prefetch_tiles > 0 && !is_early && ahead < end * i32(kTileTokens)) {
            const i32 page_ahead = pages.page(ahead), row = ahead & page_mask;
            if (lane == 0 && u32(page_ahead) < u32(params.num_pages)) {
              prefetch_rows<kShareRows>(params, page_ahead, row);
            }
          }
        }
        const u32 destination = shared_address(kv[ring.stage][0]);
#pragma unroll
        for (u32 part = 0; part < kParts; ++part) {
          if (part < kHalves) {
            wait_phase(shared_address(&kv_empty[ring.stage][part]), ring.phase ^ 1);
            __syncwarp();  // all lanes have seen this phase before the next can come
          }
          const u32 full = shared_address(&kv_full[ring.stage][part]), chunk = part * kPartChunks;
          if (lane == 0) mbarrier_arrive_expect_tx(full, kPartChunks * kChunkBytes);
          if (box_rows == i32(kShareRows)) {
            if (lane == 0) {
#pragma unroll
              for (u32 c = chunk; c < chunk + kPartChunks; c += kBoxChunks) {
                load_box<kClusterCtas>(destination + c * kChunkBytes + u32(share) * kChunkRowBytes, kv_map, full, c,
                                       first_token & page_mask, block.kv_head, page, policy);
              }
            }
            continue;
          }
#pragma unroll 1
          for (i32 row = 0; row < i32(kShareRows); row += box_rows) {
            const i32 page_of_row = pages.page(first_token + row);
#pragma unroll 1
            for (u32 c = chunk; c < chunk + kPartChunks; ++c) {
              if (lane != 0) break;
              load_box<kClusterCtas>(destination + c * kChunkBytes + u32(share + row) * kChunkRowBytes, kv_map, full, c,
                                     (first_token + row) & page_mask, block.kv_head, page_of_row, policy);
            }
          }
        }
      }
    }
    is_loaded = false;  // an item without tiles has not used what was loaded for it
  }
  if constexpr (kClusterCtas > 1) {
    // The other CTA hands the last stages back, too: this one must not exit before. A barrier of the cluster's threads
    // would hold up the consumers, 0.7 us.
    for (u32 i = 0; i < kStages; ++i, ring.advance()) {
      for (u64& half : kv_empty[ring.stage]) wait_phase(shared_address(&half), ring.phase ^ 1);
    }
  }
}
