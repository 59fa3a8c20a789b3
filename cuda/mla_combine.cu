// Merges the partial states of split sequences, always in split order, so that results are bit-identical from call to
// call:
//
//   lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) out_s
//
// Grid: x = kCombineRows query rows of one KV head, y = worker. Block y serves the sequence that worker y is the first to
// continue, if any: a grid that depends on neither batch nor lengths, for CUDA graphs. One warp merges one row; a lane
// keeps kHeadDimV / 32 columns. It starts while mla_decode_sm90 drains and waits for it before its first read.
#include "params.cuh"
#include "ptx.cuh"
#include "schedule.cuh"

using Element = MLA_ELEMENT;

constexpr u32 kHeadDimV = MLA_HEAD_DIM_V;
constexpr u32 kTileRows = MLA_TILE_ROWS;
constexpr u32 kCombineRows = MLA_COMBINE_ROWS;
constexpr u32 kColumnsPerStep = kWarpThreads * 4;  // a float4 a lane
constexpr u32 kSteps = kHeadDimV / kColumnsPerStep;
constexpr float kLn2 = 0.693147180559945309f;
static_assert(kHeadDimV % kColumnsPerStep == 0, "a warp reads whole float4 rows");

__device__ __forceinline__ float warp_max(float x) {
  for (u32 offset = kWarpThreads / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
  for (u32 offset = kWarpThreads / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

extern "C" __global__ void __launch_bounds__(kCombineRows* kWarpThreads)
    mla_combine(const __grid_constant__ DecodeParams params) {
  griddepcontrol_wait();
  const u32 lane = threadIdx.x % kWarpThreads;
  const i32 worker = i32(blockIdx.y);
  const i32 sequence = params.work[2 * worker];
  if (sequence >= params.batch) return;
  const i32 first = params.splits[2 * sequence], num_splits = params.splits[2 * sequence + 1];
  if (num_splits <= 1 || worker != first + 1) return;

  const i32 rows = params.seq_len_q * params.heads_per_kv;
  const i32 row = i32(blockIdx.x * kCombineRows + threadIdx.x / kWarpThreads);
  const i32 kv_head = row / rows, row_of_head = row % rows;
  if (kv_head >= params.num_kv_heads) return;
  const i64 rows_per_slot = i64(params.num_kv_heads) * params.row_blocks * kTileRows;
  const i64 row_in_slot = i64(kv_head) * params.row_blocks * kTileRows + row_of_head;
  const bool first_begins_worker = params.work[2 * first] == sequence;
  // Later splits are the first item of their worker.
  const auto index_of = [&](i32 split) {
    return partial_slot(first + split, split > 0 || first_begins_worker) * rows_per_slot + row_in_slot;
  };

  float max = -infinity();
  for (i32 split = i32(lane); split < num_splits; split += kWarpThreads) {
    max = fmaxf(max, params.partial_lse[index_of(split)]);
  }
  max = warp_max(max);
  const float base = max == -infinity() ? 0.f : max;
  float sum = 0.f;
  for (i32 split = i32(lane); split < num_splits; split += kWarpThreads) {
    sum += ex2(params.partial_lse[index_of(split)] - base);
  }
  sum = warp_sum(sum);
  const float lse_log2 = sum == 0.f ? -infinity() : base + log2f(sum);
  const float inverse = sum == 0.f ? 0.f : 1.f / sum;

  float4 merged[kSteps] = {};
#pragma unroll 4
  for (i32 split = 0; split < num_splits; ++split) {
    const i64 index = index_of(split);
    const float weight = ex2(params.partial_lse[index] - base) * inverse;
    const float4* state = reinterpret_cast<const float4*>(params.partial_out + index * kHeadDimV) + lane;
#pragma unroll
    for (u32 step = 0; step < kSteps; ++step) {
      const float4 part = state[step * kWarpThreads];
      merged[step].x += weight * part.x;
      merged[step].y += weight * part.y;
      merged[step].z += weight * part.z;
      merged[step].w += weight * part.w;
    }
  }

  const i32 seq = row_of_head / params.heads_per_kv;
  const i32 head = kv_head * params.heads_per_kv + row_of_head % params.heads_per_kv;
  u16* out = params.out + ((i64(sequence) * params.seq_len_q + seq) * params.num_heads + head) * kHeadDimV;
#pragma unroll
  for (u32 step = 0; step < kSteps; ++step) {
    const float4& m = merged[step];
    reinterpret_cast<uint2*>(out)[step * kWarpThreads + lane] = {cvt_pack<Element>(m.x, m.y), cvt_pack<Element>(m.z, m.w)};
  }
  if (lane == 0) params.lse[(i64(sequence) * params.num_heads + head) * params.seq_len_q + seq] = lse_log2 * kLn2;
}
