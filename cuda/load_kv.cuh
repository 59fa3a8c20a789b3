// The producer warp: tiles of the paged cache into the ring of stages, by TMA.
#pragma once
#include "cluster.cuh"
#include "first_tile.cuh"
#include "pages.cuh"
#include "params.cuh"
#include "pipeline.cuh"
#include "work.cuh"

// All tiles of the worker's items, as far ahead as the stages allow. A tile comes in kParts parts of its columns, each
// with its own barrier and, where a CTA loads whole tiles of one page, in one box: issuing a box takes 0.05 us, in
// which the stage is empty. Of a cluster, each CTA loads a share of the rows and multicasts them to all, a chunk at a
// time. (Two CTAs that load columns of all rows need fewer boxes, too: no faster at s_q=2, and at s_q=1 2 % slower once
// the power limit rules; b=128, h_q=128, 16K on an H100.) A stage is handed back in two halves of its latent columns.
// The first part lies in the first half, the last one (P may lie in its rope chunk, until the second half is free)
// needs the second, the one between them both. The first tile may be there already (first_tile.cuh).
template <u32 kClusterCtas, u32 kStages, u32 kChunks, u32 kParts, u32 kHalves, u32 kChunkElems>
__device__ __forceinline__ void load_kv(u16 (&kv)[kStages][kChunks][kChunkElems], u64 (&kv_full)[kStages][kParts],
                                        u64 (&kv_empty)[kStages][kHalves],
                                        FirstTile<kClusterCtas, kParts, kChunks / kParts * kChunkBytes>& first_tile,
                                        u64& begun, const TensorMap* kv_map, const DecodeParams& params,
                                        const Block& block, const Stretch& hint) {
  constexpr u32 kPartChunks = kChunks / kParts;
  constexpr u32 kShareRows = kTileTokens / kClusterCtas;
  constexpr u32 kBoxChunks = kClusterCtas == 1 ? kPartChunks : 1;  // unless pages are smaller than the share
  static_assert(kParts == 3 && kParts * kPartChunks == kChunks && kHalves == 2, "which part lies in which half");
  const u32 lane = threadIdx.x % kWarpThreads;
  const i32 share = kClusterCtas > 1 ? i32(cluster_ctarank() * kShareRows) : 0;
  RingPosition<kStages> ring;
  PageIds pages(params);
  const i32 box_rows = min(pages.unit_tokens(), i32(kShareRows));
  const bool is_whole = box_rows == i32(kShareRows);  // the share, in a page
  // What one CTA alone reads is read once. The rest of L2 (partial states, Q, block tables, the kernel itself) will be
  // needed again: +3 % at b=128, h_q=16, s_k=4K on an H100.
  const u64 policy = params.row_blocks == 1 ? createpolicy_evict_first() : createpolicy_evict_normal();
  // The share of a part, by one lane.
  const auto load_part = [&](u32 stage, u32 part, u64& barrier, i32 row, i32 page) {
    const u32 destination = shared_address(kv[stage][0]) + u32(share) * kChunkRowBytes, chunk = part * kPartChunks;
#pragma unroll
    for (u32 c = chunk; c < chunk + kPartChunks; c += kBoxChunks) {
      load_box<kClusterCtas>(destination + c * kChunkBytes, kv_map, shared_address(&barrier), c, row, block.kv_head,
                             page, policy);
    }
  };
  // The share of a tile whose page is known, by all lanes.
  const auto prefetch = [&](i32 tile) {
    const i32 token = tile * i32(kTileTokens) + share, page = pages.page(token);
    if (lane == 0) prefetch_rows<kShareRows>(params, page, pages.row(token));
  };

  pages.load(hint.first_sequence, hint.first_tile);
  const bool leads_to_items = hint.leads_to_items(params);
  const i32 hinted_length = leads_to_items ? ld_relaxed_gpu(params.cache_seqlens + hint.first_sequence) : 0;
  await_start<kClusterCtas>();
  const bool leads_to_tile = hint.leads_to_tile(hinted_length);
  prefetch_first_tile(params, block, pages, leads_to_tile ? hinted_length : 0, begun);
  const i32 hinted_token = pages.first_token() + share, hinted_page = pages.page(hinted_token);
  const bool asks = is_whole && leads_to_tile && u32(hinted_page) < u32(params.num_pages);
  griddepcontrol_wait();
  const auto ask = [&] {
    if (!asks || lane != 0) return;
#pragma unroll
    for (u32 part = 0; part < kParts; ++part) {
      load_part(0, part, first_tile.landed[part], pages.row(hinted_token), hinted_page);
    }
  };
  // A CTA alone asks for the tile's three boxes before it reads pages, schedule and length again; nine boxes of a
  // cluster's CTA would hold those up (0.2 us).
  if constexpr (kClusterCtas == 1) ask();
  pages.load(hint.first_sequence, hint.first_tile);
  WorkerItems items(params, block.worker, hint);
  if constexpr (kClusterCtas > 1) ask();
  bool is_loaded = items.stretch().begins_like(hint);  // the pages of the first tiles
  Item item;
  bool has_item = items.next(item);
  const bool is_right = asks && is_loaded && has_item && item.num_tiles() > 0 &&
                        pages.page(hinted_token) == hinted_page;
  bool is_there = first_tile.judge(is_right ? kRight : asks ? kInVain : kNotAsked);
  // The next tile is not asked for before this one comes: memory serves first those who started last (2.5 % at h_q=16,
  // b=4, 4K; in clusters -1 %).
  if (kClusterCtas == 1 && is_there && item.num_tiles() > 1) wait_phase(shared_address(&first_tile.landed[0]), 0);
  for (; has_item; has_item = items.next(item)) {
    for (i32 base = item.begin_tile; base < item.end_tile; base += pages.tiles()) {
      if (!is_loaded) pages.load(item.sequence, base);
      is_loaded = false;
      const i32 end = min(base + pages.tiles(), item.end_tile);
      for (i32 tile = base; tile < end; ++tile, ring.advance()) {
        if (is_there) {
          is_there = false;
          continue;
        }
        const i32 first_token = tile * i32(kTileTokens) + share, page = pages.page(first_token);
        // The worker's first tiles are on their way at once: a prefetch would only hold them up. So it would the tile
        // before this one, until that begins to come in (b=1, h_q=128, 32K 26.9 -> 25.9 us, b=128, 16K -2 to -5 %).
        // Then the next tile is prefetched, as this one has been. The third one has not: that it comes before the
        // fourth takes b=4, 4K from 17.2 to 16.7 us.
        const bool is_early = item.is_first && tile < item.begin_tile + i32(kStages);
        const bool is_third = item.is_first && tile == item.begin_tile + i32(kStages);
        const bool prefetches = kClusterCtas > 1 && params.prefetches_next != 0 && !is_early;
        if (const i32 ahead = is_third ? tile : tile + 1; prefetches && ahead < end) {
          const auto before = ring.before();
          wait_phase(shared_address(&kv_full[before.stage][0]), before.phase);
          prefetch(ahead);
        }
#pragma unroll
        for (u32 part = 0; part < kParts; ++part) {
          if (part < kHalves) {
            wait_phase(shared_address(&kv_empty[ring.stage][part]), ring.phase ^ 1);
            __syncwarp();  // all lanes have seen this phase before the next can come
          }
          u64& full = kv_full[ring.stage][part];
          if (lane == 0) mbarrier_arrive_expect_tx(shared_address(&full), kPartChunks * kChunkBytes);
          if (is_whole) {
            if (lane == 0) load_part(ring.stage, part, full, pages.row(first_token), page);
            if (part == 0 && prefetches && is_third && tile + 1 < end) prefetch(tile + 1);
            continue;
          }
#pragma unroll 1
          for (i32 row = 0; row < i32(kShareRows); row += box_rows) {
            const i32 page_of_row = pages.page(first_token + row);
#pragma unroll 1
            for (u32 c = part * kPartChunks; c < (part + 1) * kPartChunks; ++c) {
              if (lane != 0) break;
              load_box<kClusterCtas>(shared_address(kv[ring.stage][c]) + u32(share + row) * kChunkRowBytes, kv_map,
                                     shared_address(&full), c, pages.row(first_token + row), block.kv_head,
                                     page_of_row, policy);
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
