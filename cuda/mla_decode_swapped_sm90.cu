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
//   warpgroup 0   224 registers  even tiles of an item, all of O; then columns   0-255 of both groups' sum
//   warpgroup 1   224 registers  odd tiles of an item, all of O;  then columns 256-511 of both groups' sum
//   warp 8         56 registers  TMA loads of K tiles (V is the same bytes)
//   warps 9-11     56 registers  Q of the next item; warp 9 is the herald of merge.cuh as well
//
// Barriers:
//   q_full            96 arrivals    Q loaders -> both groups: Q of this item, not the first, is in place
//   q_empty            8 (warps)     both groups -> Q loaders: the group's last K Q^T of the item has read Q
//   kv_full[s][p]      1 + bytes     TMA -> owner of the tile: part p of the tile in stage s has landed
//   kv_empty[s][h]     4 (warps)     owner of the tile in every CTA of the cluster -> TMA: O += V^T P has read half h
//                      a CTA         of the latent columns in stage s
//   kGroup+g          named, 128     within group g: maxima and P exchanged, results staged
//   kStates           named, 256     both groups: halves of their states of the item exchanged; the exchange is free
//   kMerge            named, 256     both groups: the first item's Q, which they load themselves, is in place; merges
//                                    of more than two splits
//   merge.ready        1             herald -> both groups: who shares the worker's items
//   merge.claimed[i]   1             herald -> both groups: which of two splits comes second (first item 0, last 1)
//
// Schedule of a tile (each group for itself; the two take turns at the matrix units):
//   1  S^T = K Q^T, part by part as they land
//   2  softmax: P = exp2(S^T - reference), to shared memory as [row][token]. The reference of a row is its maximum over
//      the first tile and moves only when some P outgrows its slack: then maxima are taken again and O is rescaled
//   3  O += V^T P
//   4  release the stage, half by half
//
// A row's scores lie across the warps of a group, so its sum is collected once, at the end of an item. Then the groups
// exchange halves of their O, so that each ends up with half of the item's columns, and writes them. (With 16 rows and
// no more than one tile, group 0 does not share: the exchange would take longer.)
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

constexpr u32 kLatentChunks = kHeadDimV / kChunkColumns;
constexpr u32 kRowChunkBytes = kTileRows * kChunkRowBytes;  // 64 columns of all query rows
constexpr u32 kRowGroups = kTileRows / 8;
constexpr u32 kAccumulators = kTileRows / 2;                // a thread's share of 64 x kTileRows
constexpr u32 kThreadRows = kTileRows / 4;                  // query rows that a thread holds scores of
constexpr u32 kHalfChunks = kLatentChunks / kHalves;
constexpr u32 kOwnChunks = kLatentChunks / kConsumerGroups;  // that a group has of an item's state in the end
constexpr u32 kExchangeChunks = kTileRows == 16 ? 4 : 2;    // chunks of O that a group gives away at once
constexpr bool kMayStayAlone = kTileRows == 16;             // with 32 rows it would spill
constexpr u32 kOutPitchBytes = kHeadDimV * 2 + kCellBytes;  // of a row of `exchange.out`: 8 rows hit different banks

static_assert(kTileRows == 16 || kTileRows == 32, "O fits one group's registers");
static_assert(kTileTokens == kChunkRows && kTileTokens == kChunkColumns, "a chunk holds a tile's tokens");

struct SharedPlan {
  alignas(1024) u16 q[kChunks][kTileRows * kChunkColumns];
  alignas(1024) u16 kv[kStages][kChunks][kTileTokens * kChunkColumns];
  alignas(1024) u16 p[kConsumerGroups][kTileRows * kTileTokens];
  union {
    float4 state[kConsumerGroups][kExchangeChunks * kRowGroups][kWarpgroupThreads];  // from each group to the other
    unsigned char out[kTileRows * kOutPitchBytes];  // the result in 16 bits, on its way to memory
  } exchange;
  float maxima[kConsumerGroups][kGroupWarps][kTileRows];  // over a warp's tokens
  float sums[kConsumerGroups][kGroupWarps][kTileRows];
  float references[kConsumerGroups][kTileRows];
  RowTable rows;
  MergeShared merge;
  u64 q_full;
  u64 q_empty;
  u64 kv_full[kStages][kParts];
  u64 kv_empty[kStages][kHalves];
};
static_assert(sizeof(SharedPlan) <= MLA_SHARED_BYTES, "mlacore/params.py asks for less shared memory");

enum NamedBarrier : u32 { kGroup = 1, kStates = kGroup + kConsumerGroups, kMerge };
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

  float out[kLatentChunks][kAccumulators];
  float scores[kAccumulators];
  float reference[kThreadRows];  // scaled; `out` and `sum` are relative to it
  float sum[kThreadRows];        // over this thread's tokens
  float lse[kThreadRows];        // of the item, in base 2
  float scale[kThreadRows];      // what its `out` is to be multiplied by
  u32 first_chunk;               // of those that this group writes next
  bool is_alone;                 // at most one tile: the other group has nothing

  __device__ __forceinline__ Consumer(SharedPlan& s, const DecodeParams& p, u32 g) : shared(s), params(p), group(g) {}

  __device__ __forceinline__ u32 row_of(u32 i) const { return i / 2 * 8 + lane % 4 * 2 + i % 2; }

  // 1
  __device__ __forceinline__ void score(const Tile& tile) {
    const u64 k = k_major_descriptor(shared_address(shared.kv[tile.stage]));
    const u64 q = k_major_descriptor(shared_address(shared.q));
    wgmma_fence();
#pragma unroll 1
    for (u32 part = 0; part < kParts; ++part) {  // not unrolled: the first time, instructions are slow to come
      wait_phase(shared_address(&shared.kv_full[tile.stage][part]), tile.phase);
#pragma unroll
      for (u32 i = 0; i < kPartChunks; ++i) {
        const u32 chunk = part * kPartChunks + i;
#pragma unroll
        for (u32 step = 0; step < kStepsPerChunk; ++step) {
          wgmma_m64k16_ss<Element>(scores, k + chunk * (kChunkBytes / 16) + step * kKMajorStep,
                                   q + chunk * (kRowChunkBytes / 16) + step * kKMajorStep, part + i + step > 0);
        }
      }
    }
    wgmma_commit_group();
    wgmma_wait_group<0>();
    keep_order(scores);
  }

  __device__ __forceinline__ void mask(const Tile& tile) {
    const i32 token = i32(fragment_row(thread));
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
      const i32 limit = tile.valid_tokens - shared.rows.hidden_tokens[row_of(i)];
      if (token >= limit) scores[i / 2 * 4 + i % 2] = -infinity();
      if (token + 8 >= limit) scores[i / 2 * 4 + i % 2 + 2] = -infinity();
    }
  }

  // Row maxima (scaled) over the group's tokens and what the references stand for; O and the sums follow.
  __device__ __forceinline__ void renew_reference(bool has_state) {
    float (&maxima)[kGroupWarps][kTileRows] = shared.maxima[group];
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
      float top = fmaxf(scores[i / 2 * 4 + i % 2], scores[i / 2 * 4 + i % 2 + 2]);
#pragma unroll
      for (u32 offset = 4; offset < kWarpThreads; offset *= 2)
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
      if (lane < 4) maxima[warp][row_of(i)] = top * params.softmax_scale_log2;
    }
    bar_sync(kGroup + group, kWarpgroupThreads);
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
      float top = reference[i];
#pragma unroll
      for (u32 w = 0; w < kGroupWarps; ++w) top = fmaxf(top, maxima[w][row_of(i)]);
      if (has_state) {
        const float factor = ex2(reference[i] - finite_or_zero(top));
        sum[i] *= factor;
#pragma unroll
        for (u32 chunk = 0; chunk < kLatentChunks; ++chunk) {
          out[chunk][i / 2 * 4 + i % 2] *= factor;
          out[chunk][i / 2 * 4 + i % 2 + 2] *= factor;
        }
      }
      reference[i] = top;
    }
    bar_sync(kGroup + group, kWarpgroupThreads);  // maxima have been read
  }

  // P into shared memory; true if some of it has left the slack of its reference.
  __device__ __forceinline__ bool exponentiate(float (&tile_sum)[kThreadRows]) {
    u32 packed[kRowGroups]
              [2];  // token pairs lie in different registers: P of tokens i (0) and i + 8 (1), two rows each
    bool outgrown = false;
#pragma unroll
    for (u32 j = 0; j < kRowGroups; ++j) {
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
    const u32 destination = shared_address(shared.p[group]);
#pragma unroll
    for (u32 j = 0; j < kRowGroups; j += 2) {
      const u32 row = 8 * j + lane / 16 * 8 + lane % 8, cell = 2 * warp + lane / 8 % 2;
      stmatrix_x4_trans(destination + swizzled_offset(row, cell), packed[j][0], packed[j][1], packed[j + 1][0],
                        packed[j + 1][1]);
    }
    fence_proxy_async();
    return outgrown;
  }

  // 2
  __device__ __forceinline__ void softmax(const Tile& tile, bool is_first) {
    if (tile.needs_mask) mask(tile);
    if (!is_first) bar_sync(kGroup + group, kWarpgroupThreads);  // all warps' O += V^T P of the tile before have read P
    float tile_sum[kThreadRows];
    bool renews = is_first;
#pragma unroll 1
    while (true) {  // twice at most
      if (renews) renew_reference(!is_first);
      const bool outgrown = exponentiate(tile_sum);
      // All of the group have written P; the vote must be the group's, as is the reference.
      if (!bar_red_or(kGroup + group, kWarpgroupThreads, outgrown) || renews) break;
      renews = true;
    }
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) sum[i] += tile_sum[i];
  }

  // 3
  __device__ __forceinline__ void accumulate(const Tile& tile, bool is_first) {
    const u32 stage = shared_address(shared.kv[tile.stage]);
    if (clear_tokens<kLatentChunks, kWarpgroupThreads>(stage, tile.valid_tokens, thread)) {
      bar_sync(kGroup + group, kWarpgroupThreads);
    }
    const u64 v = n_major_descriptor(stage);
    const u64 p = k_major_descriptor(shared_address(shared.p[group]));
#pragma unroll
    for (u32 chunk = 0; chunk < kLatentChunks; ++chunk) keep_order(out[chunk]);
    wgmma_fence();
#pragma unroll
    for (u32 half = 0; half < kHalves; ++half) {
#pragma unroll
      for (u32 step = 0; step < kStepsPerTile; ++step) {
#pragma unroll
        for (u32 chunk = half * kHalfChunks; chunk < (half + 1) * kHalfChunks; ++chunk) {
          wgmma_m64k16_ts<Element>(out[chunk], v + chunk * (kChunkBytes / 16) + step * kNMajorStep,
                                   p + step * kKMajorStep, step > 0 || !is_first);
        }
      }
      wgmma_commit_group();
    }
    finish_half<0>(tile);
  }

  // 4: half by half, as O += V^T P is done with it.
  template <u32 kHalf>
  __device__ __forceinline__ void finish_half(const Tile& tile) {
    wgmma_wait_group<kHalves - 1 - kHalf>();
#pragma unroll
    for (u32 chunk = kHalf * kHalfChunks; chunk < (kHalf + 1) * kHalfChunks; ++chunk) keep_order(out[chunk]);
    release_stage<kClusterCtas>(shared_address(&shared.kv_empty[tile.stage][kHalf]));
    if constexpr (kHalf + 1 < kHalves) finish_half<kHalf + 1>(tile);
  }
  __device__ __forceinline__ void release_q() {
    if (lane == 0) mbarrier_arrive(shared_address(&shared.q_empty));
  }

  // This group's tiles of an item.
  __device__ __forceinline__ void attend(const Tiles& tiles) {
    if (tiles.count <= i32(group)) release_q();
    for (i32 t = i32(group); t < tiles.count; t += i32(kConsumerGroups)) {
      const Tile tile = tiles[t];
      const bool is_first = t == i32(group);
      score(tile);
      if (t + i32(kConsumerGroups) >= tiles.count) release_q();
      softmax(tile, is_first);
      accumulate(tile, is_first);
    }
  }

  // The item's state from both groups' states, relative to the larger reference: `lse`, `scale` and `out`. Each group
  // gives half of its columns away and adds up the others, with whose chunks its `out` begins from here on.
  __device__ __forceinline__ void join_groups() {
    const u32 other_group = 1 - group;
    float own_factors[kThreadRows], other_factors[kThreadRows];
#pragma unroll
    for (u32 first = 0; first < kOwnChunks; first += kExchangeChunks) {
      barrier_cta_sync(kStates, kConsumerThreads);  // what was there before has been read
      if (first == 0) publish_sums();
#pragma unroll
      for (u32 c = 0; c < kExchangeChunks; ++c) {
#pragma unroll
        for (u32 j = 0; j < kRowGroups; ++j) {
          const auto given = [&](u32 i) { return group == 0 ? out[kOwnChunks + first + c][i] : out[first + c][i]; };
          shared.exchange.state[group][c * kRowGroups + j][thread] = {given(4 * j), given(4 * j + 1), given(4 * j + 2),
                                                                      given(4 * j + 3)};
        }
      }
      barrier_cta_sync(kStates, kConsumerThreads);
      if (first == 0) {
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
          const u32 row = row_of(i);
          const float other = shared.references[other_group][row], top = fmaxf(reference[i], other);
          own_factors[i] = ex2(reference[i] - finite_or_zero(top));
          other_factors[i] = ex2(other - finite_or_zero(top));
          reference[i] = top;
        }
      }
#pragma unroll
      for (u32 c = 0; c < kExchangeChunks; ++c) {
#pragma unroll
        for (u32 j = 0; j < kRowGroups; ++j) {
          const float4 cell = shared.exchange.state[other_group][c * kRowGroups + j][thread];
          const float from[4] = {cell.x, cell.y, cell.z, cell.w};
#pragma unroll
          for (u32 e = 0; e < 4; ++e) {
            const float kept = group == 0 ? out[first + c][4 * j + e] : out[kOwnChunks + first + c][4 * j + e];
            const u32 i = 2 * j + e % 2;
            out[first + c][4 * j + e] = kept * own_factors[i] + from[e] * other_factors[i];
          }
        }
      }
    }
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
      const u32 row = row_of(i);
      const float own = group_sum(group, row), other = group_sum(other_group, row);
      set_total(i, sum_of_products(own, own_factors[i], other, other_factors[i]));
    }
    first_chunk = group * kOwnChunks;
  }

  // Of an item with at most one tile, group 0 has all. It writes its columns in two halves, move_to_second_half()
  // between them.
  __device__ __forceinline__ void stay_alone() {
    barrier_cta_sync(kStates, kConsumerThreads);  // what was in the exchange before has been read
    if (group != 0) return;
    publish_sums();
    bar_sync(kGroup, kWarpgroupThreads);
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) set_total(i, group_sum(0, row_of(i)));
    first_chunk = 0;
  }
  __device__ __forceinline__ void move_to_second_half() {
#pragma unroll
    for (u32 c = 0; c < kOwnChunks; ++c) {
#pragma unroll
      for (u32 i = 0; i < kAccumulators; ++i) out[c][i] = out[kOwnChunks + c][i];
    }
    first_chunk = kOwnChunks;
  }

  __device__ __forceinline__ void set_total(u32 i, float total) {
    lse[i] = log_sum_exp(reference[i], total);
    scale[i] = inverse_sum(total);
  }

  // Row sums over each warp's tokens, and the references that they are relative to.
  __device__ __forceinline__ void publish_sums() {
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
      float total = sum[i];
#pragma unroll
      for (u32 offset = 4; offset < kWarpThreads; offset *= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
      if (lane < 4) shared.sums[group][warp][row_of(i)] = total;
      if (warp == 0 && lane < 4) shared.references[group][row_of(i)] = reference[i];
    }
  }
  __device__ __forceinline__ float group_sum(u32 of_group, u32 row) const {
    const float (&sums)[kGroupWarps][kTileRows] = shared.sums[of_group];
    return (sums[0][row] + sums[1][row]) + (sums[2][row] + sums[3][row]);
  }

  // Chunks [first_chunk, first_chunk + kOwnChunks) of the item, which `out` begins with by now.
  __device__ __forceinline__ void write(const Item& item, const Merge& merge) {
    if (!merge.is_split(item)) {
      write_final<false>(item, nullptr, nullptr, merge.launch());
    } else if (!merge.adds_other(item)) {
      const i32 slot = merge.own_slot(item);
      write_partial(merge.partial_cells(slot), merge.partial_lses(slot), merge.launch());
    } else {
      const i32 slot = merge.other_slot(item.is_first);
      write_final<true>(item, merge.partial_cells(slot), merge.partial_lses(slot), merge.launch());
    }
  }
  __device__ __forceinline__ bool writes_lse() const { return first_chunk == 0 && warp == 0 && lane < 4; }

  __device__ __forceinline__ void write_partial(uint4* cells, uint4* lses, u32 launch) const {
#pragma unroll
    for (u32 j = 0; j < kRowGroups; ++j) {
      if (shared.rows.out_row[row_of(2 * j)] < 0) break;
#pragma unroll
      for (u32 c = 0; c < kOwnChunks; ++c) {
        const float (&from)[kAccumulators] = out[c];
        st_global_16(cells + Cells::memory_index(first_chunk + c, j, thread),
                     pack_cell(from[4 * j] * scale[2 * j], from[4 * j + 2] * scale[2 * j],
                               from[4 * j + 1] * scale[2 * j + 1], from[4 * j + 3] * scale[2 * j + 1], launch));
      }
      if (writes_lse()) st_global_16(lses + 4 * j + lane, pack_lse(lse[2 * j], lse[2 * j + 1], launch));
    }
  }

  // The result of the item: of this state, or of its sum with the other of two splits.
  template <bool kAddsOther>
  __device__ __forceinline__ void write_final(const Item& item, const uint4* cells, const uint4* lses, u32 launch) {
    const i64 first_row = i64(item.sequence) * params.seq_len_q * params.num_heads;
    const u32 staged = shared_address(shared.exchange.out);
    if (!is_alone) barrier_cta_sync(kStates, kConsumerThreads);  // what was exchanged has been read
#pragma unroll
    for (u32 j = 0; j < kRowGroups; j += 2) {
      uint4 pairs[2], parts[kOwnChunks][2];  // the other state's
      if constexpr (kAddsOther) {
        bool is_there;
        Watchdog watchdog;
        do {
          watchdog.turn();
          is_there = true;
#pragma unroll
          for (u32 k = 0; k < 2; ++k) {
            pairs[k] = ld_relaxed_gpu_16(lses + 4 * (j + k) + lane % 4);
#pragma unroll
            for (u32 c = 0; c < kOwnChunks; ++c) {
              parts[c][k] = ld_relaxed_gpu_16(cells + Cells::memory_index(first_chunk + c, j + k, thread));
            }
          }
#pragma unroll
          for (u32 k = 0; k < 2; ++k) {
            bool has_pair = pairs[k].w == launch;
#pragma unroll
            for (u32 c = 0; c < kOwnChunks; ++c) has_pair = has_pair && parts[c][k].w == launch;
            is_there = is_there && (has_pair || shared.rows.out_row[row_of(2 * (j + k))] < 0);
          }
        } while (!__all_sync(0xffffffffu, is_there));
      }
      SumOfTwo both[4];
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        float row_lse = lse[2 * j + i];
        if constexpr (kAddsOther) {
          const float2 other = unpack_lse(pairs[i / 2]);
          both[i] = {row_lse, i % 2 == 0 ? other.x : other.y};
          row_lse = both[i].lse;
        }
        const u32 row = row_of(2 * j + i);
        if (writes_lse() && shared.rows.out_row[row] >= 0) {
          params.lse[first_row + shared.rows.lse_row[row]] = row_lse * kLn2;
        }
      }
#pragma unroll
      for (u32 c = 0; c < kOwnChunks; ++c) {
        u32 packed[4];
#pragma unroll
        for (u32 k = 0; k < 2; ++k) {
          float value[4];
#pragma unroll
          for (u32 e = 0; e < 4; ++e) value[e] = out[c][4 * (j + k) + e] * scale[2 * (j + k) + e % 2];
          if constexpr (kAddsOther) {
            const float4 part = unpack_cell(parts[c][k]);
            const float from[4] = {part.x, part.z, part.y, part.w};  // in the order of accumulators
#pragma unroll
            for (u32 e = 0; e < 4; ++e) value[e] = both[2 * k + e % 2].of(value[e], from[e]);
          }
          packed[2 * k] = cvt_pack<Element>(value[0], value[1]);
          packed[2 * k + 1] = cvt_pack<Element>(value[2], value[3]);
        }
        const u32 row = 8 * j + lane / 16 * 8 + lane % 8;
        const u32 column = (first_chunk + c) * kChunkColumns + warp * 16 + lane / 8 % 2 * 8;
        stmatrix_x4_trans(staged + row * kOutPitchBytes + column * 2, packed[0], packed[1], packed[2], packed[3]);
      }
    }
    bar_sync(kGroup + group, kWarpgroupThreads);
    constexpr u32 kCellsPerOwnRow = kOwnChunks * kCellsPerRow;
    const u32 first_column = first_chunk * kChunkColumns;
    for (u32 cell = thread; cell < kTileRows * kCellsPerOwnRow; cell += kWarpgroupThreads) {
      const u32 row = cell / kCellsPerOwnRow, column = first_column + cell % kCellsPerOwnRow * 8;
      const i32 out_row = shared.rows.out_row[row];
      if (out_row < 0) break;
      *reinterpret_cast<uint4*>(params.out + (first_row + out_row) * kHeadDimV + column) =
          *reinterpret_cast<const uint4*>(shared.exchange.out + row * kOutPitchBytes + column * 2);
    }
  }
};

__device__ __forceinline__ void consume(SharedPlan& shared, const DecodeParams& params, const Block& block,
                                        WorkerItems& items, const Merge& merge, u32 group_index) {
  Consumer group(shared, params, group_index);
  await_first_query<kMerge>();
  Item item;
  u32 tiles_before = 0, num_items = 0;
  while (items.next(item)) {
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
      group.reference[i] = -infinity();
      group.sum[i] = 0.f;
    }
#pragma unroll
    for (u32 chunk = 0; chunk < kLatentChunks; ++chunk) {
#pragma unroll
      for (u32 i = 0; i < kAccumulators; ++i) group.out[chunk][i] = 0.f;
    }
    const Tiles tiles(params, block, item, tiles_before);
    wait_phase(shared_address(&shared.q_full), (num_items - 1) % 2);  // passes at the first item
    ++num_items;
    group.attend(tiles);
    tiles_before += u32(tiles.count);
    merge.await_groups();
    group.is_alone = kMayStayAlone && tiles.count <= 1;
    if (group.is_alone) {
      group.stay_alone();
      if (group_index != 0) continue;
    } else {
      group.join_groups();
    }
#pragma unroll 1
    while (true) {
      group.write(item, merge);
      if (!group.is_alone || group.first_chunk > 0) break;
      group.move_to_second_half();
    }
  }
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
    consume(shared, params, block, items, merge, __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0));
  });
}
