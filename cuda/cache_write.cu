// Writes the cache rows of new tokens of one layer, each into the slot that it was given:
//
//   latent = ckv,                   or ckv / sqrt(mean(ckv^2) + eps) * norm_weight    (RMSNorm)
//   rope   = kpe,                   or kpe with pairs (a, b) turned into (a cos - b sin, a sin + b cos)    (RoPE)
//
// in float32, rounded once. The pairs are (2i, 2i + 1), or (i, i + 32); cos and sin are row `position` of the tables
// given.
//
// Grid: x = groups of kWriteRows tokens, one warp each. A lane holds cells (16 bytes, 8 values) `lane` and `lane + 32`
// of the latent, lanes 0 to 7 one cell of the RoPE key. A token whose slot lies outside the pool is skipped.
#include "params.cuh"
#include "ptx.cuh"
#include "types.cuh"

using Element = MLA_ELEMENT;

constexpr u32 kWriteRows = MLA_WRITE_ROWS;
constexpr u32 kFullWarp = 0xffffffffu;
constexpr u32 kLatentValues = MLA_HEAD_DIM_V;
constexpr u32 kCellValues = 8;
constexpr u32 kLatentCells = kLatentValues / kCellValues;
constexpr u32 kRopeCells = (MLA_HEAD_DIM_QK - MLA_HEAD_DIM_V) / kCellValues;
constexpr u32 kRopePairs = kRopeCells * kCellValues / 2;
static_assert(kLatentCells == 2 * kWarpThreads, "two cells a lane");
static_assert(kRopeCells == 8, "lanes l and l + 4 hold the halves of a half-split pair");

struct alignas(16) Cell {
  u32 pairs[kCellValues / 2];
};

__device__ __forceinline__ const Cell* cells_at(const u16* base, i64 offset) {
  return reinterpret_cast<const Cell*>(base + offset);
}

__device__ __forceinline__ float sum_of_squares(const Cell& cell) {
  float sum = 0;
#pragma unroll
  for (u32 i = 0; i < kCellValues / 2; ++i) {
    float low, high;
    cvt_unpack<Element>(cell.pairs[i], low, high);
    sum += low * low + high * high;
  }
  return sum;
}

__device__ __forceinline__ void scale_cell(Cell& cell, float scale, const Cell& weight) {
#pragma unroll
  for (u32 i = 0; i < kCellValues / 2; ++i) {
    float low, high, low_weight, high_weight;
    cvt_unpack<Element>(cell.pairs[i], low, high);
    cvt_unpack<Element>(weight.pairs[i], low_weight, high_weight);
    cell.pairs[i] = cvt_pack<Element>(low * scale * low_weight, high * scale * high_weight);
  }
}

__device__ __forceinline__ void normalise(Cell (&latent)[2], const WriteParams& params, u32 lane) {
  const Cell* weight = cells_at(params.norm_weight, 0);
  const Cell weights[2] = {weight[lane], weight[lane + kWarpThreads]};
  float sum = sum_of_squares(latent[0]) + sum_of_squares(latent[1]);
#pragma unroll
  for (u32 mask = kWarpThreads / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
  const float scale = 1.0f / sqrtf(sum / kLatentValues + params.norm_eps);
  scale_cell(latent[0], scale, weights[0]);
  scale_cell(latent[1], scale, weights[1]);
}

// All lanes come here, for the shuffle; those past the RoPE key's cells compute what nobody stores.
__device__ __forceinline__ void rotate(Cell& rope, i64 position, const WriteParams& params, u32 lane) {
  const bool in_table = position >= 0 && position < params.rope_positions;
  const float* cos_row = params.rope_cos + (in_table ? position : 0) * kRopePairs;
  const float* sin_row = params.rope_sin + (in_table ? position : 0) * kRopePairs;
  const float nan = __int_as_float(0x7fc00000);  // past the table: loud, not wrong
#pragma unroll
  for (u32 i = 0; i < kCellValues / 2; ++i) {
    const u32 partner = __shfl_xor_sync(kFullWarp, rope.pairs[i], kRopeCells / 2);
    float low, high, low_partner, high_partner;
    cvt_unpack<Element>(rope.pairs[i], low, high);
    cvt_unpack<Element>(partner, low_partner, high_partner);
    if (params.rope_interleaved) {
      const u32 pair = lane % kRopeCells * (kCellValues / 2) + i;
      const float cos = in_table ? cos_row[pair] : nan, sin = in_table ? sin_row[pair] : nan;
      rope.pairs[i] = cvt_pack<Element>(low * cos - high * sin, low * sin + high * cos);
    } else {
      const u32 pair = lane % (kRopeCells / 2) * kCellValues + 2 * i;
      const float low_cos = in_table ? cos_row[pair] : nan, low_sin = in_table ? sin_row[pair] : nan;
      const float high_cos = in_table ? cos_row[pair + 1] : nan, high_sin = in_table ? sin_row[pair + 1] : nan;
      const float sign = lane % kRopeCells < kRopeCells / 2 ? -1.0f : 1.0f;  // the first half subtracts
      rope.pairs[i] = cvt_pack<Element>(low * low_cos + sign * low_partner * low_sin,
                                        high * high_cos + sign * high_partner * high_sin);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kWriteRows* kWarpThreads)
    cache_write(const __grid_constant__ WriteParams params) {
  const u32 lane = threadIdx.x % kWarpThreads;
  const i64 token = i64(blockIdx.x) * kWriteRows + threadIdx.x / kWarpThreads;
  if (token >= params.num_tokens) return;  // whole warps

  // The token's own loads do not wait for its slot.
  const i64 slot = params.where[token];
  const Cell* ckv = cells_at(params.ckv, token * params.ckv_stride);
  const Cell* kpe = cells_at(params.kpe, token * params.kpe_stride);
  Cell latent[2] = {ckv[lane], ckv[lane + kWarpThreads]};
  Cell rope = kpe[lane % kRopeCells];
  if (params.norm_weight != nullptr) normalise(latent, params, lane);
  if (params.rope_cos != nullptr) rotate(rope, params.where[params.num_tokens + token], params, lane);

  if (slot < 0 || slot >= params.num_slots) return;
  const i64 offset = (slot & ((i64(1) << params.page_size_log2) - 1)) * params.pool_stride_row;
  Cell* row = reinterpret_cast<Cell*>(params.pool + (slot >> params.page_size_log2) * params.pool_stride_page + offset);
  row[lane] = latent[0];
  row[lane + kWarpThreads] = latent[1];
  if (lane < kRopeCells) row[kLatentCells + lane] = rope;
}
