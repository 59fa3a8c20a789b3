// Computes the split schedule (schedule.cuh) from device lengths: which worker begins where, and which workers share
// each sequence. One block; a sequence a thread, in rounds for larger batches. Nothing depends on the lengths but the
// values written, so that a CUDA graph can replay it after lengths have changed.
#include "params.cuh"
#include "schedule.cuh"

constexpr u32 kPlanThreads = MLA_PLAN_THREADS;
constexpr u32 kPlanWarps = kPlanThreads / kWarpThreads;
constexpr i32 kTileTokens = MLA_TILE_TOKENS;
constexpr i32 kItemCostTiles = MLA_ITEM_COST_TILES;
constexpr i32 kInvariantSplitTiles = MLA_INVARIANT_SPLIT_TILES;
static_assert(kItemCostTiles >= 1, "positions of sequences must differ, empty ones included");

// Lengths from the least conceivable stretch to the packed one: with no more sequences than workers, the item costs
// lengthen a stretch by kItemCostTiles at most.
constexpr u32 kExtents = kItemCostTiles + 2;
constexpr i32 kKept = 1024;  // sequences whose lengths are read once
constexpr i32 kFew = 8;      // workers of a sequence that one thread writes

// Sum over the lanes up to this one.
__device__ __forceinline__ Position inclusive_sum(Position value) {
  const u32 lane = threadIdx.x % kWarpThreads;
  for (u32 offset = 1; offset < kWarpThreads; offset *= 2) {
    const Position below = __shfl_up_sync(0xffffffffu, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// Sum over the threads before this one; `total` receives the sum over the block.
__device__ __forceinline__ Position exclusive_sum(Position value, Position* warp_sums, Position& total) {
  const u32 lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const Position inclusive = inclusive_sum(value);
  __syncthreads();  // an earlier call's warp_sums have been read
  if (lane == kWarpThreads - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  Position before = 0;
  total = 0;
  for (u32 i = 0; i < kPlanWarps; ++i) {
    const Position sum = warp_sums[i];
    before += i < warp ? sum : 0;
    total += sum;
  }
  return before + inclusive - value;
}

// Workers without items, and the end of the last worker.
__device__ __forceinline__ void idle_workers(const PlanParams& params, i32 first) {
  for (i32 worker = first + i32(threadIdx.x); worker <= params.num_workers; worker += i32(kPlanThreads)) {
    params.work[2 * worker] = params.batch;
    params.work[2 * worker + 1] = 0;
  }
}

// Workers begin, begin + step, ... up to `last` begin in this sequence.
__device__ __forceinline__ void write_begins(const PlanParams& params, i32 begin, i32 step, i32 last, i32 sequence,
                                             Position extent, Position position) {
  for (i32 worker = begin; worker <= last; worker += step) {
    params.work[2 * worker] = sequence;
    params.work[2 * worker + 1] = begin_tile(worker, extent, position);
  }
}

// A worker a split, and the splits by each sequence's length alone.
__device__ __forceinline__ void plan_batch_invariant(const PlanParams& params, Position* warp_sums) {
  Position workers_before = 0;
  for (i32 base = 0; base < params.batch; base += i32(kPlanThreads)) {
    const i32 sequence = base + i32(threadIdx.x);
    const i32 tiles = sequence < params.batch ? tiles_of(params.cache_seqlens[sequence], kTileTokens) : 0;
    const i32 extent = invariant_extent(tiles, kInvariantSplitTiles, params.max_splits);
    const i32 num_splits = sequence < params.batch ? i32(own_workers(tiles, extent)) : 0;
    Position workers_of_round;
    const i32 first = i32(workers_before + exclusive_sum(num_splits, warp_sums, workers_of_round));
    workers_before += workers_of_round;
    if (sequence >= params.batch) continue;
    params.splits[2 * sequence] = first;
    params.splits[2 * sequence + 1] = num_splits;
    for (i32 split = 0; split < num_splits; ++split) {
      params.work[2 * (first + split)] = sequence;
      params.work[2 * (first + split) + 1] = split * extent;
    }
  }
  idle_workers(params, i32(workers_before));
}

extern "C" __global__ void __launch_bounds__(kPlanThreads) mla_plan(const __grid_constant__ PlanParams params) {
  __shared__ Position warp_sums[kPlanWarps];
  __shared__ bool fits[kExtents];
  __shared__ i32 used_workers;
  __shared__ i32 kept_tiles[kKept];
  if (params.max_splits > 0) {
    plan_batch_invariant(params, warp_sums);
    return;
  }
  const i32 rounds = (params.batch + i32(kPlanThreads) - 1) / i32(kPlanThreads);
  const u32 lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const auto read_tiles = [&](i32 sequence) { return tiles_of(params.cache_seqlens[sequence], kTileTokens); };
  const auto tiles_at = [&](i32 sequence) { return sequence < kKept ? kept_tiles[sequence] : read_tiles(sequence); };

  Position tiles_in_all = 0;
  for (i32 round = 0; round < rounds; ++round) {
    const i32 sequence = round * i32(kPlanThreads) + i32(threadIdx.x);
    const i32 tiles = sequence < params.batch ? read_tiles(sequence) : 0;
    if (sequence < kKept) kept_tiles[sequence] = tiles;
    Position tiles_of_round;
    exclusive_sum(tiles, warp_sums, tiles_of_round);
    tiles_in_all += tiles_of_round;
  }
  const Position line = tiles_in_all + Position(params.batch - 1) * kItemCostTiles;
  Position extent = worker_extent(line, params.num_workers);

  // The shortest aligned stretch that is no longer than the packed one. A warp tries one length.
  const Position least = worker_extent(tiles_in_all, params.num_workers);
  bool is_aligned = false;
  if (params.batch <= params.num_workers) {
    for (u32 i = warp; i < kExtents; i += kPlanWarps) {
      Position workers = 0;
      for (i32 sequence = i32(lane); sequence < params.batch; sequence += i32(kWarpThreads)) {
        workers += own_workers(tiles_at(sequence), least + i);
      }
      workers = inclusive_sum(workers);
      if (lane == kWarpThreads - 1) fits[i] = workers <= params.num_workers;
    }
    __syncthreads();
    for (u32 i = 0; i < kExtents && least + i <= extent && !is_aligned; ++i) {
      is_aligned = fits[i];
      if (is_aligned) extent = least + i;
    }
  }

  Position spans_before = 0;
  for (i32 round = 0; round < rounds; ++round) {
    const i32 sequence = round * i32(kPlanThreads) + i32(threadIdx.x);
    const i32 tiles = sequence < params.batch ? tiles_at(sequence) : 0;
    Position spans_of_round;
    const Position span = sequence < params.batch ? span_of(tiles, extent, is_aligned, kItemCostTiles) : 0;
    const Position position = spans_before + exclusive_sum(span, warp_sums, spans_of_round);
    spans_before += spans_of_round;

    const bool exists = sequence < params.batch;
    const i32 last = last_worker(position, tiles, extent, params.num_workers);
    if (exists) {
      const i32 first = first_worker(position, extent, params.num_workers);
      params.splits[2 * sequence] = first;
      params.splits[2 * sequence + 1] = last - first + 1;
    }
    const i32 previous_tiles = exists && sequence > 0 ? tiles_at(sequence - 1) : 0;
    const Position previous_last =
        sequence > 0
            ? position - span_of(previous_tiles, extent, is_aligned, kItemCostTiles) + item_extent(previous_tiles) - 1
            : -1;
    const i32 begin = exists ? begin_workers_from(previous_last, extent) : last + 1;
    if (last - begin < kFew) write_begins(params, begin, 1, last, sequence, extent, position);
    // A long sequence's workers are written by the whole warp.
    for (u32 many = __ballot_sync(0xffffffffu, last - begin >= kFew); many != 0; many &= many - 1) {
      const i32 from = __ffs(i32(many)) - 1;
      write_begins(params, __shfl_sync(0xffffffffu, begin, from) + i32(lane), kWarpThreads,
                   __shfl_sync(0xffffffffu, last, from), __shfl_sync(0xffffffffu, sequence, from), extent,
                   __shfl_sync(0xffffffffu, position, from));
    }
    if (sequence == params.batch - 1) used_workers = last + 1;
  }
  __syncthreads();
  idle_workers(params, used_workers);
}
