// Writes the cache rows of new tokens: latent and rope parts side by side into the slot that each token was given.
//
// Grid: x = groups of kAppendRows tokens; one warp copies one token in 16-byte cells.
#include "params.cuh"
#include "types.cuh"

constexpr u32 kAppendRows = MLA_APPEND_ROWS;
constexpr u32 kLatentCells = MLA_HEAD_DIM_V * 2 / 16;
constexpr u32 kRowCells = MLA_HEAD_DIM_QK * 2 / 16;

extern "C" __global__ void __launch_bounds__(kAppendRows* kWarpThreads)
    cache_append(const __grid_constant__ AppendParams params) {
  const i64 token = i64(blockIdx.x) * kAppendRows + threadIdx.x / kWarpThreads;
  if (token >= params.num_tokens) return;
  const i64 slot = params.slots[token];
  if (slot < 0 || slot >= params.num_slots) return;
  const uint4* ckv = reinterpret_cast<const uint4*>(params.ckv + token * params.ckv_stride);
  const uint4* kpe = reinterpret_cast<const uint4*>(params.kpe + token * params.kpe_stride);
  uint4* row = reinterpret_cast<uint4*>(params.pool + slot / params.page_size * params.pool_stride_page +
                                        slot % params.page_size * params.pool_stride_row);
  for (u32 cell = threadIdx.x % kWarpThreads; cell < kRowCells; cell += kWarpThreads) {
    row[cell] = cell < kLatentCells ? ckv[cell] : kpe[cell - kLatentCells];
  }
}
