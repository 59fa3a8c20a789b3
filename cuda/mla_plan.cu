// Computes the split schedule (schedule.cuh) from device lengths: which worker begins where, and which workers share each
// sequence. One block; a sequence a thread, in rounds for larger batches. Nothing depends on the lengths but the values
// written, so that a CUDA graph can replay it after lengths have changed.
#include "params.cuh"
#include "schedule.cuh"

constexpr u32 kPlanThreads = MLA_PLAN_THREADS;
constexpr u32 kPlanWarps = kPlanThreads / kWarpThreads;
constexpr i32 kTileTokens = MLA_TILE_TOKENS;
constexpr i32 kItemCostTiles = MLA_ITEM_COST_TILES;
static_assert(kItemCostTiles >= 1, "positions of sequences must differ, empty ones included");
static_assert(kPlanWarps <= kWarpThreads, "one warp scans the warps' sums");

// Sum over the threads before this one; `total` receives the sum over the block.
__device__ __forceinline__ Position exclusive_sum(Position value, Position* warp_sums, Position& total) {
  const u32 lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  Position inclusive = value;
  for (u32 offset = 1; offset < kWarpThreads; offset *= 2) {
    const Position below = __shfl_up_sync(0xffffffffu, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
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

extern "C" __global__ void __launch_bounds__(kPlanThreads) mla_plan(const __grid_constant__ PlanParams params) {
  __shared__ Position warp_sums[kPlanWarps];
  const i32 rounds = (params.batch + i32(kPlanThreads) - 1) / i32(kPlanThreads);
  const auto tiles_at = [&](i32 sequence) {
    return sequence < params.batch ? tiles_of(params.cache_seqlens[sequence], kTileTokens) : 0;
  };

  // Length of the line: all tiles, and the cost of every change of sequence.
  Position line = Position(params.batch - 1) * kItemCostTiles;
  for (i32 round = 0; round < rounds; ++round) {
    Position tiles_of_round;
    exclusive_sum(tiles_at(round * i32(kPlanThreads) + i32(threadIdx.x)), warp_sums, tiles_of_round);
    line += tiles_of_round;
  }
  const Position extent = worker_extent(line, params.num_workers);

  Position tiles_before = 0;
  for (i32 round = 0; round < rounds; ++round) {
    const i32 sequence = round * i32(kPlanThreads) + i32(threadIdx.x);
    const i32 tiles = tiles_at(sequence);
    Position tiles_of_round;
    const Position position =
        tiles_before + exclusive_sum(tiles, warp_sums, tiles_of_round) + Position(sequence) * kItemCostTiles;
    tiles_before += tiles_of_round;
    if (sequence >= params.batch) continue;

    const i32 first = first_worker(position, extent, params.num_workers);
    const i32 last = last_worker(position, tiles, extent, params.num_workers);
    params.splits[2 * sequence] = first;
    params.splits[2 * sequence + 1] = last - first + 1;

    const i32 previous_tiles = sequence > 0 ? tiles_at(sequence - 1) : 0;
    const Position previous_last =
        sequence > 0 ? position - kItemCostTiles - previous_tiles + item_extent(previous_tiles) - 1 : -1;
    for (i32 worker = begin_workers_from(previous_last, extent); worker <= last; ++worker) {
      params.work[2 * worker] = sequence;
      params.work[2 * worker + 1] = begin_tile(worker, extent, position);
    }
    if (sequence == params.batch - 1) {
      for (i32 worker = last + 1; worker <= params.num_workers; ++worker) {
        params.work[2 * worker] = params.batch;
        params.work[2 * worker + 1] = 0;
      }
    }
  }
}
