// What both decode kernels make of a CTA: two groups of consumers, beside them a warp that loads K tiles, and three
// that load Q. How it starts, what the loaders do, how it ends; the kernels bring the consumers.
#pragma once
#include "cluster.cuh"
#include "first_tile.cuh"
#include "layout.cuh"
#include "load_kv.cuh"
#include "load_q.cuh"
#include "params.cuh"
#include "ptx.cuh"
#include "work.cuh"

constexpr u32 kHeadDimQK = MLA_HEAD_DIM_QK;
constexpr u32 kStages = 2;
constexpr u32 kClusterCtas = MLA_CLUSTER_CTAS;  // CTAs (row blocks) that load each tile together
constexpr u32 kChunks = kHeadDimQK / kChunkColumns;
constexpr u32 kPartChunks = MLA_PART_CHUNKS;
constexpr u32 kParts = kChunks / kPartChunks;  // in which a tile arrives
constexpr u32 kHalves = 2;  // of the latent columns, in which a stage is handed back
constexpr u32 kStepsPerChunk = kChunkColumns / kReductionStep;
constexpr u32 kStepsPerTile = kTileTokens / kReductionStep;

constexpr u32 kGroupWarps = kWarpgroupThreads / kWarpThreads;
constexpr u32 kConsumerGroups = 2;
constexpr u32 kConsumerWarps = kConsumerGroups * kGroupWarps;
constexpr u32 kConsumerThreads = kConsumerGroups * kWarpgroupThreads;
constexpr u32 kQLoaderWarps = 3;
constexpr u32 kThreads = kConsumerThreads + kWarpgroupThreads;
constexpr u32 kConsumerRegisters = 224;
constexpr u32 kProducerRegisters = 56;

static_assert(kClusterCtas == 1 || kClusterCtas == 2, "an SM pair (TPC) hosts the cluster, so that no SM is left over");
static_assert(kChunkColumns == MLA_CHUNK_COLUMNS, "mlacore/params.py describes other boxes to TMA");
static_assert(kThreads == MLA_THREADS, "mlacore/params.py launches another number of threads");

using Tiles = ItemTiles<kStages>;

// Barriers between the roles; the kernels say what they mean.
struct RoleBarriers {
  u64 q_full;
  u64 q_empty;
  u64 kv_full[kStages][kParts];
  u64 kv_empty[kStages][kHalves];
  u64 begun;
  FirstTile<kClusterCtas, kParts, kPartChunks * kChunkBytes> first_tile;

  // All but the first tile's, by one thread: the instruction takes its operands from uniform registers, and a warp does
  // lanes one by one.
  __device__ __forceinline__ void init() {
    mbarrier_init(shared_address(&q_full), kQLoaderWarps * kWarpThreads);
    mbarrier_init(shared_address(&q_empty), kConsumerWarps);
    for (u32 stage = 0; stage < kStages; ++stage) {
      for (u64& part : kv_full[stage]) mbarrier_init(shared_address(&part), 1);
      for (u64& half : kv_empty[stage]) mbarrier_init(shared_address(&half), kClusterCtas * kGroupWarps);
    }
    mbarrier_init(shared_address(&begun), 1);
  }
};

// Q of the worker's first item, which the consumers load themselves.
using FirstQuery = QueryRows<kConsumerWarps, kChunks, kTileRows * kChunkColumns>;

// By all consumers, before they use Q of the worker's item number `index`, or for the first time the row table.
template <u32 kBarrier>
__device__ __forceinline__ void await_query(RoleBarriers& barriers, u32 index) {
  if (index == 0) {
    FirstQuery::await();
    barrier_cta_sync(kBarrier, kConsumerThreads);
  } else {
    wait_phase(shared_address(&barriers.q_full), (index - 1) % 2);
  }
}

// `shared` is the kernel's SharedPlan; `consume(items)` is what the consumers do with the worker's items, of which
// there are some: first of all they await Q. It returns merge.task() of the last item.
template <typename SharedPlan, typename Merge, typename Consume>
__device__ __forceinline__ void run_roles(SharedPlan& shared, const TensorMap* kv_map, const DecodeParams& params,
                                          const Block& block, const Merge& merge, const Consume& consume) {
  const i32 hint_word = Stretch::read_hint(params, block.worker);  // on its way while barriers are initialised
  if (threadIdx.x == 0) {
    shared.barriers.init();
    fence_mbarrier_init();
  } else if (threadIdx.x == kWarpThreads) {
    merge.init();
    fence_mbarrier_init();
  } else if (threadIdx.x == 2 * kWarpThreads) {
    shared.barriers.first_tile.init();
    fence_mbarrier_init();
  } else if (threadIdx.x == kConsumerThreads) {
    prefetch_tensormap(kv_map);
  }
  arrive_at_start<kClusterCtas>();
  griddepcontrol_launch_dependents();

  // Every role waits for the end of the previous kernel before it relies on anything in memory. What it reads earlier
  // is a hint: it may ask for what that leads to as soon as the wait is over, but reads it again.
  if (threadIdx.x >= kConsumerThreads) {
    setmaxnreg_dec<kProducerRegisters>();
    // The shuffle tells the compiler that warps do not diverge there; without it, a box takes up to five moves from
    // vector to uniform registers.
    const u32 warp = __shfl_sync(0xffffffffu, (threadIdx.x - kConsumerThreads) / kWarpThreads, 0);
    if (warp == 0) {
      load_kv<kClusterCtas>(shared.kv, shared.barriers.kv_full, shared.barriers.kv_empty, shared.barriers.first_tile,
                            shared.barriers.begun, kv_map, params, block, Stretch::from_hint(hint_word));
    } else {
      await_start<kClusterCtas>();
      const Stretch hint = Stretch::from_hint(hint_word);
      const i32 hinted_worker = warp == 1 ? merge.hinted_first_worker(hint) : 0;
      griddepcontrol_wait();
      if (warp == 1) {
        if (threadIdx.x % kWarpThreads == 0) mbarrier_arrive(shared_address(&shared.barriers.begun));
        merge.announce(hint, hinted_worker);
      } else if (warp == 3) {
        shared.barriers.first_tile.hand_over(shared.barriers.kv_full[0]);
      }
      load_later_q<kQLoaderWarps>(shared.q, shared.barriers.q_full, shared.barriers.q_empty, params, block, merge,
                                  warp - 1);
      if (warp == 1) {
        merge.watch();
        merge.clear_unused();
      }
    }
  } else {
    setmaxnreg_inc<kConsumerRegisters>();
    if (threadIdx.x < kTileRows) shared.rows.fill(params, block, threadIdx.x);
    const FirstQuery query(shared.q, params, block, threadIdx.x / kWarpThreads);
    const Stretch hint = Stretch::from_hint(hint_word);
    griddepcontrol_wait();
    WorkerItems items(params, block.worker, hint);
    i32 asked = hint.leads_to_items(params) ? hint.first_sequence : -1;
#pragma unroll 1
    while (true) {  // twice if the hint was wrong
      if (asked >= 0) query.load(asked, u32(block.worker));
      if (!items.stretch().has_items() || items.stretch().first_sequence == asked) break;
      FirstQuery::await();
      asked = items.stretch().first_sequence;
    }
    await_start<kClusterCtas>();
    MergeTask task;
    if (items.stretch().has_items()) {
      task = consume(items);
    } else {
      FirstQuery::await();
      merge.await_groups();
      task = merge.task(true);
    }
    // Not in the branch: there, the compiler keeps shared memory's address in a vector register through the loops of
    // the 64-row kernel (1 to 2 %).
    merge.run(task);
  }
}
