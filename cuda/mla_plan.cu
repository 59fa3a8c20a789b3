// Computes the split schedule (schedule.cuh) from device lengths: which worker begins where, and which workers share
// each sequence. One block; a thread takes a run of sequences, of one while there are enough threads. Nothing depends
// on the lengths but the values written, so that a CUDA graph can replay it after lengths have changed.
#include "params.cuh"
#include "schedule.cuh"

constexpr u32 kPlanThreads = MLA_PLAN_THREADS;
constexpr u32 kPlanWarps = kPlanThreads / kWarpThreads;
static_assert(kPlanWarps <= kWarpThreads, "a lane adds up one warp");
constexpr i32 kTileTokens = MLA_TILE_TOKENS;
constexpr i32 kItemCostTiles = MLA_ITEM_COST_TILES;
constexpr i32 kInvariantSplitTiles = MLA_INVARIANT_SPLIT_TILES;
constexpr i32 kMaxPlannedTiles = MLA_MAX_PLANNED_TILES;
static_assert(kItemCostTiles >= 1, "positions of sequences must differ, empty ones included");

// Loops over sequences and workers are not unrolled: most run once or never, and instructions are slow to come the
// first time.

// Lengths from the least conceivable stretch to the packed one: with no more sequences than workers, the item costs
// lengthen a stretch by kItemCostTiles at most.
constexpr u32 kExtents = kItemCostTiles + 2;
static_assert(kExtents <= kWarpThreads, "a lane looks at one");
constexpr i32 kKept = 1024;  // sequences whose lengths are read once
constexpr i32 kFew = 8;      // workers of a sequence that one thread writes

// Sum over the lanes up to this one.
__device__ __forceinline__ i32 inclusive_sum(i32 value) {
  const u32 lane = threadIdx.x % kWarpThreads;
  for (u32 offset = 1; offset < kWarpThreads; offset *= 2) {
    const i32 below = __shfl_up_sync(0xffffffffu, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// Sum over the block's threads, and over those before this one. The block meets once, so that what its threads wrote
// before is there for all; `warp_sums` serves one call.
__device__ __forceinline__ i32 block_sum(i32 value, i32* warp_sums) {
  const u32 lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const i32 sum = __reduce_add_sync(0xffffffffu, value);
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  return __reduce_add_sync(0xffffffffu, lane < kPlanWarps ? warp_sums[lane] : 0);
}
__device__ __forceinline__ i32 exclusive_sum(i32 value, i32* warp_sums) {
  const u32 lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const i32 inclusive = inclusive_sum(value);
  if (lane == kWarpThreads - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  return __reduce_add_sync(0xffffffffu, lane < warp ? warp_sums[lane] : 0) + inclusive - value;
}

// Workers without items, and the end of the last worker.
__device__ __forceinline__ void idle_workers(const PlanParams& params, i32 first) {
#pragma unroll 1
  for (i32 worker = first + i32(threadIdx.x); worker <= params.num_workers; worker += i32(kPlanThreads)) {
    params.work[2 * worker] = params.batch;
    params.work[2 * worker + 1] = 0;
  }
}

// Workers begin, begin + step, ... up to `last` begin in this sequence.
__device__ __forceinline__ void write_begins(const PlanParams& params, i32 begin, i32 step, i32 last, i32 sequence,
                                             i32 extent, i32 position) {
#pragma unroll 1
  for (i32 worker = begin; worker <= last; worker += step) {
    params.work[2 * worker] = sequence;
    params.work[2 * worker + 1] = begin_tile(worker, extent, position);
  }
}

// A worker a split, and the splits by each sequence's length alone.
__device__ __forceinline__ void plan_batch_invariant(const PlanParams& params, i32 begin, i32 end, i32* warp_sums,
                                                     i32& used_workers) {
  const auto extent_of = [&](i32 tiles) { return invariant_extent(tiles, kInvariantSplitTiles, params.max_splits); };
  i32 num_workers = 0;
#pragma unroll 1
  for (i32 sequence = begin; sequence < end; ++sequence) {
    const i32 tiles = tiles_of(params.cache_seqlens[sequence], kTileTokens);
    num_workers += own_workers(tiles, extent_of(tiles));
  }
  i32 first = exclusive_sum(num_workers, warp_sums);
  if (end == params.batch && begin < end) used_workers = first + num_workers;
#pragma unroll 1
  for (i32 sequence = begin; sequence < end; ++sequence) {
    const i32 tiles = tiles_of(params.cache_seqlens[sequence], kTileTokens), extent = extent_of(tiles);
    const i32 num_splits = own_workers(tiles, extent);
    params.splits[2 * sequence] = first;
    params.splits[2 * sequence + 1] = num_splits;
#pragma unroll 1
    for (i32 split = 0; split < num_splits; ++split, ++first) {
      params.work[2 * first] = sequence;
      params.work[2 * first + 1] = split * extent;
    }
  }
  __syncthreads();
  idle_workers(params, used_workers);
}

extern "C" __global__ void __launch_bounds__(kPlanThreads) mla_plan(const __grid_constant__ PlanParams params) {
  __shared__ i32 warp_tiles[kPlanWarps], warp_spans[kPlanWarps];
  __shared__ bool fits[kExtents];
  __shared__ i32 used_workers;
  __shared__ i32 kept_tiles[kKept];
  const i32 run = (params.batch + i32(kPlanThreads) - 1) / i32(kPlanThreads);
  const i32 begin = min(i32(threadIdx.x) * run, params.batch), end = min(begin + run, params.batch);
  if (params.max_splits > 0) {
    plan_batch_invariant(params, begin, end, warp_spans, used_workers);
    return;
  }
  const u32 lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const i32 most_tiles = kMaxPlannedTiles / params.batch;
  const auto read_tiles = [&](i32 sequence) {
    return min(tiles_of(params.cache_seqlens[sequence], kTileTokens), most_tiles);
  };
  const auto tiles_at = [&](i32 sequence) { return sequence < kKept ? kept_tiles[sequence] : read_tiles(sequence); };

  i32 own_tiles = 0;
#pragma unroll 1
  for (i32 sequence = begin; sequence < end; ++sequence) {
    const i32 tiles = read_tiles(sequence);
    if (sequence < kKept) kept_tiles[sequence] = tiles;
    own_tiles += tiles;
  }
  const i32 tiles_in_all = block_sum(own_tiles, warp_tiles);
  i32 extent = worker_extent(tiles_in_all + (params.batch - 1) * kItemCostTiles, params.num_workers);

  // The shortest aligned stretch that is no longer than the packed one. A warp tries one length.
  const i32 least = worker_extent(tiles_in_all, params.num_workers);
  bool is_aligned = false;
  if (params.batch <= params.num_workers) {
#pragma unroll 1
    for (u32 i = warp; i < kExtents; i += kPlanWarps) {
      i32 workers = 0;
#pragma unroll 1
      for (i32 sequence = i32(lane); sequence < params.batch; sequence += i32(kWarpThreads)) {
        workers += own_workers(tiles_at(sequence), least + i32(i));
      }
      workers = __reduce_add_sync(0xffffffffu, workers);
      if (lane == 0) fits[i] = workers <= params.num_workers;
    }
    __syncthreads();
    const u32 fitting = __ballot_sync(0xffffffffu, lane < kExtents && least + i32(lane) <= extent && fits[lane]);
    is_aligned = fitting != 0;
    if (is_aligned) extent = least + __ffs(i32(fitting)) - 1;
  }

  const auto span_at = [&](i32 sequence) { return span_of(tiles_at(sequence), extent, is_aligned, kItemCostTiles); };
  i32 own_spans = 0;
#pragma unroll 1
  for (i32 sequence = begin; sequence < end; ++sequence) own_spans += span_at(sequence);
  i32 position = exclusive_sum(own_spans, warp_spans);
#pragma unroll 1
  for (i32 i = 0; i < run; ++i) {  // by all lanes of a warp
    const i32 sequence = begin + i;
    const bool exists = sequence < end;
    const i32 tiles = exists ? tiles_at(sequence) : 0;
    const i32 last = last_worker(position, tiles, extent, params.num_workers);
    if (exists) {
      const i32 first = first_worker(position, extent, params.num_workers);
      params.splits[2 * sequence] = first;
      params.splits[2 * sequence + 1] = last - first + 1;
    }
    const i32 previous_last = exists && sequence > 0
                                  ? position - span_at(sequence - 1) + item_extent(tiles_at(sequence - 1)) - 1
                                  : -1;
    const i32 begin_worker = exists ? begin_workers_from(previous_last, extent) : last + 1;
    if (last - begin_worker < kFew) write_begins(params, begin_worker, 1, last, sequence, extent, position);
    // A long sequence's workers are written by the whole warp.
#pragma unroll 1
    for (u32 many = __ballot_sync(0xffffffffu, last - begin_worker >= kFew); many != 0; many &= many - 1) {
      const i32 from = __ffs(i32(many)) - 1;
      write_begins(params, __shfl_sync(0xffffffffu, begin_worker, from) + i32(lane), kWarpThreads,
                   __shfl_sync(0xffffffffu, last, from), __shfl_sync(0xffffffffu, sequence, from), extent,
                   __shfl_sync(0xffffffffu, position, from));
    }
    if (exists && sequence == params.batch - 1) used_workers = last + 1;
    if (exists) position += span_at(sequence);
  }
  __syncthreads();
  idle_workers(params, used_workers);
}
