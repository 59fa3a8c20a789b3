// Splits of one sequence become its result inside the launch that made them:
//
//   lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) out_s
//
// Two splits: the worker that comes first leaves its state in memory and goes on. The other adds it to its own, in
// registers, and writes the result. It waits for the end of the other's item at most; sums and products are rounded
// alike whoever comes last.
//
// More splits: every worker writes its state to memory, arrives at the sequence's counter when it has no items left,
// waits for the others and merges its own slice of the rows and columns, in split order. Waiting is bounded: a worker
// that has lost its patience (the other CTAs may not be resident, when another kernel holds their SMs) abandons its
// slice and leaves; the worker that arrives last merges what was abandoned. So no CTA ever depends on one that has not
// started. The last arriver also sets the counters back to zero for the next launch: everybody else has settled (has
// claimed or abandoned his slice) by then and does not look at them again.
//
// Shares and orders depend on the plan alone: results are bit-identical from call to call.
//
// A partial state is kept as the accumulators lie in registers. A cell is a float4 of one thread: two columns of two
// query rows, a row pair; `Cells` (cells.cuh) says which, and where in memory. The cells of a row pair are numbered in
// a row, so that a slice has few row pairs.
#pragma once
#include "cells.cuh"
#include "params.cuh"
#include "ptx.cuh"
#include "schedule.cuh"
#include "softmax.cuh"
#include "work.cuh"

// Counters of the splits of one sequence, KV head and row block; zero between launches.
struct MergeCounters {
  u32 arrived;  // splits whose partial states are in memory; of two, those that are done
  u32 settled;  // others that have claimed (1) or abandoned (1 + kAbandoned) their slice; of two, states in memory
};
constexpr u32 kAbandoned = 1 << 16;

enum class Turn : u32 { kAbandon, kMerge, kMergeLast };

// The splits of a sequence that this worker may share with others. Only its first and its last item can be such.
struct SplitGroup {
  i32 sequence;
  i32 first_worker;
  i32 num_splits;            // 0 for a worker without items
  bool first_begins_worker;  // the first split is its worker's first item

  SplitGroup() = default;
  __device__ __forceinline__ SplitGroup(const DecodeParams& params, i32 s) : sequence(s) {
    const int2 splits = reinterpret_cast<const int2*>(params.splits)[s];
    first_worker = splits.x;
    num_splits = splits.y;
    first_begins_worker = params.work[2 * first_worker] == s;
  }
  // Later splits are the first item of their worker.
  __device__ __forceinline__ i32 slot(i32 split) const {
    return partial_slot(first_worker + split, split > 0 || first_begins_worker);
  }
};

// What one worker keeps in shared memory for its merges.
struct MergeShared {
  SplitGroup groups[2];  // of the first item, of the last one
  bool is_second[2];     // of these items, if one of two splits: the other split was done before
  Turn turn;             // from thread 0 to the others, as is `settled`
  u32 settled;
};

// One state's share of the sum of two. Products are rounded before they are added, so that the order does not matter.
__device__ __forceinline__ float sum_of_products(float a, float weight_a, float b, float weight_b) {
  return __fadd_rn(__fmul_rn(a, weight_a), __fmul_rn(b, weight_b));
}

// Used by the `kThreads` threads from threadIdx.x == 0 on; kBarrier is a named barrier of theirs.
template <typename Element, typename Cells, u32 kThreads, u32 kBarrier>
class SplitMerge {
 public:
  // `scratch` is shared memory that nothing else uses once the worker has no items left: 32 bytes a thread.
  __device__ __forceinline__ SplitMerge(const DecodeParams& params, const Block& block, MergeShared& shared,
                                        const RowTable& rows, unsigned char* scratch)
      : params_(params), block_(block), shared_(shared), rows_(rows), scratch_(reinterpret_cast<State*>(scratch)) {}

  // Thread 0 and 1 read ahead who shares the worker's first and last item: three dependent loads that nobody has to
  // wait for later. All threads have to meet before the first use.
  __device__ __forceinline__ void load_groups(const WorkerItems& items) const {
    if (threadIdx.x < 2) {
      SplitGroup& group = shared_.groups[threadIdx.x];
      group.num_splits = 0;
      if (items.has_items()) {
        group = SplitGroup(params_, threadIdx.x == 0 ? items.first_sequence() : items.last_sequence());
      }
    }
  }
  __device__ __forceinline__ const SplitGroup& group_of(const Item& item) const {
    return shared_.groups[item.is_first ? 0 : 1];
  }
  __device__ __forceinline__ bool is_split(const Item& item) const {
    return (item.is_first || item.is_last) && group_of(item).num_splits > 1;
  }

  // Two splits. Their items are claimed, and then either published or, by the second, awaited and reset.
  __device__ __forceinline__ bool is_pair(const Item& item) const { return group_of(item).num_splits == 2; }
  // By thread 0: counts this split as done.
  __device__ __forceinline__ void claim(const Item& item) const {
    shared_.is_second[item.is_first ? 0 : 1] = atom_add_relaxed_gpu(&counters(group_of(item))->arrived, 1) == 1;
  }
  // Once all threads know of claim(): whether the other split's state is to be added to this one's.
  __device__ __forceinline__ bool is_second(const Item& item) const { return shared_.is_second[item.is_first ? 0 : 1]; }
  // By thread 0, when all threads have written the state of the first of two.
  __device__ __forceinline__ void publish(const Item& item) const {
    red_add_release_gpu(&counters(group_of(item))->settled, 1);
  }
  // By all threads of the second: returns when the other state is in memory, which is on its way.
  __device__ __forceinline__ void await_other(const Item& item) const {
    const u32* settled = &counters(group_of(item))->settled;
    while (__any_sync(0xffffffffu, ld_acquire_gpu(settled) == 0)) {
    }
  }
  // By thread 0 of the second, when all have returned from await_other().
  __device__ __forceinline__ void reset(const Item& item) const { *counters(group_of(item)) = {0, 0}; }
  __device__ __forceinline__ i32 other_slot(const Item& item) const {
    const SplitGroup& group = group_of(item);
    return group.slot(1 - (block_.worker - group.first_worker));
  }

  // Where the cells of a split's partial state go, and the row pairs' softmax references (x, y) and row sums (z, w).
  __device__ __forceinline__ float4* partial_cells(i32 slot) const {
    return reinterpret_cast<float4*>(params_.partial_out) + index_of_block(params_, block_, slot) * Cells::kCells;
  }
  __device__ __forceinline__ float4* partial_sums(i32 slot) const {
    return reinterpret_cast<float4*>(params_.partial_sums) + index_of_block(params_, block_, slot) * Cells::kRowPairs;
  }

  // When all threads have written all partial states of the worker: merges its slices of the sequences that it shares
  // with more than one other. Arrivals wait until then as well: the others, whose work is as long, have no use for them
  // earlier, and the fence before an arrival would hold up the items after it.
  __device__ __forceinline__ void run() const {
    barrier_cta_sync(kBarrier, kThreads);
    const SplitGroup first = shared_.groups[0], last = shared_.groups[1];
    const bool merges_first = first.num_splits > 2,
               merges_last = last.num_splits > 2 && last.sequence != first.sequence;
    bool was_last[2] = {false, false};
    if (threadIdx.x == 0) {
      if (merges_first) was_last[0] = arrive(first);
      if (merges_last) was_last[1] = arrive(last);
    }
#pragma unroll 1
    for (u32 i = 0; i < 2; ++i) {
      if (i == 0 ? merges_first : merges_last) merge_group(shared_.groups[i], i == 0 ? was_last[0] : was_last[1]);
    }
  }

 private:
  static constexpr i32 kUnitCells = 8;  // slices begin at multiples of these
  // Splits or cells that a thread loads at once: a merge waits on L2, not on arithmetic.
  static constexpr i32 kInFlight = 8;

  // A merged state of some splits, relative to `top`.
  struct alignas(32) State {
    float4 sum;
    float2 total;
    float2 top;
  };

  const DecodeParams& params_;
  const Block& block_;
  MergeShared& shared_;
  const RowTable& rows_;
  State* scratch_;

  __device__ __forceinline__ MergeCounters* counters(const SplitGroup& group) const {
    return reinterpret_cast<MergeCounters*>(params_.merge_counters) +
           index_of_block(params_, block_, group.first_worker);
  }
  __device__ __forceinline__ volatile u32* abandoned(const SplitGroup& group, i32 split) const {
    return params_.merge_abandoned + index_of_block(params_, block_, group.slot(split));
  }

  // Thread 0: whether this was the last split of the sequence to arrive.
  __device__ __forceinline__ bool arrive(const SplitGroup& group) const {
    return atom_add_acq_rel_gpu(&counters(group)->arrived, 1) + 1 == u32(group.num_splits);
  }

  // This worker's slice, and, as the last to arrive (known to thread 0), what others have abandoned.
  __device__ __forceinline__ void merge_group(const SplitGroup& group, bool was_last) const {
    if (threadIdx.x == 0) shared_.turn = was_last ? Turn::kMergeLast : wait_for_splits(group);
    barrier_cta_sync(kBarrier, kThreads);
    const Turn turn = shared_.turn;
    const i32 own = block_.worker - group.first_worker;
    i32 split = turn == Turn::kAbandon ? group.num_splits : own;
#pragma unroll 1
    while (split < group.num_splits) {
      merge_slice(group, split);
      if (turn != Turn::kMergeLast) break;
      if (split == own) {
        if (threadIdx.x == 0) shared_.settled = wait_until_settled(group);
        split = -1;
      }
      barrier_cta_sync(kBarrier, kThreads);
      if (shared_.settled < kAbandoned) break;
      do {
        ++split;
      } while (split < group.num_splits && *abandoned(group, split) == 0);
    }
    barrier_cta_sync(kBarrier, kThreads);  // shared_ and flags have been read
    if (turn != Turn::kMergeLast) return;
    if (threadIdx.x == 0) *counters(group) = {0, 0};
    if (shared_.settled < kAbandoned) return;
    for (i32 s = i32(threadIdx.x); s < group.num_splits; s += i32(kThreads)) *abandoned(group, s) = 0;
  }

  // Thread 0 of a worker that was not the last: waits for the others, and settles.
  __device__ __forceinline__ Turn wait_for_splits(const SplitGroup& group) const {
    MergeCounters* shared_counters = counters(group);
    const long long start = clock64();
    while (ld_acquire_gpu(&shared_counters->arrived) != u32(group.num_splits)) {
      if (clock64() - start < params_.merge_patience_cycles) continue;
      *abandoned(group, block_.worker - group.first_worker) = 1;
      red_add_release_gpu(&shared_counters->settled, 1 + kAbandoned);
      return Turn::kAbandon;
    }
    red_add_relaxed_gpu(&shared_counters->settled, 1);
    return Turn::kMerge;
  }

  // Thread 0 of the last to arrive.
  __device__ __forceinline__ u32 wait_until_settled(const SplitGroup& group) const {
    u32 settled;
    do {
      settled = ld_acquire_gpu(&counters(group)->settled);
    } while (settled % kAbandoned != u32(group.num_splits - 1));
    return settled;
  }

  // A split's slice: a stretch of this block's cells.
  __device__ __forceinline__ void merge_slice(const SplitGroup& group, i32 split) const {
    const i32 rows = params_.seq_len_q * params_.heads_per_kv - block_.row_block * i32(Cells::kRows);
    const i32 units = Cells::row_pairs(max(0, min(rows, i32(Cells::kRows)))) * (Cells::kCellsPerPair / kUnitCells);
    const i32 begin = split * units / group.num_splits * kUnitCells;
    const i32 end = (split + 1) * units / group.num_splits * kUnitCells;
    if (group.num_splits <= 4) {
      merge_few<4>(group, begin, end);
    } else if (group.num_splits <= 8) {
      merge_few<8>(group, begin, end);
    } else {
      merge_many(group, begin, end);
    }
  }

  // Splits [first, first + kCount) of a cell as far as they lie below `end`; absent ones weigh nothing.
  template <i32 kCount>
  struct Loaded {
    float4 part[kCount];
    float4 sums[kCount];

    __device__ __forceinline__ void load(const SplitMerge& merge, const SplitGroup& group, i32 first, i32 end,
                                         i32 cell) {
      // From one split to the next it is two slots, but for the first, which may be its worker's last item.
      const u32 blocks = merge.params_.blocks_per_worker, slot_of_first = group.slot(0),
                slot = 2 * u32(group.first_worker + first);
      const float4* cells = merge.partial_cells(0) + Cells::memory_index(cell);
      const float4* pairs = merge.partial_sums(0) + cell / Cells::kCellsPerPair;
#pragma unroll
      for (i32 i = 0; i < kCount; ++i) {
        const u32 index = (first + i == 0 ? slot_of_first : slot + 2 * i) * blocks;
        const bool exists = first + i < end;
        part[i] = exists ? __ldcg(cells + u64(index) * Cells::kCells) : float4{};
        sums[i] = exists ? __ldcg(pairs + u64(index) * Cells::kRowPairs) : float4{-infinity(), -infinity(), 0.f, 0.f};
      }
    }
    __device__ __forceinline__ State state() const {
      State state = {{}, {}, {sums[0].x, sums[0].y}};
#pragma unroll
      for (i32 i = 1; i < kCount; ++i) state.top = {fmaxf(state.top.x, sums[i].x), fmaxf(state.top.y, sums[i].y)};
      const float2 base = {finite_or_zero(state.top.x), finite_or_zero(state.top.y)};
#pragma unroll
      for (i32 i = 0; i < kCount; ++i) {
        add_scaled(state, {ex2(sums[i].x - base.x), ex2(sums[i].y - base.y)}, part[i], {sums[i].z, sums[i].w});
      }
      return state;
    }
  };

  // At most kSplits splits: a thread handles several cells at once.
  template <i32 kSplits>
  __device__ __forceinline__ void merge_few(const SplitGroup& group, i32 begin, i32 end) const {
    constexpr i32 kCells = 2 * kInFlight / kSplits;
#pragma unroll 1
    for (i32 base = begin + i32(threadIdx.x); base < end; base += i32(kThreads) * kCells) {
      Loaded<kSplits> loaded[kCells];
#pragma unroll
      for (i32 c = 0; c < kCells; ++c) {
        const i32 cell = base + c * i32(kThreads);
        loaded[c].load(*this, group, 0, cell < end ? group.num_splits : 0, cell);
      }
#pragma unroll
      for (i32 c = 0; c < kCells; ++c) {
        const i32 cell = base + c * i32(kThreads);
        if (cell < end) write(group, cell, loaded[c].state());
      }
    }
  }

  // Many splits: few cells a slice, so that threads share a cell, each for a stretch of the splits ("part").
  __device__ __forceinline__ void merge_many(const SplitGroup& group, i32 begin, i32 end) const {
    const i32 count = end - begin, num_splits = group.num_splits;
    i32 parts = 1;
    while (2 * parts * count <= i32(kThreads) && 2 * parts <= num_splits) parts *= 2;
    const i32 splits_per_part = (num_splits + parts - 1) / parts;
    const i32 part = parts > 1 ? i32(threadIdx.x) / max(count, 1) : 0;
    const i32 first = part * splits_per_part, end_split = part < parts ? min(first + splits_per_part, num_splits) : 0;
#pragma unroll 1
    for (i32 cell = begin + i32(threadIdx.x) - part * count; cell < end; cell += i32(kThreads)) {
      State merged = {{}, {}, {-infinity(), -infinity()}};
#pragma unroll 1
      for (i32 split = first; split < end_split; split += kInFlight) {
        Loaded<kInFlight> loaded;
        loaded.load(*this, group, split, end_split, cell);
        merged = joined(merged, loaded.state());
      }
      if (parts == 1) {
        write(group, cell, merged);
      } else {
        scratch_[threadIdx.x] = merged;
        break;
      }
    }
    if (parts == 1) return;
    barrier_cta_sync(kBarrier, kThreads);
    if (i32(threadIdx.x) < count) {
      const State* states = scratch_ + threadIdx.x;
      State merged = {{}, {}, states->top};
      for (i32 p = 1; p < parts; ++p) {
        merged.top = {fmaxf(merged.top.x, states[p * count].top.x), fmaxf(merged.top.y, states[p * count].top.y)};
      }
      const float2 base = {finite_or_zero(merged.top.x), finite_or_zero(merged.top.y)};
#pragma unroll 4
      for (i32 p = 0; p < parts; ++p) {
        const State& state = states[p * count];
        add_scaled(merged, {ex2(state.top.x - base.x), ex2(state.top.y - base.y)}, state.sum, state.total);
      }
      write(group, begin + i32(threadIdx.x), merged);
    }
    barrier_cta_sync(kBarrier, kThreads);  // scratch_ is free again
  }

  __device__ __forceinline__ static void add_scaled(State& to, float2 weight, const float4& sum, float2 total) {
    to.sum.x += weight.x * sum.x;
    to.sum.y += weight.x * sum.y;
    to.sum.z += weight.y * sum.z;
    to.sum.w += weight.y * sum.w;
    to.total.x += weight.x * total.x;
    to.total.y += weight.y * total.y;
  }
  __device__ __forceinline__ static State joined(const State& a, const State& b) {
    const float2 top = {fmaxf(a.top.x, b.top.x), fmaxf(a.top.y, b.top.y)};
    const float2 base = {finite_or_zero(top.x), finite_or_zero(top.y)};
    State state = {{}, {}, top};
    add_scaled(state, {ex2(a.top.x - base.x), ex2(a.top.y - base.y)}, a.sum, a.total);
    add_scaled(state, {ex2(b.top.x - base.x), ex2(b.top.y - base.y)}, b.sum, b.total);
    return state;
  }

  // One cell of out, and lse once for each row.
  __device__ __forceinline__ void write(const SplitGroup& group, i32 cell, const State& state) const {
    const i32 pair = cell / Cells::kCellsPerPair;
    write_row(group, cell, Cells::first_row(pair), state.sum.x, state.sum.y, state.total.x, state.top.x);
    write_row(group, cell, Cells::second_row(pair), state.sum.z, state.sum.w, state.total.y, state.top.y);
  }
  __device__ __forceinline__ void write_row(const SplitGroup& group, i32 cell, u32 row, float low, float high,
                                            float total, float top) const {
    const i32 out_row = rows_.out_row[row];
    if (out_row < 0) return;
    const float inverse = total == 0.f ? 0.f : rcp(total);
    const i64 first_row = i64(group.sequence) * params_.seq_len_q * params_.num_heads;
    Cells::store(params_.out + (first_row + out_row) * kHeadDimV, cell,
                 cvt_pack<Element>(low * inverse, high * inverse));
    if (cell % Cells::kCellsPerPair != 0) return;
    params_.lse[first_row + rows_.lse_row[row]] = total == 0.f ? -infinity() : (top + log2f(total)) * kLn2;
  }
};
