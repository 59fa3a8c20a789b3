// Query rows of an item into shared memory, in chunks of kTileRows rows x 64 columns.
#pragma once
#include "layout.cuh"
#include "params.cuh"
#include "pipeline.cuh"
#include "work.cuh"

// The share of one of kWarps warps. Q of each item is loaded whether it has tiles or not: no length has to be known.
// Rows past the last one are zeros.
template <u32 kWarps, u32 kChunks, u32 kChunkElems>
class QueryRows {
 public:
  __device__ __forceinline__ QueryRows(u16 (&q)[kChunks][kChunkElems], const DecodeParams& params, const Block& block,
                                       u32 warp)
      : q_(q), params_(params), warp_(warp) {
    // Lane i knows where the warp's row i begins: the divisions behind it are made once, side by side.
    const QueryRow at(params, block, warp + kWarps * (threadIdx.x % kWarpThreads));
    my_offset_ = at.exists ? at.seq * params.q_stride_seq + at.head * params.q_stride_head : kAbsent;
  }

  // The rows are on their way. They are in place when all warps have awaited theirs and met. CTAs that load the same
  // rows at the same time better take different `turns`: a line of L2 serves one after the other.
  __device__ __forceinline__ void load(i32 sequence, u32 turn = 0) const {
    const u32 lane = threadIdx.x % kWarpThreads;
    const u16* source = params_.q + sequence * params_.q_stride_batch;
#pragma unroll 2
    for (u32 n = 0; n < kRowsPerWarp; ++n) {
      const u32 i = (n + turn) % kRowsPerWarp, row = warp_ + kWarps * i;
      const i64 offset = __shfl_sync(0xffffffffu, my_offset_, i32(i));
      if (kTileRows % kWarps != 0 && row >= kTileRows) continue;
      const bool exists = offset != kAbsent;
      const u16* from = exists ? source + offset : params_.q;
#pragma unroll
      for (u32 cell = lane; cell < kCells; cell += kWarpThreads) {
        const u32 chunk = shared_address(q_[0]) + cell / kCellsPerRow * (kChunkElems * sizeof(u16));
        cp_async_16(chunk + swizzled_offset(row, cell % kCellsPerRow), from + cell * 8, exists ? kCellBytes : 0);
      }
    }
  }
  __device__ __forceinline__ static void await() {
    cp_async_wait_all();
    fence_proxy_async();
  }

 private:
  static constexpr u32 kRowsPerWarp = (kTileRows + kWarps - 1) / kWarps;
  static constexpr u32 kCells = kChunks * kCellsPerRow;
  static constexpr i64 kAbsent = -1;
  static_assert(kRowsPerWarp <= kWarpThreads, "a lane keeps the place of one row");

  u16 (&q_)[kChunks][kChunkElems];
  const DecodeParams& params_;
  const u32 warp_;
  i64 my_offset_;
};

// Q of the worker's items but the first, by kWarps warps of which this is number `warp`. The first of them is the
// herald as well: of a sequence in two splits it finds out who comes second, when Q of the item has been read for the
// last time.
template <u32 kWarps, typename Merge, u32 kChunks, u32 kChunkElems>
__device__ __forceinline__ void load_later_q(u16 (&q)[kChunks][kChunkElems], u64& q_full, u64& q_empty,
                                             const DecodeParams& params, const Block& block, const Merge& merge,
                                             u32 warp) {
  const QueryRows<kWarps, kChunks, kChunkElems> rows(q, params, block, warp);
  const Stretch stretch(params, block.worker);
  u32 phase = 0;
  for (i32 sequence = stretch.first_sequence; sequence <= stretch.last_sequence; ++sequence, phase ^= 1) {
    const bool is_first = sequence == stretch.first_sequence, is_last = sequence == stretch.last_sequence;
    if (is_last && warp != 0) break;
    wait_phase(shared_address(&q_empty), phase);
    const bool claims = warp == 0 && (is_first || is_last) && merge.is_pair(is_first);
    const u32 earlier = claims ? merge.claim(is_first) : 0;
    if (!is_last) rows.load(sequence + 1);  // on its way while the claim is
    if (claims) merge.tell_claim(is_first, earlier);
    if (is_last) break;
    rows.await();
    mbarrier_arrive(shared_address(&q_full));
  }
}
