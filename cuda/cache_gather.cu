// Gathers the rows of sequences of one layer into contiguous memory, token after token.
//
// Grid: x = sequences; y strides over groups of kGatherRows tokens, one warp each, which copies a row in 16-byte cells.
// Tokens without a page in the pool read as zeros, as they do in attention.
#include "params.cuh"
#include "types.cuh"

constexpr u32 kGatherRows = MLA_GATHER_ROWS;
constexpr u32 kRowCells = MLA_HEAD_DIM_QK * 2 / 16;
constexpr u32 kLaneCells = (kRowCells + kWarpThreads - 1) / kWarpThreads;

extern "C" __global__ void __launch_bounds__(kGatherRows* kWarpThreads)
    cache_gather(const __grid_constant__ GatherParams params) {
  const i64* span = params.spans + 3 * i64(blockIdx.x);
  const i64 seq = span[0], length = span[1], first_row = span[2];
  const u32 lane = threadIdx.x % kWarpThreads;
  const i32* table = params.block_table + seq * params.block_table_stride;
  const i64 stride = i64(gridDim.y) * kGatherRows;
  for (i64 token = i64(blockIdx.y) * kGatherRows + threadIdx.x / kWarpThreads; token < length; token += stride) {
    const i64 column = token >> params.page_size_log2;
    const i32 page = column < params.max_pages ? table[column] : -1;
    const bool is_held = page >= 0 && page < params.num_pages;
    const i64 offset = (token & ((i64(1) << params.page_size_log2) - 1)) * params.pool_stride_row;
    const uint4* source =
        reinterpret_cast<const uint4*>(params.pool + (is_held ? page : 0) * params.pool_stride_page + offset);
    uint4* target = reinterpret_cast<uint4*>(params.rows + (first_row + token) * MLA_HEAD_DIM_QK);
    uint4 cells[kLaneCells];  // all loads first: nothing tells the compiler that stores do not touch the pool
#pragma unroll
    for (u32 i = 0; i < kLaneCells; ++i) {
      const u32 cell = lane + i * kWarpThreads;
      cells[i] = is_held && cell < kRowCells ? source[cell] : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (u32 i = 0; i < kLaneCells; ++i) {
      const u32 cell = lane + i * kWarpThreads;
      if (cell < kRowCells) target[cell] = cells[i];
    }
  }
}
