// Warps that bring the query rows of each item into shared memory, in chunks of kTileRows rows x 64 columns.
#pragma once
#include "layout.cuh"
#include "params.cuh"
#include "pipeline.cuh"
#include "work.cuh"

// `warp` counts the kWarps warps that take part. Q of each item is loaded whether it has tiles or not: no length has to
// be known. Rows past the last one are zeros.
template <u32 kWarps, u32 kChunks, u32 kChunkElems>
__device__ __forceinline__ void load_q(u16 (&q)[kChunks][kChunkElems], u64& q_full, u64& q_empty,
                                       const DecodeParams& params, const Block& block, u32 warp) {
  constexpr u32 kRowsPerWarp = (kTileRows + kWarps - 1) / kWarps;
  constexpr u32 kCells = kChunks * kCellsPerRow;
  constexpr i64 kAbsent = -1;
  static_assert(kRowsPerWarp <= kWarpThreads, "a lane keeps the place of one row");
  const u32 lane = threadIdx.x % kWarpThreads;
  // Lane i knows where the warp's row i begins: the divisions behind it are made once, side by side.
  const QueryRow at(params, block, warp + kWarps * lane);
  const i64 my_offset = at.exists ? at.seq * params.q_stride_seq + at.head * params.q_stride_head : kAbsent;
  const WorkerItems items(params, block.worker);
  u32 phase = 0;
  for (i32 sequence = items.first_sequence(); sequence <= items.last_sequence(); ++sequence, phase ^= 1) {
    wait_phase(shared_address(&q_empty), phase ^ 1);
    const u16* source = params.q + sequence * params.q_stride_batch;
#pragma unroll 2
    for (u32 i = 0; i < kRowsPerWarp; ++i) {
      const u32 row = warp + kWarps * i;
      const i64 offset = __shfl_sync(0xffffffffu, my_offset, i32(i));
      if (row >= kTileRows) break;
      const bool exists = offset != kAbsent;
      const u16* from = exists ? source + offset : params.q;
#pragma unroll
      for (u32 cell = lane; cell < kCells; cell += kWarpThreads) {
        const u32 chunk = shared_address(q[0]) + cell / kCellsPerRow * (kChunkElems * sizeof(u16));
        cp_async_16(chunk + swizzled_offset(row, cell % kCellsPerRow), from + cell * 8, exists ? kCellBytes : 0);
      }
    }
    cp_async_wait_all();
    fence_proxy_async();
    mbarrier_arrive(shared_address(&q_full));
  }
}
