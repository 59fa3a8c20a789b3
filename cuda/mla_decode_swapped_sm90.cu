// Split-KV decode of multi-head latent attention for few query rows: tokens, then latent columns on the M side of the
// matrix units, query rows ("heads") on N. Nothing is padded to 64 rows.
//
//   S^T = K Q^T * softmax_scale      K: 64 cache rows x 576 (512 latent + 64 rope), Q: 16 or 32 query rows
//   out^T = V^T softmax(S)^T         V: the first 512 columns of the same cache rows
//   lse = log sum exp(S)
//
// Grid: row blocks x KV heads x workers. A worker walks its items of the split schedule (schedule.cuh); an item that
// covers its whole sequence writes out and lse, splits are merged as merge.cuh says, in the same launch. With many
// heads at a small batch, two row blocks form a cluster: each CTA loads half of every tile and multicasts it to both.
// The partial states stay small, and L2 has half as much to deliver.
//
// Roles (384 threads):
//   warpgroup 0   224 registers  one half of K Q^T's reduction, softmax of half of the rows, columns   0-255 of O
//   warpgroup 1   224 registers  the other half,                the other rows,              columns 256-511 of O
//   warp 8         56 registers  TMA loads of K tiles (V is the same bytes)
//   warps 9-11     56 registers  Q of the next item; warp 9 is the herald of merge.cuh as well, warp 11 hands the first
//                                tile over (first_tile.cuh)
//
// Barriers:
//   q_full            96 arrivals    Q loaders -> both groups: Q of this item, not the first, is in place
//   q_empty            8 (warps)     both groups -> Q loaders: the last K Q^T of the item has read Q
//   kv_full[s][p]      1 + bytes     TMA, or warp 11 -> both groups: part p of the tile in stage s has landed
//   kv_empty[s][h]     4 (warps)     group h of every CTA of the cluster -> TMA: O += V^T P has read its half of the
//                      a CTA         latent columns in stage s (and both groups' K Q^T all of the stage, before P)
//   begun              1             herald -> TMA warp: the previous kernel has ended
//   first_tile.*                     first_tile.cuh
//   kGroup+g          named, 128     within group g: row maxima exchanged
//   kScores           named, 256     both groups: halves of K Q^T exchanged; P of the tile before has been read
//   kProbabilities    named, 256     both groups: P is complete, V past the end is cleared, what was exchanged has been
//                                    read; and a vote: has some P outgrown its reference
//   kSums             named, 256     both groups: row sums of the item exchanged
//   kMerge            named, 256     both groups: the first item's Q, which they load themselves, is in place; merges
//                                    of more than two splits
//   merge.ready        1             herald -> both groups: who shares the worker's items (merge.cuh)
//   merge.claimed[i]   1             herald -> both groups: which of two splits comes second (first item 0, last 1)
//
// Schedule of a tile, by both groups together:
//   1  K Q^T over half of each part's columns, as the parts land
//   2  give the other group its rows' half, add up the own rows' halves: S^T
//   3  softmax: P = exp2(S^T - reference), to shared memory as [row][token]. The reference of a row is its maximum over
//      the first tile and moves only when some P outgrows its slack: then maxima are taken again and O is rescaled
//   4  O += V^T P, half of the latent columns
//   5  release that half of the stage
//
// So a tile is done with in half the time that one group would take, and its stage is soon free; at the end both groups
// hold half of the item's columns, to be written. Before (each group took every other tile, and the groups exchanged
// halves of O at the end) it took 9 % longer at b=1, h_q=16, 4K. Row sums are collected under the last O += V^T P.
//
// What limits it (H100, 2026-11-23): at large batch, memory, of which some SMs get a sixth more than others. A call of
// one tile a worker (b=1, h_q=16, 4K) takes 6.5 us: 1.8 from the previous kernel's end until the tile is there, 1.0 for
// scores and softmax, 0.3 for O and the sums, 0.4 to write the state, 2.0 to merge, 1.0 to end. Most of it goes to
// instructions that are executed once: fewer of them are what made it faster.
#include "cells.cuh"
#include "cluster.cuh"
#include "layout.cuh"
#include "merge.cuh"
#include "params.cuh"
#include "pipeline.cuh"
#include "roles.cuh"
#include "softmax.cuh"
#include "work.cuh"

using Element = MLA_ELEMENT;
using Cells = HeadsOnN<kTileRows>;
using Cell = Cells::Cell;

constexpr u32 kRowGroups = kTileRows / 8;
constexpr u32 kOwnRows = kTileRows / kConsumerGroups;  // whose softmax a group does
constexpr u32 kOwnRowGroups = kOwnRows / 8;
constexpr u32 kAccumulators = kTileRows / 2;  // a thread's share of 64 x kTileRows
constexpr u32 kThreadRows = kTileRows / 4;    // query rows that a thread has accumulators of
constexpr u32 kOwnThreadRows = kOwnRows / 4;  // and scores, once both halves are added up
constexpr u32 kOwnColumns = kHeadDimV / kConsumerGroups;  // of the latent, which a group has of O
constexpr u32 kOwnChunks = kOwnColumns / kChunkColumns;
constexpr u32 kRowCells = kOwnChunks / Cells::kCellChunks;  // of a row, a thread's in a partial state
constexpr u32 kOwnSteps = kStepsPerChunk / kConsumerGroups;  // of each chunk, which a group has of K Q^T
constexpr u32 kRowChunkBytes = kTileRows * kChunkRowBytes;   // 64 columns of all query rows

static_assert(kTileRows % (8 * kConsumerGroups) == 0, "a group has whole row groups");
static_assert(kTileTokens == kChunkRows && kTileTokens == kChunkColumns, "a chunk holds a tile's tokens");
static_assert(kHalves == kConsumerGroups, "a group hands back the half that it reads as V");

struct SharedPlan {
  alignas(1024) u16 q[kChunks][kTileRows * kChunkColumns];
  alignas(1024) u16 kv[kStages][kChunks][kTileTokens * kChunkColumns];
  alignas(1024) u16 p[kTileRows * kTileTokens];
  union {
    float4 scores[kOwnRowGroups][kWarpThreads];  // from each warp to its peer in the other group
    uint4 out[kOwnChunks][2][16];                // 16 rows of the result in 16 bits, on their way to memory
  } exchange[kConsumerGroups][kGroupWarps];
  float maxima[kConsumerGroups][kGroupWarps][kOwnRows];  // over a warp's tokens
  float factors[kTileRows];                              // of O, after a reference has moved
  float sums[2][kGroupWarps][kTileRows];                 // by parity of the item, so that the next may write already
  float references[2][kTileRows];
  RowTable rows;
  MergeShared merge;
  RoleBarriers barriers;
};
static_assert(sizeof(SharedPlan) <= MLA_SHARED_BYTES, "mlacore/params.py asks for less shared memory");

enum NamedBarrier : u32 { kGroup = 1, kScores = kGroup + kConsumerGroups, kProbabilities, kSums, kMerge };
using Merge = SplitMerge<Element, Cells, kConsumerThreads, kMerge>;

// ---- consumers -----------------------------------------------------------------------------------------------------

// One warpgroup. Score and accumulator fragments: elements 4 j .. 4 j + 3 are rows 8 j + 2 q, + 1 at token (column) i,
// then both at token (column) i + 8, with q = lane % 4 and i = fragment_row(thread). Arrays over a thread's rows are
// indexed 2 j + (row % 2).
struct Consumer {
  SharedPlan& shared;
  const DecodeParams& params;
  const u32 group;
  const u32 thread = threadIdx.x % kWarpgroupThreads;
  const u32 lane = threadIdx.x % kWarpThreads;
  const u32 warp = thread / kWarpThreads;
  const i32 num_rows;  // that exist from the CTA's first one on

  float out[kOwnChunks][kAccumulators];
  float products[kAccumulators];    // of all rows, over this group's share of the columns
  float scores[kAccumulators / 2];  // of the own rows
  float reference[kOwnThreadRows];  // of the own rows, scaled; `out` and `sum` are relative to it
  float sum[kOwnThreadRows];        // over this thread's tokens
  float lse[kThreadRows];           // of the item, in base 2
  float scale[kThreadRows];         // what its `out` is to be multiplied by

  __device__ __forceinline__ Consumer(SharedPlan& s, const DecodeParams& p, const Block& block, u32 g)
      : shared(s), params(p), group(g), num_rows(block.num_rows(p)) {}

  __device__ __forceinline__ u32 row_of(u32 i) const { return i / 2 * 8 + lane % 4 * 2 + i % 2; }
  __device__ __forceinline__ u32 own_row_of(u32 i) const { return group * kOwnRows + row_of(i); }

  // 1
  __device__ __forceinline__ void multiply(const Tile& tile) {
    const u64 k = k_major_descriptor(shared_address(shared.kv[tile.stage])) + group * kOwnSteps * kKMajorStep;
    const u64 q = k_major_descriptor(shared_address(shared.q)) + group * kOwnSteps * kKMajorStep;
    wgmma_fence();
#pragma unroll 1
    for (u32 part = 0; part < kParts; ++part) {  // not unrolled: the first time, instructions are slow to come
      wait_phase(shared_address(&shared.barriers.kv_full[tile.stage][part]), tile.phase);
#pragma unroll
      for (u32 i = 0; i < kPartChunks; ++i) {
        const u32 chunk = part * kPartChunks + i;
#pragma unroll
        for (u32 step = 0; step < kOwnSteps; ++step) {
          wgmma_m64k16_ss<Element>(products, k + chunk * (kChunkBytes / 16) + step * kKMajorStep,
                                   q + chunk * (kRowChunkBytes / 16) + step * kKMajorStep, part + i + step > 0);
        }
      }
      wgmma_commit_group();  // behind the loop it would take an idle WGMMA
    }
    wgmma_wait_group<0>();
    keep_order(products);
  }

  // 2
  __device__ __forceinline__ void exchange_products() {
#pragma unroll
    for (u32 j = 0; j < kOwnRowGroups; ++j) {
      const auto given = [&](u32 e) { return group == 0 ? products[kAccumulators / 2 + e] : products[e]; };
      shared.exchange[group][warp].scores[j][lane] = {given(4 * j), given(4 * j + 1), given(4 * j + 2),
                                                      given(4 * j + 3)};
    }
    bar_sync(kScores, kConsumerThreads);
#pragma unroll
    for (u32 j = 0; j < kOwnRowGroups; ++j) {
      const float4 cell = shared.exchange[1 - group][warp].scores[j][lane];
      const float from[4] = {cell.x, cell.y, cell.z, cell.w};
#pragma unroll
      for (u32 e = 0; e < 4; ++e) {
        const u32 i = 4 * j + e;
        scores[i] = (group == 0 ? products[i] : products[kAccumulators / 2 + i]) + from[e];
      }
    }
  }

  __device__ __forceinline__ void mask(const Tile& tile) {
    const i32 token = i32(fragment_row(thread));
#pragma unroll
    for (u32 i = 0; i < kOwnThreadRows; ++i) {
      const i32 limit = tile.valid_tokens - shared.rows.hidden_tokens[own_row_of(i)];
      if (token >= limit) scores[i / 2 * 4 + i % 2] = -infinity();
      if (token + 8 >= limit) scores[i / 2 * 4 + i % 2 + 2] = -infinity();
    }
  }

  // Row maxima (scaled) over the tile's tokens and what the references stand for; the sums follow, O is to.
  __device__ __forceinline__ void renew_reference() {
    float (&maxima)[kGroupWarps][kOwnRows] = shared.maxima[group];
#pragma unroll
    for (u32 i = 0; i < kOwnThreadRows; ++i) {
      const float top = lanes_max<4, 8>(fmaxf(scores[i / 2 * 4 + i % 2], scores[i / 2 * 4 + i % 2 + 2]));
      if (lane < 4) maxima[warp][row_of(i)] = top * params.softmax_scale_log2;
    }
    bar_sync(kGroup + group, kWarpgroupThreads);
    float tops[kOwnThreadRows];
#pragma unroll
    for (u32 i = 0; i < kOwnThreadRows; ++i) {
      tops[i] = reference[i];
#pragma unroll
      for (u32 w = 0; w < kGroupWarps; ++w) tops[i] = fmaxf(tops[i], maxima[w][row_of(i)]);
    }
#pragma unroll
    for (u32 i = 0; i < kOwnThreadRows; ++i) {
      const float factor = rescale_factor(reference[i], tops[i]);
      sum[i] *= factor;
      reference[i] = tops[i];
      if (warp == 0 && lane < 4) shared.factors[own_row_of(i)] = factor;
    }
  }

  // P of the own rows into shared memory; true if some of it has left the slack of its reference.
  __device__ __forceinline__ bool exponentiate(float (&tile_sum)[kOwnThreadRows]) {
    u32 packed[kOwnRowGroups][2];  // P of tokens i (0) and i + 8 (1), two rows each
    bool outgrown = false;
#pragma unroll
    for (u32 j = 0; j < kOwnRowGroups; ++j) {
      float p[4];
#pragma unroll
      for (u32 k = 0; k < 4; ++k) {
        p[k] = ex2(fmaf(scores[4 * j + k], params.softmax_scale_log2, -finite_or_zero(reference[2 * j + k % 2])));
      }
#pragma unroll
      for (u32 i = 0; i < 2; ++i) {
        tile_sum[2 * j + i] = p[i] + p[i + 2];
        outgrown |= tile_sum[2 * j + i] > kReferenceSlack || reference[2 * j + i] == -infinity();
        packed[j][i] = cvt_pack<Element>(p[2 * i], p[2 * i + 1]);
      }
    }
    const u32 destination = shared_address(shared.p), cell = 2 * warp + lane / 8 % 2;
#pragma unroll
    for (u32 j = 0; j < kOwnRowGroups; j += 2) {
      const u32 row = group * kOwnRows + 8 * j + lane % 8;
      if (j + 1 < kOwnRowGroups) {
        stmatrix_x4_trans(destination + swizzled_offset(row + lane / 16 * 8, cell), packed[j][0], packed[j][1],
                          packed[j + 1][0], packed[j + 1][1]);
      } else {
        stmatrix_x2_trans(destination + swizzled_offset(row, cell), packed[j][0], packed[j][1]);
      }
    }
    fence_proxy_async();
    return outgrown;
  }

  // 3. The vote on the references is both groups': O has all rows.
  __device__ __forceinline__ void softmax(const Tile& tile, bool is_first) {
    clear_tokens<kOwnChunks, kWarpgroupThreads>(shared_address(shared.kv[tile.stage][group * kOwnChunks]),
                                                tile.valid_tokens, thread);
    if (tile.needs_mask) mask(tile);
    float tile_sum[kOwnThreadRows];
    bool renews = is_first;
#pragma unroll 1
    while (true) {  // twice at most
      if (renews) renew_reference();
      const bool outgrown = exponentiate(tile_sum);
      // All have written P, and cleared V.
      if (!bar_red_or(kProbabilities, kConsumerThreads, outgrown) || renews) break;
      renews = true;
    }
#pragma unroll
    for (u32 i = 0; i < kOwnThreadRows; ++i) sum[i] += tile_sum[i];
    if (renews && !is_first) {
#pragma unroll
      for (u32 i = 0; i < kThreadRows; ++i) {
        const float factor = shared.factors[row_of(i)];
#pragma unroll
        for (u32 c = 0; c < kOwnChunks; ++c) {
          out[c][i / 2 * 4 + i % 2] *= factor;
          out[c][i / 2 * 4 + i % 2 + 2] *= factor;
        }
      }
    }
  }

  // 4
  __device__ __forceinline__ void start_out(const Tile& tile) {
    const u64 v = n_major_descriptor(shared_address(shared.kv[tile.stage][group * kOwnChunks]));
    const u64 p = k_major_descriptor(shared_address(shared.p));
#pragma unroll
    for (u32 c = 0; c < kOwnChunks; ++c) keep_order(out[c]);
    wgmma_fence();
#pragma unroll
    for (u32 step = 0; step < kStepsPerTile; ++step) {
#pragma unroll
      for (u32 c = 0; c < kOwnChunks; ++c) {
        wgmma_m64k16_ts<Element>(out[c], v + c * (kChunkBytes / 16) + step * kNMajorStep, p + step * kKMajorStep);
      }
    }
    wgmma_commit_group();
  }

  // 5
  __device__ __forceinline__ void finish_out() {
    wgmma_wait_group<0>();
#pragma unroll
    for (u32 c = 0; c < kOwnChunks; ++c) keep_order(out[c]);
  }
  __device__ __forceinline__ void release_half(const Tile& tile) {
    release_stage<kClusterCtas>(shared_address(&shared.barriers.kv_empty[tile.stage][group]), lane);
  }

  __device__ __forceinline__ void release_q() {
    if (lane == 0) mbarrier_arrive(shared_address(&shared.barriers.q_empty));
  }

  // Leaves the last O += V^T P to be finished: the row sums are collected meanwhile.
  __device__ __forceinline__ void attend(const Tiles& tiles) {
    if (tiles.count == 0) {
      shared.barriers.first_tile.await_landing();  // the stages may be scratch of a merge next
      release_q();
    }
#pragma unroll 1
    for (i32 t = 0; t < tiles.count; ++t) {
      finish_out();
      if (t > 0) release_half(tiles[t - 1]);
      const Tile tile = tiles[t];
      multiply(tile);
      if (t + 1 == tiles.count) release_q();
      exchange_products();
      softmax(tile, t == 0);
      start_out(tile);
    }
  }

  // `lse` and `scale` of the item: the row sums over all threads that hold scores of a row.
  __device__ __forceinline__ void finish_sums(u32 item_parity) {
    float (&sums)[kGroupWarps][kTileRows] = shared.sums[item_parity];
    float (&references)[kTileRows] = shared.references[item_parity];
#pragma unroll
    for (u32 i = 0; i < kOwnThreadRows; ++i) {
      const float total = lanes_sum<4, 8>(sum[i]);
      if (lane < 4) sums[warp][own_row_of(i)] = total;
      if (warp == 0 && lane < 4) references[own_row_of(i)] = reference[i];
    }
    bar_sync(kSums, kConsumerThreads);
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
      const u32 row = row_of(i);
      const float total = (sums[0][row] + sums[1][row]) + (sums[2][row] + sums[3][row]);
      lse[i] = log_sum_exp(references[row], total);
      scale[i] = inverse_sum(total);
    }
  }

  __device__ __forceinline__ bool writes_lse() const { return group == 0 && warp == 0 && lane < 4; }

  struct PartialState {
    uint4* cells;  // this thread's first one
    uint4* lses;
    u32 mark;
  };
  __device__ __forceinline__ PartialState partial_state(const Merge& merge, i32 slot) const {
    return {merge.partial_cells(slot) + Cells::memory_index(group, thread), merge.partial_lses(slot), merge.mark()};
  }

  // Of row 8 j + 2 q + e the k-th accumulator: column i + 8 (k % 2) of chunk k / 2.
  __device__ __forceinline__ float accumulator(u32 j, u32 e, u32 k) const {
    return out[k / 2][4 * j + 2 * (k % 2) + e];
  }

  // Of row 8 j + 2 q + e, chunks kCellChunks * `chunks` of the group and on.
  __device__ __forceinline__ Cell cell(u32 j, u32 e, u32 chunks) const {
    float values[Cell::kValues];
#pragma unroll
    for (u32 k = 0; k < Cell::kValues; ++k) values[k] = accumulator(j, e, chunks * Cell::kValues + k);
    return {values, scale[2 * j + e]};
  }

  __device__ __forceinline__ void write_partial(const PartialState& to) const {
#pragma unroll
    for (u32 j = 0; j < kRowGroups; ++j) {
      if (i32(row_of(2 * j)) >= num_rows) break;
#pragma unroll
      for (u32 e = 0; e < 2; ++e) {
#pragma unroll
        for (u32 c = 0; c < kRowCells; ++c) {
          st_global_16(to.cells + Cells::begin_of(j, e, c), cell(j, e, c).packed(to.mark));
        }
      }
      if (writes_lse()) st_global_16(to.lses + 4 * j + lane, pack_lse(lse[2 * j], lse[2 * j + 1], to.mark));
    }
  }

  // The result of the item: of this state, or of its sum with the other of two splits. 16 rows at a time.
  template <bool kAddsOther>
  __device__ __forceinline__ void write_final(const Item& item, const PartialState& other) {
    const i64 first_row = first_row_of(params, item.sequence);
    uint4 (&staged)[kOwnChunks][2][16] = shared.exchange[group][warp].out;
#pragma unroll
    for (u32 j = 0; j < kRowGroups; j += 2) {
      uint4 pairs[2], parts[4][kRowCells];  // the other state's, index 2 k + e for row group j + k
      if constexpr (kAddsOther) {
        bool is_there;
        Watchdog watchdog;
        do {
          watchdog.turn();
          is_there = true;
#pragma unroll
          for (u32 k = 0; k < 2; ++k) pairs[k] = ld_relaxed_gpu_16(other.lses + 4 * (j + k) + lane % 4);
#pragma unroll
          for (u32 i = 0; i < 4; ++i) {
#pragma unroll
            for (u32 c = 0; c < kRowCells; ++c) {
              parts[i][c] = ld_relaxed_gpu_16(other.cells + Cells::begin_of(j + i / 2, i % 2, c));
            }
          }
#pragma unroll
          for (u32 i = 0; i < 4; ++i) {
            bool has_row = is_marked_lse(pairs[i / 2], other.mark);
#pragma unroll
            for (u32 c = 0; c < kRowCells; ++c) has_row = has_row && is_marked<Cell>(parts[i][c], other.mark);
            is_there = is_there && (has_row || i32(row_of(2 * (j + i / 2))) >= num_rows);
          }
        } while (!__all_sync(0xffffffffu, is_there));
      }
      float values[4][2 * kOwnChunks];
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        float row_lse = lse[2 * j + i];
        if constexpr (kAddsOther) {
          const SumOfTwo both(row_lse, unpack_lse(pairs[i / 2], i % 2));
          row_lse = both.lse;
#pragma unroll
          for (u32 c = 0; c < kRowCells; ++c) {
            float sums[Cell::kValues];
            both.add(cell(j + i / 2, i % 2, c), Cell(parts[i][c]), sums);
#pragma unroll
            for (u32 k = 0; k < Cell::kValues; ++k) values[i][c * Cell::kValues + k] = sums[k];
          }
        } else {
#pragma unroll
          for (u32 k = 0; k < 2 * kOwnChunks; ++k) {
            values[i][k] = accumulator(j + i / 2, i % 2, k) * scale[2 * j + i];
          }
        }
        const u32 row = row_of(2 * j + i);
        if (writes_lse() && shared.rows.out_row[row] >= 0) {
          params.lse[first_row + shared.rows.lse_row[row]] = row_lse * kLn2;
        }
      }
      __syncwarp();  // what was staged before has been read
#pragma unroll
      for (u32 c = 0; c < kOwnChunks; ++c) {
        u32 packed[4];  // index 2 k + h: columns i + 8 h of two rows
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
          const u32 k = i / 2 * 2, at = 2 * c + i % 2;
          packed[i] = cvt_pack<Element>(values[k][at], values[k + 1][at]);
        }
        stmatrix_x4_trans(shared_address(&staged[c][lane / 8 % 2][lane / 16 * 8 + lane % 8]), packed[0], packed[1],
                          packed[2], packed[3]);
      }
      __syncwarp();
      // Two lanes write 16 neighbouring columns of a row.
      const i32 out_row = shared.rows.out_row[8 * j + lane / 2];
      if (out_row < 0) continue;
      u16* const to = params.out + (first_row + out_row) * kHeadDimV + group * kOwnColumns;
#pragma unroll
      for (u32 c = 0; c < kOwnChunks; ++c) {
        *reinterpret_cast<uint4*>(to + c * kChunkColumns + warp * 16 + lane % 2 * 8) = staged[c][lane % 2][lane / 2];
      }
    }
    __syncwarp();  // the next item's products go where this was staged
  }
};

__device__ __forceinline__ MergeTask consume(SharedPlan& shared, const DecodeParams& params, const Block& block,
                                             WorkerItems& items, const Merge& merge, u32 group_index) {
  Consumer group(shared, params, block, group_index);
  Item item;
  MergeTask task;
  u32 tiles_before = 0, num_items = 0;
  items.next(item);
  do {
#pragma unroll
    for (u32 i = 0; i < kOwnThreadRows; ++i) {
      group.reference[i] = -infinity();
      group.sum[i] = 0.f;
    }
#pragma unroll
    for (u32 c = 0; c < kOwnChunks; ++c) {
#pragma unroll
      for (u32 i = 0; i < kAccumulators; ++i) group.out[c][i] = 0.f;
    }
    const Tiles tiles(params, block, item, tiles_before);
    await_query<kMerge>(shared.barriers, num_items);
    group.attend(tiles);
    tiles_before += u32(tiles.count);
    group.finish_sums(num_items++ % 2);
    merge.await_groups();
    task = merge.task(item.is_first);
    const bool is_split = merge.is_split(item);
    const auto own_state = group.partial_state(merge, merge.own_slot(item));
    group.finish_out();
    if (tiles.count > 0) group.release_half(tiles[tiles.count - 1]);
    if (!is_split) {
      group.write_final<false>(item, {});
    } else if (merge.adds_other(item)) {
      group.write_final<true>(item, group.partial_state(merge, merge.other_slot(item.is_first)));
    } else {
      group.write_partial(own_state);
    }
  } while (items.next(item));
  return task;
}

// ---- kernel --------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(kThreads, 1) __cluster_dims__(kClusterCtas, 1, 1)
    mla_decode_swapped_sm90(const __grid_constant__ TensorMap kv_map, const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  SharedPlan& shared = *reinterpret_cast<SharedPlan*>(dynamic_shared);
  const Block block = {i32(blockIdx.z), i32(blockIdx.y), i32(blockIdx.x)};
  // The stages serve as scratch once nothing is loaded into them any more.
  const Merge merge(params, block, shared.merge, shared.rows, reinterpret_cast<unsigned char*>(shared.kv));

  run_roles(shared, &kv_map, params, block, merge, [&](WorkerItems& items) {
    return consume(shared, params, block, items, merge, __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0));
  });
}
