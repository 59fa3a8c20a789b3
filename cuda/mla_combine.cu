// Merges the partial states of split sequences, always in split order, so that results are bit-identical from call to
// call:
//
//   lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) out_s
//
// Grid: x = query row, y = sequence, or, in batches larger than the number of workers, worker: then block y serves the
// sequence that worker y is the first to continue, if any. Neither depends on lengths, for CUDA graphs. A warp merges 128
// columns of its row. The grid starts while mla_decode_sm90 drains and waits for it before its first read.
#include "params.cuh"
#include "ptx.cuh"
#include "schedule.cuh"

using Element = MLA_ELEMENT;

constexpr u32 kHeadDimV = MLA_HEAD_DIM_V;
constexpr u32 kTileRows = MLA_TILE_ROWS;
constexpr u32 kColumnsPerWarp = kWarpThreads * 4;  // a float4 a lane
constexpr u32 kCombineThreads = kHeadDimV / kColumnsPerWarp * kWarpThreads;
static_assert(kCombineThreads == MLA_COMBINE_THREADS, "mlacore/params.py launches another number of threads");
constexpr u32 kSplitsInFlight = 8;  // loads outstanding a thread: the merge waits on L2, not on arithmetic

__device__ __forceinline__ float warp_max(float x) {
  for (u32 offset = kWarpThreads / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
  for (u32 offset = kWarpThreads / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Four blocks an SM are enough. Without the hint the compiler takes 32 registers and loads one split at a time; with it, 72
// and all of kSplitsInFlight before the first use.
extern "C" __global__ void __launch_bounds__(kCombineThreads, 4)
    mla_combine(const __grid_constant__ DecodeParams params) {
  griddepcontrol_wait();
  const u32 lane = threadIdx.x % kWarpThreads;
  const bool by_sequence = i32(gridDim.y) == params.batch;
  const i32 sequence = by_sequence ? i32(blockIdx.y) : params.work[2 * blockIdx.y];
  if (sequence >= params.batch) return;
  const i32 first = params.splits[2 * sequence], num_splits = params.splits[2 * sequence + 1];
  if (num_splits <= 1 || (!by_sequence && i32(blockIdx.y) != first + 1)) return;

  const i32 rows = params.seq_len_q * params.heads_per_kv;
  const i32 kv_head = i32(blockIdx.x) / rows, row_of_head = i32(blockIdx.x) % rows;
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

  const u32 column = threadIdx.x * 4;
  float4 merged = {};
  for (i32 begin = 0; begin < num_splits; begin += i32(kSplitsInFlight)) {
    float lse[kSplitsInFlight];
    float4 part[kSplitsInFlight];
#pragma unroll
    for (u32 i = 0; i < kSplitsInFlight; ++i) {
      const i32 split = begin + i32(i);
      const i64 index = index_of(min(split, num_splits - 1));
      lse[i] = split < num_splits ? params.partial_lse[index] : -infinity();
      part[i] = *reinterpret_cast<const float4*>(params.partial_out + index * kHeadDimV + column);
    }
#pragma unroll
    for (u32 i = 0; i < kSplitsInFlight; ++i) {
      const float share = ex2(lse[i] - base) * inverse;
      merged.x += share * part[i].x;
      merged.y += share * part[i].y;
      merged.z += share * part[i].z;
      merged.w += share * part[i].w;
    }
  }

  const i32 seq = row_of_head / params.heads_per_kv;
  const i32 head = kv_head * params.heads_per_kv + row_of_head % params.heads_per_kv;
  u16* out = params.out + ((i64(sequence) * params.seq_len_q + seq) * params.num_heads + head) * kHeadDimV;
  *reinterpret_cast<uint2*>(out + column) = {cvt_pack<Element>(merged.x, merged.y), cvt_pack<Element>(merged.z, merged.w)};
  if (threadIdx.x == 0) params.lse[(i64(sequence) * params.num_heads + head) * params.seq_len_q + seq] = lse_log2 * kLn2;
}
