// Split-KV decode of multi-head latent attention, query rows ("heads") on the M side of the matrix units.
//
//   S = Q K^T * softmax_scale        Q: 64 query rows x 576, K: the cache rows (512 latent + 64 rope)
//   out = softmax(S) V               V: the first 512 columns of the same cache rows
//   lse = log sum exp(S)
//
// Grid: row blocks (of 64 query rows) x KV heads x workers: CTAs that want the same pages run side by side. With an
// even number of row blocks two of them form a cluster: each loads half of every tile and multicasts it to both, which
// halves what L2 has to deliver, and may prefetch a later tile to L2. A worker walks its items of the split schedule
// (schedule.cuh); an item that covers its whole sequence writes out and lse, splits are merged as merge.cuh says, in
// the same launch.
//
// Roles (384 threads):
//   warpgroup 0       224 registers  even tiles: S, softmax, P; columns   0-255 of O for all tiles
//   warpgroup 1       224 registers  odd tiles:  S, softmax, P; columns 256-511 of O for all tiles
//   warp 8             56 registers  TMA loads of K tiles (V is the same bytes)
//   warps 9-11         56 registers  Q of the next item; warp 9 is the herald of merge.cuh as well, warp 11 hands the
//                                    first tile over (first_tile.cuh)
//
// Barriers:
//   q_full            96 arrivals    Q loaders -> both groups: Q of this item, not the first, is in place
//   q_empty            8 (warps)     both groups -> Q loaders: last QK^T of the item has read Q
//   kv_full[s][p]      1 + bytes     TMA, or warp 11 -> owner of the tile: part p of the tile in stage s has landed
//   kv_empty[s][h]     4 (warps)     group h of every CTA of the cluster -> TMA: it has done O += P V of its half of
//                      a CTA         stage s, and all else that it does with the stage
//   begun              1             herald -> TMA warp: the previous kernel has ended
//   first_tile.*                     first_tile.cuh
//   kProbabilities+s  named, 256     owner -> peer: P and the references of the tile in stage s are in shared memory,
//                                    and all of V past the sequence's end is cleared
//   kGroup+g          named, 128     within group g
//   kSums             named, 256     both groups: row sums of the item exchanged
//   kMerge            named, 256     both groups: the first item's Q, which they load themselves, is in place; merges
//                                    of more than two splits
//   merge.ready        1             herald -> both groups: who shares the worker's items (merge.cuh)
//   merge.claimed[i]   1             herald -> both groups: which of two splits comes second (first item 0, last 1)
//
// Schedule of a pair of tiles (a: even, b: odd). Half of O fits one group's registers, so the groups share its columns
// and each needs the other's P:
//   group 0                                       group 1
//   1  S_a = Q K_a^T                              1  S_b = Q K_b^T, once its stage is loaded
//   2  softmax of S_a                             2  take P_a
//   3  O += P_a V_a (P in registers)              3  O += P_a V_a (P in shared memory), meanwhile
//   4  publish P_a                                4  softmax of S_b
//   5  release a's left half                      5  release a's right half
//   6  take P_b, O += P_b V_b (shared memory)     6  O += P_b V_b (registers)
//   1' S_a' of the next pair behind it            7  publish P_b
//   8  release b's left half                      8  release b's right half
// Softmax a runs under QK^T b, softmax b under P_a V_a, the load of each stage under the work on the other. The softmax
// reference passes from tile to tile in order, whichever group owns the tile, so that both halves of O see the same
// factors.
//
// P of an even tile overlays its rope chunk, which only QK^T reads: shared memory has room for one P beside Q and two
// stages, and the odd tile's is the one that the other group waits for. Not overlaid, it needs no barrier of its group:
// with taking P_a before S_b is complete, +6 % at b=128, s_q=2, s_k=16K on an H100.
//
// Both groups run one copy of what ends an item, not unrolled over a thread's two rows, and the even tiles have no tail
// behind their loop: instructions take part in the race. With a copy a group and a tail it was 10 % slower at b=128,
// s_q=1, s_k=4K; unrolled, 18 % at b=8 of mixed lengths, where few workers add up two splits, and each waited 14 us for
// instructions that nobody had used before it.
//
// What limits it (H100, b=128, h_q=128): power. In `make bench` (2026-11-23) a tile takes 2686 cycles at s_q=2, s_k=16K
// and 2466 at 32K, of which the tensor cores need 2176 (81 and 88 %), but at 1.4 to 1.5 GHz: the 700 W limit is reached
// in every case from 4K on, and at b=1, 128K; a matrix product and a load-only kernel together take more energy than a
// call does. At s_q=1, 16K it is 2761 cycles at 1.4 GHz and 86 % of what loading alone takes. Below the limit, the loop
// of a stage is the longest chain: its release until all parts have landed, 400 cycles for the rest of QK^T, 700 for
// the softmax (next to the other group's WGMMAs it issues at half its rate), then both halves of P V and their
// hand-over. At s_q=1 the pages come from memory and not from L2; the prefetch takes most of that back. An item's end
// costs a worker as much as 4 to 5 tiles, which the schedule allows for.
//
// At batch 1, 32K (26 us; 28 with the stamps that tell this) the first tile is there 2.4 us after the previous kernel
// has ended. From then on it is memory, which delivers 3 TB/s: the last tile lands at 14 and has been attended to at
// 14.1 to 16.4 (memory serves some SMs sooner), the state is written 1.8 later, and merged at 21.8: all wait for the
// slowest. What was tried without gain stands in the CHANGELOG.
#include "cells.cuh"
#include "cluster.cuh"
#include "epilogue.cuh"
#include "layout.cuh"
#include "merge.cuh"
#include "params.cuh"
#include "pipeline.cuh"
#include "roles.cuh"
#include "softmax.cuh"
#include "work.cuh"

using Element = MLA_ELEMENT;
using Cell = HeadsOnM::Cell;

constexpr u32 kGroupColumns = kHeadDimV / kConsumerGroups;
constexpr u32 kGroupChunks = kGroupColumns / kChunkColumns;
constexpr u32 kGroupCells = kGroupColumns / HeadsOnM::kCellColumns;  // of a row, a thread's in a partial state
constexpr u32 kRopeChunk = kChunks - 1;

static_assert(kTileRows == 64, "WGMMA works on 64 rows");
static_assert(kTileTokens == kChunkRows && kTileTokens == kChunkColumns, "a chunk holds a tile's tokens, or its P");
static_assert(kHeadDimV == kRopeChunk * kChunkColumns, "the rope chunk follows the latent");
static_assert(kGroupColumns == 256, "one WGMMA covers a group's columns");

struct SharedPlan {
  alignas(1024) u16 q[kChunks][kTileRows * kChunkColumns];
  alignas(1024) u16 kv[kStages][kChunks][kTileTokens * kChunkColumns];
  alignas(1024) u16 p_odd[kTileRows * kTileTokens];  // P of odd tiles; P of even tiles lies in kv[stage][kRopeChunk]
  float row_reference[kStages][kTileRows];           // softmax reference that P of the tile in this stage has
  float row_sum[2][kConsumerGroups][kTileRows];      // by parity of the item, so that the next may write already
  RowTable rows;
  MergeShared merge;
  RoleBarriers barriers;
};
static_assert(sizeof(SharedPlan) <= MLA_SHARED_BYTES, "mlacore/params.py asks for less shared memory");

enum NamedBarrier : u32 {
  kGroup = 1,
  kProbabilities = kGroup + kConsumerGroups,
  kSums = kProbabilities + kStages,
  kMerge
};
using Merge = SplitMerge<Element, HeadsOnM, kConsumerThreads, kMerge>;

// ---- consumers -----------------------------------------------------------------------------------------------------

// One warpgroup: its half of O, its tiles' softmax. Step numbers are those of the schedule at the top. What belongs to
// the tiles is compiled for each group, the rest for both.
struct Consumer {
  SharedPlan& shared;
  const DecodeParams& params;
  const Block& block;
  const u32 group;
  // By a shuffle, so that it stays in its register: the compiler would read threadIdx.x again within the loops (1 %).
  const u32 thread = __shfl_sync(0xffffffffu, threadIdx.x, threadIdx.x % kWarpThreads) % kWarpgroupThreads;
  const u32 lane = thread % kWarpThreads;
  const u32 row = fragment_row(thread);

  float out[kGroupColumns / 2];  // O fragment: 64 x 256 over 128 threads
  float scores[kTileTokens / 2];
  u32 probabilities[kTileTokens / 4];
  RowPair reference;  // of the online softmax (softmax.cuh); `out` and `sum` are relative to it
  RowPair sum;        // this thread's share of the sums over its own tiles

  __device__ __forceinline__ Consumer(SharedPlan& s, const DecodeParams& p, const Block& b, u32 g)
      : shared(s), params(p), block(b), group(g) {}

  // Scores of parts [kBegin, kEnd) of the tile's columns, each a committed group.
  template <u32 kBegin, u32 kEnd>
  __device__ __forceinline__ void start_scores(const Tile& tile) {
    const u64 q = k_major_descriptor(shared_address(shared.q));
    const u64 k = k_major_descriptor(shared_address(shared.kv[tile.stage]));
    wgmma_fence();
#pragma unroll 1
    for (u32 part = kBegin; part < kEnd; ++part) {  // not unrolled: the first time, instructions are slow to come
      wait_phase(shared_address(&shared.barriers.kv_full[tile.stage][part]), tile.phase);
#pragma unroll
      for (u32 i = 0; i < kPartChunks; ++i) {
#pragma unroll
        for (u32 step = 0; step < kStepsPerChunk; ++step) {
          const u64 at = (part * kPartChunks + i) * (kChunkBytes / 16) + step * kKMajorStep;
          wgmma_m64n64k16_ss<Element>(scores, q + at, k + at, part + i + step > 0);
        }
      }
      wgmma_commit_group();  // behind the loop it would take an idle WGMMA
    }
  }

  // Both the scores and the earlier O update are complete; `scores` may be read.
  __device__ __forceinline__ void finish_scores() {
    wgmma_wait_group<0>();
    keep_order(scores);
  }

  // The O update is complete; `out` may be rescaled.
  __device__ __forceinline__ void finish_out() {
    wgmma_wait_group<0>();
    keep_order(out);
  }

  // Softmax of the own tile, into `probabilities`. Leaves O to be rescaled.
  __device__ __forceinline__ RowPair own_softmax(const Tile& tile, bool is_first) {
    if (tile.needs_mask) {
      i32 limit[2];
#pragma unroll
      for (u32 i = 0; i < 2; ++i) {
        limit[i] = tile.valid_tokens - shared.rows.hidden_tokens[row + 8 * i];
      }
      mask_scores(scores, fragment_column(thread), limit);
    }
    const float scale_log2 = params.softmax_scale_log2;
    RowPair factors = {1.f, 1.f}, tile_sum;
    bool renews = is_first;
#pragma unroll 1
    while (true) {  // twice at most
      if (renews) {
        const RowPair updated = new_reference(thread_max(scores), reference, scale_log2);
        factors = rescale_factors(reference, updated);
        reference = updated;
      }
      tile_sum = exponentiate<Element>(scores, probabilities, reference, scale_log2);
      if (renews || !needs_new_reference(tile_sum, reference)) break;
      renews = true;
    }
#pragma unroll
    for (u32 i = 0; i < 2; ++i) sum.r[i] = sum.r[i] * factors.r[i] + tile_sum.r[i];
    return factors;
  }

  // P of the own tile and its references to the peer.
  template <u32 kGroupIndex>
  __device__ __forceinline__ void publish_probabilities(const Tile& tile) {
    // All four warps have read the rope chunk (their QK^T is complete) before any writes P_a over it. P_b's buffer is
    // free because its last reader has released the stage that this tile was loaded into.
    if constexpr (kGroupIndex == 0) bar_sync(kGroup + kGroupIndex, kWarpgroupThreads);
    const u32 p = shared_address(kGroupIndex == 0 ? shared.kv[tile.stage][kRopeChunk] : shared.p_odd);
    const u32 p_row = thread / 32 * 16 + lane % 16;
#pragma unroll
    for (u32 step = 0; step < kStepsPerTile; ++step) {
      stmatrix_x4(p + swizzled_offset(p_row, 2 * step + lane / 16), probabilities[4 * step],
                  probabilities[4 * step + 1], probabilities[4 * step + 2], probabilities[4 * step + 3]);
    }
    if (lane % 4 == 0) {
      shared.row_reference[tile.stage][row] = reference.r[0];
      shared.row_reference[tile.stage][row + 8] = reference.r[1];
    }
    fence_proxy_async();
    bar_arrive(kProbabilities + tile.stage, kConsumerThreads);
  }

  // Waits for the peer's P and takes over its references. Leaves O to be rescaled.
  __device__ __forceinline__ RowPair take_probabilities(const Tile& tile) {
    bar_sync(kProbabilities + tile.stage, kConsumerThreads);
    const RowPair updated = {shared.row_reference[tile.stage][row], shared.row_reference[tile.stage][row + 8]};
    const RowPair factors = rescale_factors(reference, updated);
    reference = updated;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) sum.r[i] *= factors.r[i];
    return factors;
  }

  // Most tiles leave the references of a whole warp as they were. No WGMMA may be in flight here: the compiler would
  // wait for all of them before ordinary instructions that write accumulators.
  __device__ __forceinline__ void rescale_out(const RowPair& factors) {
    if (!__any_sync(0xffffffffu, factors.r[0] != 1.f || factors.r[1] != 1.f)) return;
#pragma unroll
    for (u32 i = 0; i < kGroupColumns / 2; ++i) out[i] *= factors.r[(i / 2) % 2];
  }

  // All of V of the own tile, for both groups: the peer comes to it after P.
  __device__ __forceinline__ void clear_past_end(const Tile& tile) {
    if (clear_tokens<kRopeChunk, kWarpgroupThreads>(shared_address(shared.kv[tile.stage]), tile.valid_tokens, thread)) {
      bar_sync(kGroup + group, kWarpgroupThreads);
    }
  }

  // O += P V with P of the own tile, from registers.
  template <u32 kGroupIndex>
  __device__ __forceinline__ void start_own_out(const Tile& tile) {
    clear_past_end(tile);
    const u64 v = n_major_descriptor(shared_address(shared.kv[tile.stage][kGroupIndex * kGroupChunks]));
    keep_order(out);
    wgmma_fence();
#pragma unroll
    for (u32 step = 0; step < kStepsPerTile; ++step) {
      wgmma_m64n256k16_rs<Element>(out, probabilities[4 * step], probabilities[4 * step + 1],
                                   probabilities[4 * step + 2], probabilities[4 * step + 3], v + step * kNMajorStep);
    }
    wgmma_commit_group();
  }

  // O += P V with P of the peer's tile, from shared memory.
  template <u32 kGroupIndex>
  __device__ __forceinline__ void start_peer_out(const Tile& tile) {
    const u64 p =
        k_major_descriptor(shared_address(kGroupIndex == 1 ? shared.kv[tile.stage][kRopeChunk] : shared.p_odd));
    const u64 v = n_major_descriptor(shared_address(shared.kv[tile.stage][kGroupIndex * kGroupChunks]));
    keep_order(out);
    wgmma_fence();
#pragma unroll
    for (u32 step = 0; step < kStepsPerTile; ++step) {
      wgmma_m64n256k16_ss<Element>(out, p + step * kKMajorStep, v + step * kNMajorStep);
    }
    wgmma_commit_group();
  }

  __device__ __forceinline__ void release_q() {
    if (lane == 0) mbarrier_arrive(shared_address(&shared.barriers.q_empty));
  }

  template <u32 kGroupIndex>
  __device__ __forceinline__ void release_half(const Tile& tile) {
    release_stage<kClusterCtas>(shared_address(&shared.barriers.kv_empty[tile.stage][kGroupIndex]), lane);
  }

  // Even tiles are this group's own. The tile of one pair is scored behind the O update of the pair before.
  __device__ __forceinline__ void attend_even(const Tiles& tiles) {
    start_scores<0, kParts>(tiles[0]);  // 1
    finish_scores();
#pragma unroll 1
    for (i32 a = 0;; a += 2) {
      const Tile even = tiles[a], odd = tiles[a + 1], next = tiles[a + 2];
      const bool has_next = a + 2 < tiles.count;
      if (!has_next) release_q();
      rescale_out(own_softmax(even, a == 0));  // 2
      start_own_out<0>(even);                  // 3
      publish_probabilities<0>(even);          // 4
      finish_out();
      release_half<0>(even);  // 5
      if (a + 1 >= tiles.count) break;
      rescale_out(take_probabilities(odd));
      start_peer_out<0>(odd);  // 6
      if (!has_next) {
        finish_out();
        release_half<0>(odd);
        break;
      }
      // 1': one part keeps the tensor cores fed while the O update is awaited
      start_scores<0, 1>(next);
      wgmma_wait_group<1>();
      keep_order(out);
      release_half<0>(odd);  // 8
      start_scores<1, kParts>(next);
      finish_scores();
    }
  }

  // Odd tiles are this group's own.
  __device__ __forceinline__ void attend_odd(const Tiles& tiles) {
    i32 a = 0;
    for (; a + 1 < tiles.count; a += 2) {
      const Tile even = tiles[a], odd = tiles[a + 1];
      start_scores<0, kParts>(odd);                           // 1
      const RowPair peer_factors = take_probabilities(even);  // 2
      finish_scores();
      if (a + 3 >= tiles.count) release_q();
      rescale_out(peer_factors);
      start_peer_out<1>(even);                          // 3
      const RowPair factors = own_softmax(odd, false);  // 4
      finish_out();
      release_half<1>(even);  // 5
      rescale_out(factors);
      start_own_out<1>(odd);          // 6
      publish_probabilities<1>(odd);  // 7
      finish_out();
      release_half<1>(odd);  // 8
    }
    if (tiles.count == 1) release_q();
    if (a < tiles.count) {
      const Tile even = tiles[a];
      rescale_out(take_probabilities(even));
      start_peer_out<1>(even);
      finish_out();
      release_half<1>(even);
    }
  }

  // Row sums over both groups' tiles; then out and lse, or a partial state when the sequence is split.
  __device__ __forceinline__ void write_item(const Item& item, u32 item_parity, const Merge& merge) {
    const bool is_split = merge.is_split(item);
    float (&sums)[kConsumerGroups][kTileRows] = shared.row_sum[item_parity];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const float group_sum = lanes_sum<1, 4>(sum.r[i]);
      if (lane % 4 == 0) sums[group][row + 8 * i] = group_sum;
    }
    barrier_cta_sync(kSums, kConsumerThreads);
    float lse[2], scale[2];  // the former in base 2
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const float total = sums[0][row + 8 * i] + sums[1][row + 8 * i];
      lse[i] = log_sum_exp(reference.r[i], total);
      scale[i] = inverse_sum(total);
    }
    if (is_split && !merge.adds_other(item)) {
      const i32 slot = merge.own_slot(item);
      write_partial(merge.partial_cells(slot), merge.partial_lses(slot), lse, scale, merge.mark());
    } else if (is_split) {
      const i32 slot = merge.other_slot(item.is_first);
      write_sum(item, merge.partial_cells(slot), merge.partial_lses(slot), lse, scale, merge.mark());
    } else {
#pragma unroll 1
      for (u32 i = 0; i < 2; ++i) {
        store_row_16bit<Element>(out_row(item, i), out, i, of_row(scale, i), exists(i));
        write_lse(item, i, of_row(lse, i));
      }
    }
  }

  // Loops over the thread's two rows are not unrolled in what follows: a worker comes here once or twice, and waits for
  // the instructions.
  __device__ __forceinline__ static float of_row(const float (&values)[2], u32 i) {
    return i == 0 ? values[0] : values[1];
  }
  __device__ __forceinline__ bool exists(u32 i) const { return shared.rows.out_row[row + 8 * i] >= 0; }

  // The accumulators of row i of the thread in cell `c` of its group.
  __device__ __forceinline__ Cell cell(u32 i, u32 c, float scale) const {
    float values[Cell::kValues];
    take_columns(out, i, c, values);
    return {values, scale};
  }

  __device__ __forceinline__ void write_partial(uint4* cells, uint4* lses, const float (&lse)[2],
                                                const float (&scale)[2], u32 mark) {
    if (group == 0 && lane % 4 == 0 && exists(0)) {
      st_global_16(lses + HeadsOnM::pair_of(thread), pack_lse(lse[0], lse[1], mark));
    }
#pragma unroll 1
    for (u32 i = 0; i < 2; ++i) {
      if (!exists(i)) continue;
      uint4* const own_cells = cells + HeadsOnM::memory_index(group * kGroupCells, i, thread);
#pragma unroll
      for (u32 c = 0; c < kGroupCells; ++c) {
        st_global_16(own_cells + HeadsOnM::memory_index(c, 0, 0), cell(i, c, of_row(scale, i)).packed(mark));
      }
    }
  }

  // The sum of this state and the other of two splits. It does not go through the accumulators, which would serialise
  // the WGMMAs: what writes them must not stand in a branch.
  __device__ __forceinline__ void write_sum(const Item& item, const uint4* cells, const uint4* lses,
                                            const float (&lse)[2], const float (&scale)[2], u32 mark) {
    constexpr u32 kPartCells = 4;  // on their way at once: as many as there are registers for
#pragma unroll 1
    for (u32 i = 0; i < 2; ++i) {
      const uint4* const other_cells = cells + HeadsOnM::memory_index(group * kGroupCells, i, thread);
      u16* const to = out_row(item, i) + lane % 4 * 8;
      const bool row_exists = exists(i);
      SumOfTwo both;
#pragma unroll
      for (u32 first = 0; first < kGroupCells; first += kPartCells) {
        uint4 pair, parts[kPartCells];
        bool is_there;
        Watchdog watchdog;
        do {
          watchdog.turn();
          if (first == 0) pair = ld_relaxed_gpu_16(lses + HeadsOnM::pair_of(thread));
#pragma unroll
          for (u32 c = 0; c < kPartCells; ++c) {
            parts[c] = ld_relaxed_gpu_16(other_cells + HeadsOnM::memory_index(first + c, 0, 0));
          }
          is_there = first > 0 || is_marked_lse(pair, mark);
#pragma unroll
          for (u32 c = 0; c < kPartCells; ++c) is_there = is_there && is_marked<Cell>(parts[c], mark);
        } while (!__all_sync(0xffffffffu, is_there || !row_exists));
        if (first == 0) {
          both = {of_row(lse, i), unpack_lse(pair, i)};
          write_lse(item, i, both.lse);
        }
#pragma unroll
        for (u32 c = 0; c < kPartCells; ++c) {
          float sums[Cell::kValues];
          both.add(cell(i, first + c, of_row(scale, i)), Cell(parts[c]), sums);
          const uint4 packed = pack_columns_16bit<Element>(sums, 1.f);
          if (row_exists) *reinterpret_cast<uint4*>(to + (first + c) * HeadsOnM::kCellColumns) = packed;
        }
      }
    }
  }

  // This group's columns of row i of the thread in out; of no use if the row does not exist.
  __device__ __forceinline__ u16* out_row(const Item& item, u32 i) const {
    const i64 first_row = first_row_of(params, item.sequence);
    return params.out + (first_row + shared.rows.out_row[row + 8 * i]) * kHeadDimV + group * kGroupColumns;
  }

  __device__ __forceinline__ void write_lse(const Item& item, u32 i, float lse) const {
    if (group != 0 || lane % 4 != 0 || !exists(i)) return;
    const i64 first_row = first_row_of(params, item.sequence);
    params.lse[first_row + shared.rows.lse_row[row + 8 * i]] = lse * kLn2;
  }
};

__device__ __forceinline__ MergeTask consume(SharedPlan& shared, const DecodeParams& params, const Block& block,
                                             WorkerItems& items, const Merge& merge, u32 group_index) {
  Consumer group(shared, params, block, group_index);
  Item item;
  u32 tiles_before = 0, num_items = 0;
  items.next(item);
  do {
    group.sum = {0.f, 0.f};
#pragma unroll
    for (u32 i = 0; i < kGroupColumns / 2; ++i) group.out[i] = 0.f;
    const Tiles tiles(params, block, item, tiles_before);
    await_query<kMerge>(shared.barriers, num_items);
#pragma unroll
    for (u32 i = 0; i < 2; ++i) group.reference.r[i] = group.exists(i) ? -infinity() : kAbsentReference;
    if (tiles.count == 0) {
      shared.barriers.first_tile.await_landing();  // the stages may be scratch of a merge next
      group.release_q();
    } else if (group_index == 0) {
      group.attend_even(tiles);
    } else {
      group.attend_odd(tiles);
    }
    tiles_before += u32(tiles.count);
    merge.await_groups();
    group.write_item(item, num_items++ % 2, merge);
  } while (items.next(item));
  return merge.task(item.is_first);
}

// ---- kernel --------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(kThreads, 1) __cluster_dims__(kClusterCtas, 1, 1)
    mla_decode_sm90(const __grid_constant__ TensorMap kv_map, const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  SharedPlan& shared = *reinterpret_cast<SharedPlan*>(dynamic_shared);
  const Block block = {i32(blockIdx.z), i32(blockIdx.y), i32(blockIdx.x)};
  // The stages serve as scratch once nothing is loaded into them any more.
  const Merge merge(params, block, shared.merge, shared.rows, reinterpret_cast<unsigned char*>(shared.kv));

  run_roles(shared, &kv_map, params, block, merge, [&](WorkerItems& items) {
    // The shuffle tells the compiler that warps do not diverge there; without it, it serialises the WGMMAs.
    return consume(shared, params, block, items, merge, __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0));
  });
}
