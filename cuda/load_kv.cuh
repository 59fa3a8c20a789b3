// The producer warp: tiles of the paged cache into the ring of stages, by TMA.
#pragma once
#include "params.cuh"
#include "pipeline.cuh"
#include "work.cuh"

constexpr u32 kTileTokensLog2 = 6;
constexpr u32 kSmallestPageLog2 = 4;
static_assert(kTileTokens == 1 << kTileTokensLog2, "");

// Where the pages of a worker's tiles lie. A unit is what one TMA box may cover: a page, or a tile of a larger page. A
// lane holds the page id of one unit, so that one load brings those of 32 units and none waits for its own.
class PageIds {
 public:
  __device__ __forceinline__ PageIds(const DecodeParams& params)
      : params_(params), unit_log2_(min(params.page_size_log2, i32(kTileTokensLog2))) {}

  __device__ __forceinline__ i32 tiles() const { return i32(kWarpThreads) >> (i32(kTileTokensLog2) - unit_log2_); }
  __device__ __forceinline__ i32 unit_tokens() const { return 1 << unit_log2_; }

  // Tiles [tile, tile + tiles()) of a sequence. Entries past the table's end give -1, which is no page.
  __device__ __forceinline__ void load(i32 sequence, i32 tile) {
    first_token_ = tile * i32(kTileTokens);
    const i32 token = first_token_ + i32(threadIdx.x % kWarpThreads) * unit_tokens();
    const i32 entry = token >> params_.page_size_log2;
    page_ = sequence < params_.batch && u32(entry) < u32(params_.max_pages)
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
__device__ __forceinline__ void load_box(u32 destination, const TensorMap* map, u32 barrier, i32 column, i32 page_row,
                                         i32 kv_head, i32 page) {
  if constexpr (kClusterCtas == 1) {
    cp_async_bulk_tensor_4d(destination, map, barrier, column, page_row, kv_head, page);
  } else {
    constexpr u16 kAllCtas = (1 << kClusterCtas) - 1;
    cp_async_bulk_tensor_4d_multicast(destination, map, barrier, column, page_row, kv_head, page, kAllCtas);
  }
}

// All tiles of the worker's items, as far ahead as the stages allow. Each CTA of a cluster loads a share of the rows of
// every tile and multicasts it to all. A stage is handed back in kReleases parts of its latent columns; the rope chunk,
// loaded last, is free once all are. A page id outside the pool, or past the table's end, reads as zeros: TMA does not
// leave the tensor.
template <u32 kClusterCtas, u32 kReleases, u32 kStages, u32 kChunks, u32 kChunkElems>
__device__ __forceinline__ void load_kv(u16 (&kv)[kStages][kChunks][kChunkElems], u64 (&kv_full)[kStages][kChunks],
                                        u64 (&kv_empty)[kStages][kReleases], const TensorMap* kv_map,
                                        const DecodeParams& params, const Block& block) {
  constexpr u32 kShareRows = kTileTokens / kClusterCtas;
  constexpr u32 kMaxBoxes = kShareRows >> kSmallestPageLog2 > 1 ? kShareRows >> kSmallestPageLog2 : 1;
  constexpr u32 kReleaseChunks = (kChunks - 1) / kReleases;
  const u32 lane = threadIdx.x % kWarpThreads;
  const i32 share = kClusterCtas > 1 ? i32(cluster_ctarank() * kShareRows) : 0;
  RingPosition<kStages> ring;
  WorkerItems items(params, block.worker);
  PageIds pages(params);
  const i32 box_rows = min(pages.unit_tokens(), i32(kShareRows)), last_row = i32(kShareRows) - 1;
  const i32 page_mask = (1 << params.page_size_log2) - 1;
  pages.load(items.first_sequence(), items.first_tile());  // on its way while the length is
  bool is_loaded = true;
  Item item;
  while (items.next(item)) {
    for (i32 base = item.begin_tile; base < item.end_tile; base += pages.tiles()) {
      if (!is_loaded) pages.load(item.sequence, base);
      is_loaded = false;
      const i32 end = min(base + pages.tiles(), item.end_tile);
      for (i32 tile = base; tile < end; ++tile, ring.advance()) {
        const i32 first_token = tile * i32(kTileTokens) + share;
        i32 page[kMaxBoxes];
#pragma unroll
        for (u32 box = 0; box < kMaxBoxes; ++box)
          page[box] = pages.page(first_token + min(i32(box) * box_rows, last_row));
        i32 prefetch_page = -1;
        if constexpr (kClusterCtas > 1) {
          const i32 ahead = tile + params.prefetch_tiles;
          if (params.prefetch_tiles > 0 && ahead < end) prefetch_page = pages.page(ahead * i32(kTileTokens));
        }
        if (lane != 0) continue;
        if constexpr (kClusterCtas > 1) {
          if (u32(prefetch_page) < u32(params.num_pages)) {
            const i64 row = (first_token + params.prefetch_tiles * i32(kTileTokens)) & page_mask;
            cp_async_bulk_prefetch(params.kv + prefetch_page * params.kv_stride_page + row * (kChunks * kChunkColumns),
                                   kShareRows * kChunks * kChunkRowBytes);
          }
        }
        const u32 full = shared_address(kv_full[ring.stage]);
        const u32 destination = shared_address(kv[ring.stage][0]) + u32(share) * kChunkRowBytes;
#pragma unroll
        for (u32 chunk = 0; chunk < kChunks; ++chunk) {
          if (chunk % kReleaseChunks == 0 && chunk + 1 < kChunks) {
            wait_phase(shared_address(&kv_empty[ring.stage][chunk / kReleaseChunks]), ring.phase ^ 1);
          }
          mbarrier_arrive_expect_tx(full + chunk * sizeof(u64), kChunkBytes);
#pragma unroll
          for (u32 box = 0; box < kMaxBoxes; ++box) {
            const i32 row = i32(box) * box_rows;
            if (row > last_row) break;
            load_box<kClusterCtas>(destination + chunk * kChunkBytes + u32(row) * kChunkRowBytes, kv_map,
                                   full + chunk * sizeof(u64), i32(chunk * kChunkColumns),
                                   (first_token + row) & page_mask, block.kv_head, page[box]);
          }
        }
      }
    }
    is_loaded = false;  // an item without tiles has not used what was loaded for it
  }
}
