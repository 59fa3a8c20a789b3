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
//   warpgroup 0   224 registers  even tiles of an item, all of O; then the sum of both groups' states
//   warpgroup 1   224 registers  odd tiles of an item, all of O
//   warp 8         56 registers  TMA loads of K tiles (V is the same bytes)
//   warps 9-11     56 registers  Q of the next item; warp 9 is the herald of merge.cuh as well
//
// Barriers:
//   q_full            96 arrivals    Q loaders -> both groups: Q of this item, not the first, is in place
//   q_empty            8 (warps)     both groups -> Q loaders: the group's last K Q^T of the item has read Q
//   kv_full[s][c]      1 + bytes     TMA -> owner of the tile: chunk c of the tile in stage s has landed
//   kv_empty[s][0]     4 (warps)     owner of the tile in every CTA of the cluster -> TMA: O += V^T P has read stage s
//                      a CTA
//   kGroup+g          named, 128     within group g: maxima, P, row sums exchanged; group 0: claims, staged results
//   kStates           named, 256     group 1 -> group 0: its state of the item is in shared memory
//   kMerge            named, 256     both groups: start-up, at which they load the first item's Q; end of all items;
//                                    merges of more than two splits
//   merge.ready        1             herald -> both groups: who shares the worker's items
//
// Schedule of a tile (each group for itself; the two take turns at the matrix units):
//   1  S^T = K Q^T, chunk by chunk as they land
//   2  softmax: P = exp2(S^T - reference), to shared memory as [row][token]. The reference of a row is its maximum over
//      the first tile and moves only when some P outgrows its slack: then maxima are taken again and O is rescaled
//   3  O += V^T P
//   4  release the stage
//
// A row's scores lie across the warps of a group, so its sum is collected once, at the end of an item.
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
constexpr u32 kExchangeChunks = kTileRows == 16 ? 8 : 2;    // chunks of O exchanged at once; more would spill
constexpr u32 kOutPitchBytes = kHeadDimV * 2 + kCellBytes;  // of a row of `exchange.out`: 8 rows hit different banks

static_assert(kTileRows == 16 || kTileRows == 32, "O fits one group's registers");
static_assert(kTileTokens == kChunkRows && kTileTokens == kChunkColumns, "a chunk holds a tile's tokens");

struct SharedPlan {
  alignas(1024) u16 q[kChunks][kTileRows * kChunkColumns];
  alignas(1024) u16 kv[kStages][kChunks][kTileTokens * kChunkColumns];
  alignas(1024) u16 p[kConsumerGroups][kTileRows * kTileTokens];
  union {
    float4 state[kExchangeChunks * kRowGroups]
                [kWarpgroupThreads];                // accumulators of group 1 for group 0, in four rounds at 32 rows
    unsigned char out[kTileRows * kOutPitchBytes];  // the result in 16 bits, on its way to memory
  } exchange;
  float maxima[kConsumerGroups][kGroupWarps][kTileRows];  // over a warp's tokens
  float sums[kConsumerGroups][kGroupWarps][kTileRows];
  float reference[kTileRows];  // of group 1, for group 0
  float sum[kTileRows];
  RowTable rows;
  MergeShared merge;
  u64 q_full;
  u64 q_empty;
  u64 kv_full[kStages][kChunks];
  u64 kv_empty[kStages][1];
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

  __device__ __forceinline__ Consumer(SharedPlan& s, const DecodeParams& p, u32 g) : shared(s), params(p), group(g) {}

  __device__ __forceinline__ u32 row_of(u32 i) const { return i / 2 * 8 + lane % 4 * 2 + i % 2; }

  // 1
  __device__ __forceinline__ void score(const Tile& tile) {
    const u64 k = k_major_descriptor(shared_address(shared.kv[tile.stage]));
    const u64 q = k_major_descriptor(shared_address(shared.q));
    wgmma_fence();
#pragma unroll
    for (u32 chunk = 0; chunk < kChunks; ++chunk) {
      wait_phase(shared_address(&shared.kv_full[tile.stage][chunk]), tile.phase);
#pragma unroll
      for (u32 step = 0; step < kStepsPerChunk; ++step) {
        wgmma_m64k16_ss<Element>(scores, k + chunk * (kChunkBytes / 16) + step * kKMajorStep,
                                 q + chunk * (kRowChunkBytes / 16) + step * kKMajorStep, chunk + step > 0);
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
    float tile_sum[kThreadRows];
    if (is_first) {
      renew_reference(false);
    } else {
      bar_sync(kGroup + group, kWarpgroupThreads);  // all warps' O += V^T P of the tile before have read P
    }
    const bool outgrown = exponentiate(tile_sum);
    // All of the group have written P; the vote must be the group's, as is the reference.
    if (bar_red_or(kGroup + group, kWarpgroupThreads, outgrown) && !is_first) {
      renew_reference(true);
      exponentiate(tile_sum);
      bar_sync(kGroup + group, kWarpgroupThreads);
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
    for (u32 step = 0; step < kStepsPerTile; ++step) {
#pragma unroll
      for (u32 chunk = 0; chunk < kLatentChunks; ++chunk) {
        wgmma_m64k16_ts<Element>(out[chunk], v + chunk * (kChunkBytes / 16) + step * kNMajorStep,
                                 p + step * kKMajorStep, step > 0 || !is_first);
      }
    }
    wgmma_commit_group();
    wgmma_wait_group<0>();
#pragma unroll
    for (u32 chunk = 0; chunk < kLatentChunks; ++chunk) keep_order(out[chunk]);
  }

  // 4
  __device__ __forceinline__ void release(const Tile& tile) {
    release_stage<kClusterCtas>(shared_address(&shared.kv_empty[tile.stage][0]));
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
      release(tile);
    }
  }

  // Row sums over the group's tokens, in every thread.
  __device__ __forceinline__ void finish_sums() {
    float (&sums)[kGroupWarps][kTileRows] = shared.sums[group];
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
      float total = sum[i];
#pragma unroll
      for (u32 offset = 4; offset < kWarpThreads; offset *= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
      if (lane < 4) sums[warp][row_of(i)] = total;
    }
    bar_sync(kGroup + group, kWarpgroupThreads);
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
      const u32 row = row_of(i);
      sum[i] = (sums[0][row] + sums[1][row]) + (sums[2][row] + sums[3][row]);
    }
  }

  // Group 1 hands its state over, group 0 adds it to its own. Both relative to the larger reference.
  __device__ __forceinline__ void join_groups() {
#pragma unroll
    for (u32 first = 0; first < kLatentChunks; first += kExchangeChunks) {
      barrier_cta_sync(kStates, kConsumerThreads);  // what the exchange held before has been read
      if (group == 1) {
        if (first == 0 && warp == 0 && lane < 4) {
#pragma unroll
          for (u32 i = 0; i < kThreadRows; ++i) {
            shared.reference[row_of(i)] = reference[i];
            shared.sum[row_of(i)] = sum[i];
          }
        }
#pragma unroll
        for (u32 c = 0; c < kExchangeChunks; ++c) {
#pragma unroll
          for (u32 j = 0; j < kRowGroups; ++j) {
            const float (&from)[kAccumulators] = out[first + c];
            shared.exchange.state[c * kRowGroups + j][thread] = {from[4 * j], from[4 * j + 1], from[4 * j + 2],
                                                                 from[4 * j + 3]};
          }
        }
      }
      barrier_cta_sync(kStates, kConsumerThreads);
      if (group == 0) {
        float factors[kThreadRows];
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
          const float other = shared.reference[row_of(i)], top = fmaxf(reference[i], other);
          factors[i] = ex2(other - finite_or_zero(top));
          if (first == 0) {
            const float own = ex2(reference[i] - finite_or_zero(top));
            sum[i] = sum[i] * own + shared.sum[row_of(i)] * factors[i];
            reference[i] = top;
#pragma unroll
            for (u32 chunk = 0; chunk < kLatentChunks; ++chunk) {
              out[chunk][i / 2 * 4 + i % 2] *= own;
              out[chunk][i / 2 * 4 + i % 2 + 2] *= own;
            }
          }
        }
#pragma unroll
        for (u32 c = 0; c < kExchangeChunks; ++c) {
#pragma unroll
          for (u32 j = 0; j < kRowGroups; ++j) {
            float (&to)[kAccumulators] = out[first + c];
            const float4 from = shared.exchange.state[c * kRowGroups + j][thread];
            to[4 * j] += from.x * factors[2 * j];
            to[4 * j + 1] += from.y * factors[2 * j + 1];
            to[4 * j + 2] += from.z * factors[2 * j];
            to[4 * j + 3] += from.w * factors[2 * j + 1];
          }
        }
      }
    }
  }

  // Group 0, with the state of the whole item, from here on. Log-sum-exp of row i of the thread in base 2, and what O
  // is to be multiplied by.
  __device__ __forceinline__ float lse(u32 i) const {
    return sum[i] == 0.f ? -infinity() : reference[i] + log2f(sum[i]);
  }
  __device__ __forceinline__ float scale(u32 i) const { return sum[i] == 0.f ? 0.f : 1.f / sum[i]; }

  __device__ __forceinline__ void write_partial(uint4* cells, uint4* lses, u32 launch) const {
#pragma unroll
    for (u32 j = 0; j < kRowGroups; ++j) {
      if (shared.rows.out_row[row_of(2 * j)] < 0) break;
      const float scales[2] = {scale(2 * j), scale(2 * j + 1)};
#pragma unroll
      for (u32 chunk = 0; chunk < kLatentChunks; ++chunk) {
        const float (&from)[kAccumulators] = out[chunk];
        st_global_16(cells + Cells::memory_index(chunk, j, thread),
                     pack_cell(from[4 * j] * scales[0], from[4 * j + 2] * scales[0], from[4 * j + 1] * scales[1],
                               from[4 * j + 3] * scales[1], launch));
      }
      if (warp == 0 && lane < 4) st_global_16(lses + 4 * j + lane, pack_lse(lse(2 * j), lse(2 * j + 1), launch));
    }
  }

  // The result of the item: of this state, or of its sum with the other of two splits if `cells` is not null.
  __device__ __forceinline__ void write_final(const Item& item, const uint4* cells, const uint4* lses, u32 launch) {
    constexpr u32 kInFlight = kTileRows == 16 ? 4 : 2;  // chunks of the other state, of two row groups
    const i64 first_row = i64(item.sequence) * params.seq_len_q * params.num_heads;
    const u32 staged = shared_address(shared.exchange.out);
#pragma unroll
    for (u32 j = 0; j < kRowGroups; j += 2) {
      const bool exists[2] = {shared.rows.out_row[row_of(2 * j)] >= 0, shared.rows.out_row[row_of(2 * j + 2)] >= 0};
      uint4 pairs[2] = {pack_lse(-infinity(), -infinity(), launch), pack_lse(-infinity(), -infinity(), launch)};
      if (cells) {
        Watchdog watchdog;
        do {
          watchdog.turn();
#pragma unroll
          for (u32 k = 0; k < 2; ++k) {
            if (exists[k]) pairs[k] = ld_relaxed_gpu_16(lses + 4 * (j + k) + lane % 4);
          }
        } while (!__all_sync(0xffffffffu, pairs[0].w == launch && pairs[1].w == launch));
      }
      float scales[4], own_weight[4], other_weight[4];
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        const float2 other = unpack_lse(pairs[i / 2]);
        const float own_lse = lse(2 * j + i);
        const SumOfTwo both(own_lse, i % 2 == 0 ? other.x : other.y);
        scales[i] = scale(2 * j + i);
        own_weight[i] = both.own_weight;
        other_weight[i] = both.other_weight;
        const u32 row = row_of(2 * j + i);
        if (warp == 0 && lane < 4 && shared.rows.out_row[row] >= 0) {
          params.lse[first_row + shared.rows.lse_row[row]] = (cells ? both.lse : own_lse) * kLn2;
        }
      }
#pragma unroll
      for (u32 first = 0; first < kLatentChunks; first += kInFlight) {
        uint4 parts[kInFlight][2];
        if (cells) {
          bool is_there;
          Watchdog watchdog;
          do {
            watchdog.turn();
            is_there = true;
#pragma unroll
            for (u32 c = 0; c < kInFlight; ++c) {
#pragma unroll
              for (u32 k = 0; k < 2; ++k) {
                parts[c][k] = ld_relaxed_gpu_16(cells + Cells::memory_index(first + c, j + k, thread));
              }
            }
#pragma unroll
            for (u32 c = 0; c < kInFlight; ++c) {
#pragma unroll
              for (u32 k = 0; k < 2; ++k) is_there = is_there && (parts[c][k].w == launch || !exists[k]);
            }
          } while (!__all_sync(0xffffffffu, is_there));
        }
#pragma unroll
        for (u32 c = 0; c < kInFlight; ++c) {
          const u32 chunk = first + c;
          u32 packed[4];
#pragma unroll
          for (u32 k = 0; k < 2; ++k) {
            float value[4];
#pragma unroll
            for (u32 e = 0; e < 4; ++e) value[e] = out[chunk][4 * (j + k) + e] * scales[2 * k + e % 2];
            if (cells) {
              const float4 part = unpack_cell(parts[c][k]);
              const float from[4] = {part.x, part.z, part.y, part.w};  // in the order of accumulators
#pragma unroll
              for (u32 e = 0; e < 4; ++e) {
                const u32 i = 2 * k + e % 2;
                value[e] = sum_of_products(without_last_bits(value[e]), own_weight[i], from[e], other_weight[i]);
              }
            }
            packed[2 * k] = cvt_pack<Element>(value[0], value[1]);
            packed[2 * k + 1] = cvt_pack<Element>(value[2], value[3]);
          }
          const u32 row = 8 * j + lane / 16 * 8 + lane % 8;
          const u32 column = chunk * kChunkColumns + warp * 16 + lane / 8 % 2 * 8;
          stmatrix_x4_trans(staged + row * kOutPitchBytes + column * 2, packed[0], packed[1], packed[2], packed[3]);
        }
      }
    }
    bar_sync(kGroup + group, kWarpgroupThreads);
    constexpr u32 kCellsPerOutRow = kHeadDimV * 2 / kCellBytes;
    for (u32 cell = thread; cell < kTileRows * kCellsPerOutRow; cell += kWarpgroupThreads) {
      const u32 row = cell / kCellsPerOutRow, within = cell % kCellsPerOutRow;
      const i32 out_row = shared.rows.out_row[row];
      if (out_row < 0) break;
      *reinterpret_cast<uint4*>(params.out + (first_row + out_row) * kHeadDimV + within * 8) =
          *reinterpret_cast<const uint4*>(shared.exchange.out + row * kOutPitchBytes + within * kCellBytes);
    }
    bar_sync(kGroup + group, kWarpgroupThreads);  // the staged rows have been read
  }
};

__device__ __forceinline__ void consume(SharedPlan& shared, const DecodeParams& params, const Block& block,
                                        WorkerItems& items, const Merge& merge, u32 group_index) {
  Consumer group(shared, params, group_index);
  Item item;
  u32 tiles_before = 0, num_items = 0;
  while (items.next(item)) {
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
      group.reference[i] = -infinity();
      group.sum[i] = 0.f;
    }
    const Tiles tiles(params, block, item, tiles_before);
    if (tiles.count <= i32(group_index)) {
#pragma unroll
      for (u32 chunk = 0; chunk < kLatentChunks; ++chunk) {
#pragma unroll
        for (u32 i = 0; i < kAccumulators; ++i) group.out[chunk][i] = 0.f;
      }
    }
    wait_phase(shared_address(&shared.q_full), (num_items - 1) % 2);  // passes at the first item
    ++num_items;
    group.attend(tiles);
    tiles_before += u32(tiles.count);
    if (tiles.count > i32(group_index)) group.finish_sums();
    if (tiles.count > 1) group.join_groups();
    if (group_index != 0) continue;
    merge.await_groups();
    const bool is_split = merge.is_split(item), is_pair = is_split && merge.is_pair(item);
    if (is_pair) {
      if (threadIdx.x == 0) merge.claim(item);
      bar_sync(kGroup, kWarpgroupThreads);
    }
    if (is_split && !(is_pair && merge.is_second(item))) {
      const i32 slot = merge.own_slot(item);
      group.write_partial(merge.partial_cells(slot), merge.partial_lses(slot), merge.launch());
      continue;
    }
    const i32 slot = is_split ? merge.other_slot(item) : 0;
    group.write_final(item, is_split ? merge.partial_cells(slot) : nullptr, merge.partial_lses(slot), merge.launch());
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

  run_roles<kMerge>(shared, &kv_map, params, block, merge, [&](WorkerItems& items) {
    consume(shared, params, block, items, merge, __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0));
  });
}
