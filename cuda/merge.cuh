// Splits of one sequence become its result inside the launch that made them:
//
//   lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) out_s
//
// Every cell of a partial state carries a mark of the launch that wrote it (cells.cuh), so that whoever needs it just
// reads it until it is there. This waits for one trip through L2, where a fence, an arrival at a counter and a look at
// it by the others would take three. Marks come again some time: what a launch leaves unwritten it clears, bit by bit.
//
// Two splits: the worker that comes first leaves its state in memory and goes on. The other adds it to its own, in
// registers, and writes the result. Who is first is settled a little before the items end, so that few wait for it.
// The state that never was in memory is rounded as if it had been, and sums and products are rounded alike whoever
// comes last.
//
// More splits: every worker writes its state to memory, and when it has no items left merges its own slice of the rows
// and columns, in split order. Before, it gives the other splits `merge_patience_cycles` to start; if they have not
// (another kernel may hold the SMs that they need), it abandons its slice and leaves. Once all have started nothing can
// hold up their states, and it waits for those. The split that starts last merges what was abandoned. So no CTA ever
// depends on one that has not started.
//
// Counters wrap around to zero with the last of a launch: nobody has to reset them. Shares and orders depend on the
// plan alone: results are bit-identical from call to call.
#pragma once
#include "cells.cuh"
#include "params.cuh"
#include "pipeline.cuh"
#include "ptx.cuh"
#include "schedule.cuh"
#include "softmax.cuh"
#include "work.cuh"

// params.launches, of a plan.
struct LaunchCounters {
  u32 started;  // CTAs of the present launch, modulo their number
  u32 number;   // of launches before, modulo kLaunchNumbers
};

// The splits of a sequence that this worker may share with others. Only its first and its last item can be such.
struct SplitGroup {
  i32 sequence;
  i32 first_worker;
  i32 num_splits;            // 0 for a worker without such an item
  bool first_begins_worker;  // the first split is its worker's first item

  SplitGroup() = default;
  // All that it reads comes at the same time if `hinted_worker` is the first one.
  __device__ __forceinline__ SplitGroup(const DecodeParams& params, i32 s, i32 hinted_worker) : sequence(s) {
    const int2 splits = reinterpret_cast<const int2*>(params.splits)[s];
    i32 begins = hinted_worker >= 0 ? params.work[2 * hinted_worker] : -1;
    first_worker = splits.x;
    num_splits = splits.y;
    if (first_worker != hinted_worker) begins = params.work[2 * first_worker];
    first_begins_worker = begins == s;
  }
  __device__ __forceinline__ bool is_many() const { return num_splits > 2; }
  // Later splits are the first item of their worker.
  __device__ __forceinline__ i32 slot(i32 split) const {
    return partial_slot(first_worker + split, split > 0 || first_begins_worker);
  }
};

// How a worker stands to the other splits of a sequence.
enum Standing : u32 {
  kUnknown,
  kAllStarted,  // it may wait for them
  kInherits,    // so it may, and merges what they have abandoned besides
  kAbandons
};

// What a split merges: a stretch of its block's units. Where there are fewer than warps, several share one, each for a
// part of the splits.
struct Slice {
  i32 begin_unit;
  i32 end_unit;
  i32 parts_log2;
};

// What a worker merges of the sequence that an item belongs to.
struct MergeTask {
  SplitGroup group;
  Slice slice;
  bool is_of_first;  // item, or of the last one
  u32 standing;      // when this was asked for
};

// What one worker keeps in shared memory for its merges.
struct MergeShared {
  SplitGroup groups[2];  // of the first item, of the last one
  Slice slices[2];       // its own, of more than two splits
  u32 is_second[2];      // of these items, if one of two splits: the other split has claimed before
  u32 standing[2];
  u32 mark;              // that this launch's cells carry
  u32 clear_turn;        // what this launch clears of slots that it does not use
  u32 items_done;
  i32 next_split;        // from thread 0 to the others
  u64 ready;             // mbarrier: all of the above but is_second may be used
  u64 claimed[2];        // mbarriers: is_second is known
};

// A row's sum of two states, known by their base-2 log-sum-exp.
struct SumOfTwo {
  float own_weight, other_weight, lse;

  SumOfTwo() = default;
  __device__ __forceinline__ SumOfTwo(float own, float other) {
    const float top = fmaxf(own, other), base = finite_or_zero(top);
    const float own_part = ex2(own - base), other_part = ex2(other - base), total = own_part + other_part;
    const float scale = inverse_sum(total);
    own_weight = own_part * scale;
    other_weight = other_part * scale;
    lse = log_sum_exp(top, total);
  }
  // Products are rounded before they are added, so that the order does not matter.
  template <typename Cell>
  __device__ __forceinline__ void add(const Cell& own, const Cell& other, float (&sums)[Cell::kValues]) const {
    const float own_unit = own.unit(own_weight), other_unit = other.unit(other_weight);
#pragma unroll
    for (u32 i = 0; i < Cell::kValues; ++i) {
      sums[i] = __fadd_rn(__fmul_rn(own.number(i), own_unit), __fmul_rn(other.number(i), other_unit));
    }
  }
};

// Used by the `kThreads` threads from threadIdx.x == 0 on, the consumers, and by one warp besides, the herald; kBarrier
// is a named barrier of the consumers.
template <typename Element, typename Cells, u32 kThreads, u32 kBarrier>
class SplitMerge {
 public:
  // `scratch` is shared memory that nothing else uses once the worker has no items left: 96 bytes a thread.
  __device__ __forceinline__ SplitMerge(const DecodeParams& params, const Block& block, MergeShared& shared,
                                        const RowTable& rows, unsigned char* scratch)
      : params_(params), block_(block), shared_(shared), rows_(rows), scratch_(reinterpret_cast<State*>(scratch)) {}

  // Before the block meets for the first time, by one thread.
  __device__ __forceinline__ void init() const {
    mbarrier_init(shared_address(&shared_.ready), 1);
    for (u64& claimed : shared_.claimed) mbarrier_init(shared_address(&claimed), 1);
  }

  // ---- the herald ----

  // Before the previous kernel has ended: the first worker of the sequence that announce() will ask for, or -1.
  __device__ __forceinline__ i32 hinted_first_worker(const Stretch& hint) const {
    const i32 sequence = own_sequence(hint);
    if (u32(sequence) >= u32(params_.batch)) return -1;
    const i32 worker = ld_relaxed_gpu(params_.splits + 2 * sequence);
    return u32(worker) < gridDim.z ? worker : -1;
  }
  // Reads who shares the worker's first and last item, and tells the other splits that this one has started.
  __device__ __forceinline__ void announce(const Stretch& hint, i32 hinted_worker) const {
    const u32 lane = threadIdx.x % kWarpThreads;
    LaunchCounters* launches = reinterpret_cast<LaunchCounters*>(params_.launches);
    const u32 number = ld_relaxed_gpu(&launches->number);
    const Stretch stretch(params_, block_.worker);
    SplitGroup group;
    const i32 hinted_sequence = own_sequence(hint);
    if (hinted_worker >= 0) group = SplitGroup(params_, hinted_sequence, hinted_worker);
    const i32 sequence = own_sequence(stretch);
    if (sequence < 0) {
      group.num_splits = 0;
    } else if (hinted_worker < 0 || sequence != hinted_sequence) {
      group = SplitGroup(params_, sequence, -1);
    }
    // On its way while the rest is written down.
    const u32 last_split = group.is_many() ? u32(group.num_splits - 1) : 0;
    const u32 started = last_split > 0 ? atom_inc_relaxed_gpu(counter(group), last_split) : 0;
    if (lane < 2) shared_.groups[lane] = group;
    if (group.is_many()) shared_.slices[lane] = slice_of(group, block_.worker - group.first_worker);
    if (lane == 0) {
      shared_.standing[0] = shared_.standing[1] = kUnknown;
      shared_.items_done = 0;
      shared_.mark = 1 + number % kMarks;
      shared_.clear_turn = number % kClearTurns;
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&shared_.ready));
    const bool starts_last = last_split > 0 && started == last_split;
#pragma unroll 1
    for (u32 i = 0; i < 2; ++i) {
      if (!__shfl_sync(0xffffffffu, starts_last, i32(i))) continue;
      const SplitGroup& others = shared_.groups[i];
      __syncwarp();  // the count comes before every lane's fence
      fence_sc_gpu();
      u32 found = 0;
      for (i32 split = i32(lane); split < others.num_splits; split += i32(kWarpThreads)) {
        found |= ld_relaxed_gpu(abandoned(others, split));
      }
      const Standing standing = __any_sync(0xffffffffu, found != 0) ? kInherits : kAllStarted;
      if (lane == i) set_standing(i, standing);  // who will ask for it in watch()
    }
    // A first look: mostly all have started by now.
    if (last_split > 0 && !starts_last && ld_relaxed_gpu(counter(group)) == 0) set_standing(lane, kAllStarted);
    if (lane == 2) {
      const u32 last = gridDim.x * gridDim.y * gridDim.z - 1;
      // All CTAs have read the number when the last of them gets here.
      if (atom_inc_acq_rel_gpu(&launches->started, last) == last) {
        st_relaxed_gpu(&launches->number, number == kLaunchNumbers - 1 ? 0 : number + 1);
      }
    }
  }
  // Two splits, of the worker's first or of its last item: to be called shortly before the item ends, once each. What
  // lane 0 gets, which may still be on its way, is for tell_claim(): whether this split comes second.
  __device__ __forceinline__ u32 claim(bool is_first) const {
    return threadIdx.x % kWarpThreads == 0 ? atom_inc_relaxed_gpu(counter(group_of(is_first)), 1) : 0;
  }
  __device__ __forceinline__ void tell_claim(bool is_first, u32 earlier) const {
    const u32 lane = threadIdx.x % kWarpThreads;
    const bool is_second = __shfl_sync(0xffffffffu, earlier, 0) == 1;
    if (lane == 0) {
      const u32 i = is_first ? 0 : 1;
      shared_.is_second[i] = is_second;
      mbarrier_arrive(shared_address(&shared_.claimed[i]));
    }
    if (!is_second) return;
    // The other state may have gone to memory meanwhile: into L2 with it before the consumers ask.
    constexpr u32 kLaneCells = Cells::kCells / kWarpThreads;
    cp_async_bulk_prefetch(partial_cells(other_slot(is_first)) + lane * kLaneCells, kLaneCells * sizeof(uint4));
  }
  // Until it is known whether the worker may wait for the other splits.
  __device__ __forceinline__ void watch() const {
    const u32 lane = threadIdx.x % kWarpThreads;
    if (lane >= 2 || !shared_.groups[lane].is_many() || standing(lane) != kUnknown) return;
    const SplitGroup& group = shared_.groups[lane];
    u32* const own_flag = abandoned(group, block_.worker - group.first_worker);
    long long done_at = 0;
    Watchdog watchdog;
    while (ld_relaxed_gpu(counter(group)) != 0) {
      watchdog.turn();
      __nanosleep(50);
      if (ld_relaxed_shared(shared_address(&shared_.items_done)) == 0) continue;
      if (done_at == 0) done_at = clock64();
      if (clock64() - done_at < params_.merge_patience_cycles) continue;
      // The split that starts last looks at this flag after it has counted itself: if it did so before the flag was
      // there, the counter shows it.
      st_relaxed_gpu(own_flag, 1);
      fence_sc_gpu();
      if (ld_relaxed_gpu(counter(group)) != 0) {
        set_standing(lane, kAbandons);
        return;
      }
      st_relaxed_gpu(own_flag, 0);
    }
    set_standing(lane, kAllStarted);
  }

  // Clears a stretch of those of the worker's slots to which no state goes in this launch. When claims have been told.
  __device__ __forceinline__ void clear_unused() const {
    constexpr u32 kStretch = Cells::kCells / kClearTurns;
    static_assert(kStretch * kClearTurns == Cells::kCells && kStretch <= kWarpThreads, "a cell a lane");
    static_assert(Cells::kRowPairs <= kWarpThreads, "those at once");
    const u32 lane = threadIdx.x % kWarpThreads;
    __syncwarp();
#pragma unroll 1
    for (u32 i = 0; i < 2; ++i) {
      const i32 num_splits = shared_.groups[i].num_splits;
      if (num_splits > 2 || (num_splits == 2 && !shared_.is_second[i])) continue;
      const i32 slot = partial_slot(block_.worker, i == 0);
      if (lane < kStretch) st_global_16(partial_cells(slot) + shared_.clear_turn * kStretch + lane, {0, 0, 0, 0});
      if (lane < Cells::kRowPairs) st_global_16(partial_lses(slot) + lane, {0, 0, 0, 0});
    }
  }

  // ---- the consumers, at the end of an item ----

  // Before anything below.
  __device__ __forceinline__ void await_groups() const { wait_phase(shared_address(&shared_.ready), 0); }
  __device__ __forceinline__ bool is_split(const Item& item) const {
    return (item.is_first || item.is_last) && group_of(item.is_first).num_splits > 1;
  }
  __device__ __forceinline__ u32 mark() const { return shared_.mark; }
  __device__ __forceinline__ i32 own_slot(const Item& item) const { return partial_slot(block_.worker, item.is_first); }

  // Two splits. The first writes its state, the second reads it.
  __device__ __forceinline__ bool is_pair(bool is_first) const { return group_of(is_first).num_splits == 2; }
  // Of an item that is split: whether the other split's state is there, or will be, to be added to this one's.
  __device__ __forceinline__ bool adds_other(const Item& item) const {
    if (!is_pair(item.is_first)) return false;
    const u32 i = item.is_first ? 0 : 1;
    wait_phase(shared_address(&shared_.claimed[i]), 0);
    return shared_.is_second[i];
  }
  __device__ __forceinline__ i32 other_slot(bool is_first) const {
    const SplitGroup& group = group_of(is_first);
    return group.slot(1 - (block_.worker - group.first_worker));
  }

  // Where the cells of a split's partial state go, and those of its row pairs.
  __device__ __forceinline__ uint4* partial_cells(i32 slot) const {
    return reinterpret_cast<uint4*>(params_.partial_out) + index_of_block(params_, block_, slot) * Cells::kCells;
  }
  __device__ __forceinline__ uint4* partial_lses(i32 slot) const {
    return reinterpret_cast<uint4*>(params_.partial_lse) + index_of_block(params_, block_, slot) * Cells::kRowPairs;
  }

  // What run() needs to know of the last item. Better asked for before that is written: what reads shared memory waits
  // behind the stores before it, 500 cycles for 16 rows.
  __device__ __forceinline__ MergeTask task(bool is_first) const {
    const u32 i = is_first ? 0 : 1;
    return {shared_.groups[i], shared_.slices[i], is_first, standing(i)};
  }

  // ---- the consumers, when they have no items left ----

  // Merges the worker's slices of the sequences that it shares with more than one other: the last item's, then, if that
  // is another, the first one's.
  __device__ __forceinline__ void run(MergeTask next) const {
    if (threadIdx.x == 0) st_relaxed_shared(shared_address(&shared_.items_done), 1);  // orders nothing
#pragma unroll 1
    while (true) {
      if (next.group.is_many()) merge(next);
      if (next.is_of_first) break;
      next = task(true);
    }
  }

 private:
  static constexpr i32 kWarps = kThreads / kWarpThreads;
  using Cell = typename Cells::Cell;
  static constexpr u32 kUnitCells = Cells::kUnitCells;
  // Splits of which a lane loads its cells at once. It sees to the weight of one of them, for one row of the unit: few
  // instructions, which a merge waits for as much as for L2.
  static constexpr u32 kBatch = kWarpThreads / Cells::kUnitRows;
  static constexpr i32 kPartBatch = kUnitCells == 1 ? 4 : 2;  // parts that are added up at once

  // A lane's cells of some splits, added up relative to `top`, the largest of their log-sum-exps.
  struct alignas(16) State {
    float sum[kUnitCells][Cell::kValues];
    float total;  // in sum_of_splits, of those splits whose weights the lane sees to
    float top;

    // Makes it relative to a larger `top`; returns what all exponents are to be taken to.
    __device__ __forceinline__ float raise(float to) {
      const float old_top = top;
      top = fmaxf(top, to);
      const float base = finite_or_zero(top), weight = ex2(old_top - base);
      total *= weight;
#pragma unroll
      for (u32 c = 0; c < kUnitCells; ++c) {
#pragma unroll
        for (u32 i = 0; i < Cell::kValues; ++i) sum[c][i] *= weight;
      }
      return base;
    }
  };
  static_assert(sizeof(State) <= 96, "more than the scratch has for a thread");

  // Where a lane's row goes: null if it does not exist, and lse for all lanes but one.
  struct Place {
    u16* out;
    float* lse;
  };

  const DecodeParams& params_;
  const Block& block_;
  MergeShared& shared_;
  const RowTable& rows_;
  State* scratch_;

  // Lane 0: the sequence of the worker's first item; lane 1: of its last one, if that is another; else -1.
  __device__ __forceinline__ static i32 own_sequence(const Stretch& stretch) {
    const u32 lane = threadIdx.x % kWarpThreads;
    if (!stretch.has_items()) return -1;
    if (lane == 0) return stretch.first_sequence;
    return lane == 1 && stretch.last_sequence != stretch.first_sequence ? stretch.last_sequence : -1;
  }

  // The splits that share the worker's first item, or its last one if that is another.
  __device__ __forceinline__ const SplitGroup& group_of(bool is_first) const {
    return shared_.groups[is_first ? 0 : 1];
  }
  // Splits that have started, modulo their number; of two, those that have claimed.
  __device__ __forceinline__ u32* counter(const SplitGroup& group) const {
    return params_.merge_counters + index_of_block(params_, block_, group.first_worker);
  }
  __device__ __forceinline__ u32* abandoned(const SplitGroup& group, i32 split) const {
    return params_.merge_abandoned + index_of_block(params_, block_, group.slot(split));
  }
  __device__ __forceinline__ u32 standing(u32 i) const {
    return ld_acquire_shared(shared_address(&shared_.standing[i]));
  }
  __device__ __forceinline__ void set_standing(u32 i, Standing standing) const {
    st_release_shared(shared_address(&shared_.standing[i]), standing);
  }

  // This worker's slice, and what it inherits.
  __device__ __forceinline__ void merge(const MergeTask& task) const {
    const SplitGroup& group = task.group;
    u32 known = task.standing;
    Watchdog watchdog;
    while (known == kUnknown) {
      watchdog.turn();
      known = standing(task.is_of_first ? 0 : 1);
    }
    if (known == kAbandons) return;
    Slice slice = task.slice;
    i32 split = 0;
#pragma unroll 1
    while (true) {
      merge_slice(group, slice);
      split = known == kInherits ? next_abandoned(group, split) : group.num_splits;
      if (split >= group.num_splits) break;
      slice = slice_of(group, split++);
    }
  }

  // The first abandoned slice from `split` on, which is then this worker's; the number of splits if there is none.
  __device__ __forceinline__ i32 next_abandoned(const SplitGroup& group, i32 split) const {
    barrier_cta_sync(kBarrier, kThreads);
    if (threadIdx.x < kWarpThreads) {
      u32 found = 0;
      for (; split < group.num_splits; split += i32(kWarpThreads)) {
        const i32 own = split + i32(threadIdx.x);
        found = __ballot_sync(0xffffffffu, own < group.num_splits && ld_relaxed_gpu(abandoned(group, own)) != 0);
        if (found != 0) break;
      }
      if (threadIdx.x == 0) {
        shared_.next_split = found != 0 ? split + __ffs(i32(found)) - 1 : group.num_splits;
        if (found != 0) st_relaxed_gpu(abandoned(group, shared_.next_split), 0);
      }
    }
    barrier_cta_sync(kBarrier, kThreads);
    return shared_.next_split;
  }

  __device__ __forceinline__ Slice slice_of(const SplitGroup& group, i32 split) const {
    const i32 units = Cells::units(max(0, min(block_.num_rows(params_), i32(Cells::kRows))));
    const i32 num_splits = group.num_splits;
    Slice slice = {i32(u32(split * units) / u32(num_splits)), i32(u32((split + 1) * units) / u32(num_splits)), 0};
    const i32 own_units = slice.end_unit - slice.begin_unit;
    // Fewer parts than splits: the first part has two splits at least, on which sum_of_splits relies.
#pragma unroll 1
    for (i32 parts = 2; parts * own_units <= kWarps && parts < num_splits && parts <= kWarps; parts *= 2) {
      ++slice.parts_log2;
    }
    return slice;
  }

  __device__ __forceinline__ void merge_slice(const SplitGroup& group, const Slice& slice) const {
    const i32 end = slice.end_unit, parts_log2 = slice.parts_log2, num_splits = group.num_splits;
    if (slice.begin_unit == end) return;
    const i32 warp = i32(threadIdx.x / kWarpThreads), parts = 1 << parts_log2, part = warp & (parts - 1);
    const i32 splits_per_part = (num_splits + parts - 1) >> parts_log2, first_split = part * splits_per_part;
    i32 unit = slice.begin_unit + (warp >> parts_log2);
#pragma unroll 1
    do {  // once, if there are several parts
      const bool has_unit = unit < end;
      State state;
      Place place;
      if (has_unit) {
        state = sum_of_splits(group, unit, first_split, min(first_split + splits_per_part, num_splits), place);
      }
      if (parts > 1) {
        barrier_cta_sync(kBarrier, kThreads);  // nobody uses the scratch any more
        if (has_unit) scratch_[threadIdx.x] = state;
        barrier_cta_sync(kBarrier, kThreads);
        if (has_unit && part == 0) state = sum_of_parts(parts);
      }
      if (has_unit && part == 0) write(unit, state, place);
      unit += kWarps >> parts_log2;
    } while (unit < end && parts == 1);
  }

  // Of splits [begin, end), once their cells are there. Meanwhile it finds out where the result goes.
  __device__ __forceinline__ State sum_of_splits(const SplitGroup& group, i32 unit, i32 begin, i32 end,
                                                 Place& place) const {
    const Cells at(unit);
    const bool exists = i32(at.row()) < block_.num_rows(params_);
    // From one split to the next it is two slots, but for the first, which may be its worker's last item. A slot has
    // less than 2^32 bytes: mlacore/plan.py limits the rows.
    const u32 lse_slot = u32(params_.blocks_per_worker) * Cells::kRowPairs * kCellBytes;
    const u32 slot = u32(params_.blocks_per_worker) * Cells::kCells * kCellBytes;
    const u32 own = at.split_of_lane();
    const i32 first_slot = 2 * (group.first_worker + begin);
    const uint4* first_lse = partial_lses(first_slot) + at.pair();
    const uint4* first_cell = partial_cells(first_slot) + u32(unit) * (kUnitCells * kWarpThreads) + at.lane;
    State state = {{}, 0.f, -infinity()};
#pragma unroll 1
    for (i32 first = begin; first < end; first += i32(kBatch)) {
      // Past the part's end its last split stands in, without weight. It is never the first one of the sequence, whose
      // slot may be odd.
      const u32 last = u32(end - 1 - first), odd = first == 0 && !group.first_begins_worker ? 1 : 0;
      const uint4* const lse_cell = bytes_after(first_lse, lse_slot, own == 0 ? odd : 2 * min(own, last));
      const uint4* cell[kBatch];
#pragma unroll
      for (u32 i = 0; i < kBatch; ++i) cell[i] = bytes_after(first_cell, slot, i == 0 ? odd : 2 * min(i, last));
      first_lse = bytes_after(first_lse, lse_slot, 2 * kBatch);
      first_cell = bytes_after(first_cell, slot, 2 * kBatch);
      uint4 lses = ld_relaxed_gpu_16(lse_cell), cells[kBatch][kUnitCells];
#pragma unroll
      for (u32 i = 0; i < kBatch; ++i) {
#pragma unroll
        for (u32 c = 0; c < kUnitCells; ++c) cells[i][c] = ld_relaxed_gpu_16(cell[i] + c * kWarpThreads);
      }
      if (first == begin) place = place_of(group, at);
      const u32 mark = shared_.mark;
      Watchdog watchdog;
#pragma unroll 1
      while (true) {
        u32 difference = 0;
#pragma unroll
        for (u32 i = 0; i < kBatch; ++i) {
#pragma unroll
          for (u32 c = 0; c < kUnitCells; ++c) difference |= Cell::mark_difference(cells[i][c], mark);
        }
        const bool is_there = is_marked_lse(lses, mark) && (difference & Cell::kMarkBits) == 0;
        if (__all_sync(0xffffffffu, is_there || !exists)) break;
        watchdog.turn();
        if (!is_marked_lse(lses, mark)) lses = ld_relaxed_gpu_16(lse_cell);
#pragma unroll
        for (u32 i = 0; i < kBatch; ++i) {
#pragma unroll
          for (u32 c = 0; c < kUnitCells; ++c) {
            if (!is_marked<Cell>(cells[i][c], mark)) cells[i][c] = ld_relaxed_gpu_16(cell[i] + c * kWarpThreads);
          }
        }
      }
      const float lse = own <= last && exists ? unpack_lse(lses, at.row_of_pair()) : -infinity();
      const float own_weight = ex2(lse - state.raise(lanes_max<Cells::kSplitLanes, kBatch>(lse)));
      state.total += own_weight;
#pragma unroll
      for (u32 i = 0; i < kBatch; ++i) {
        const float weight = __shfl_sync(0xffffffffu, own_weight, i32(at.lane_of_split(i)));
#pragma unroll
        for (u32 c = 0; c < kUnitCells; ++c) {
          const Cell values(cells[i][c]);
          const float unit_of_values = values.unit(weight);
#pragma unroll
          for (u32 k = 0; k < Cell::kValues; ++k) state.sum[c][k] += values.number(k) * unit_of_values;
        }
      }
    }
    state.total = lanes_sum<Cells::kSplitLanes, kBatch>(state.total);
    return state;
  }

  // Of the parts that this warp and those after it have put into the scratch.
  __device__ __forceinline__ State sum_of_parts(i32 parts) const {
    State merged = {{}, 0.f, -infinity()};
#pragma unroll 1
    for (i32 first = 0; first < parts; first += kPartBatch) {
      State others[kPartBatch];
      float top = -infinity();
#pragma unroll
      for (i32 i = 0; i < kPartBatch; ++i) {
        others[i] = scratch_[threadIdx.x + u32(min(first + i, parts - 1)) * kWarpThreads];
        if (first + i >= parts) others[i].top = -infinity();
        top = fmaxf(top, others[i].top);
      }
      const float base = merged.raise(top);
#pragma unroll
      for (i32 i = 0; i < kPartBatch; ++i) {
        const float weight = ex2(others[i].top - base);
        merged.total += weight * others[i].total;
#pragma unroll
        for (u32 c = 0; c < kUnitCells; ++c) {
#pragma unroll
          for (u32 k = 0; k < Cell::kValues; ++k) merged.sum[c][k] += weight * others[i].sum[c][k];
        }
      }
    }
    return merged;
  }

  __device__ __forceinline__ Place place_of(const SplitGroup& group, const Cells& at) const {
    const i64 first_row = first_row_of(params_, group.sequence);
    const u32 row = at.row();
    const i32 out_row = rows_.out_row[row];
    return {out_row < 0 ? nullptr : params_.out + (first_row + out_row) * kHeadDimV,
            out_row < 0 || !at.has_first_column() ? nullptr : params_.lse + first_row + rows_.lse_row[row]};
  }

  // A unit of out, and lse once for each row.
  __device__ __forceinline__ void write(i32 unit, const State& state, const Place& place) const {
    if (place.lse != nullptr) *place.lse = log_sum_exp(state.top, state.total) * kLn2;
    Cells(unit).template store<Element>(place.out, state.sum, inverse_sum(state.total));
  }
};
