// Split-KV decode of multi-head latent attention, query rows ("heads") on the M side of the matrix units.
//
//   S = Q K^T * softmax_scale        Q: 64 query rows x 576, K: the cache rows (512 latent + 64 rope)
//   out = softmax(S) V               V: the first 512 columns of the same cache rows
//   lse = log sum exp(S)
//
// Grid: one persistent CTA for each (worker, KV head, block of 64 query rows), row blocks fastest, so that the CTAs that
// want the same pages run side by side. With an even number of row blocks two of them form a cluster: each loads half of
// every tile and multicasts it to both, which halves what L2 has to deliver. A worker walks its items of the split schedule
// (schedule.cuh); an item that covers its whole sequence writes out and lse, a split writes a normalised partial state
// that mla_combine merges.
//
// Roles (384 threads):
//   warpgroup 0       224 registers  even tiles: S, softmax, P; columns   0-255 of O for all tiles
//   warpgroup 1       224 registers  odd tiles:  S, softmax, P; columns 256-511 of O for all tiles
//   warp 8             56 registers  TMA loads of K tiles (V is the same bytes)
//   warps 9-11         56 registers  Q of the next item
//
// Barriers:
//   q_full            96 arrivals    Q loaders -> both groups: Q of this item is in place
//   q_empty            8 (warps)     both groups -> Q loaders: last QK^T of the item has read Q
//   kv_full[s][c]      1 + bytes     TMA -> owner of the tile: chunk c of the tile in stage s has landed
//   kv_empty[s][h]     4 (warps)     group h of every CTA of the cluster -> TMA: O += P V of its half of stage s is done, and
//                      a CTA         so is all else that it does with the stage
//   kProbabilities+s  named, 256     owner -> peer: P and the softmax references of the tile in stage s are in shared memory
//   kGroup+g          named, 128     within group g
//   kSums             named, 256     both groups: row sums of the item exchanged
//
// Schedule of a pair of tiles (a: even, b: odd). Half of O fits one group's registers, so the groups share its columns and
// each needs the other's P:
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
// What limits it (H100, b=128, h_q=128, s_q=2, s_k=16K): 645 to 698 TFLOP/s over runs; traced with clock reads, about
// 5300 cycles a pair of tiles, of which the tensor cores need 4352. The loop of a stage is the longest chain: about 1000
// cycles from its release to the first chunk and 1300 until the last, 400 for the rest of QK^T, 700 for the softmax
// (next to the other group's WGMMAs it issues at half its rate), then both halves of P V and their hand-over. What was
// tried without gain stands in the CHANGELOG.
#include "epilogue.cuh"
#include "layout.cuh"
#include "params.cuh"
#include "pipeline.cuh"
#include "softmax.cuh"
#include "work.cuh"

using Element = MLA_ELEMENT;

constexpr u32 kTileTokens = MLA_TILE_TOKENS;  // cache rows of a tile
constexpr u32 kPageSize = MLA_PAGE_SIZE;
constexpr u32 kHeadDimQK = MLA_HEAD_DIM_QK;
constexpr u32 kHeadDimV = MLA_HEAD_DIM_V;
constexpr u32 kStages = 2;
constexpr u32 kClusterCtas = MLA_CLUSTER_CTAS;  // CTAs (row blocks) that load each tile together

constexpr u32 kConsumerGroups = 2;
constexpr u32 kGroupColumns = kHeadDimV / kConsumerGroups;
constexpr u32 kConsumerThreads = kConsumerGroups * kWarpgroupThreads;
constexpr u32 kQLoaderThreads = 3 * kWarpThreads;
constexpr u32 kThreads = kConsumerThreads + kWarpgroupThreads;
constexpr u32 kConsumerRegisters = 224;
constexpr u32 kProducerRegisters = 56;

constexpr u32 kChunks = kHeadDimQK / kChunkColumns;
constexpr u32 kGroupChunks = kGroupColumns / kChunkColumns;
constexpr u32 kRopeChunk = kChunks - 1;
constexpr u32 kStepsPerChunk = kChunkColumns / kReductionStep;
constexpr u32 kStepsPerTile = kTileTokens / kReductionStep;
constexpr u32 kShareRows = kTileTokens / kClusterCtas;  // rows of a tile that each CTA of the cluster loads for all

static_assert(kTileRows == 64, "WGMMA works on 64 rows");
static_assert(kTileTokens == kChunkRows && kTileTokens == kChunkColumns, "a chunk holds a tile's tokens, or its P");
static_assert(kClusterCtas == 1 || kClusterCtas == 2, "an SM pair (TPC) hosts the cluster, so that no SM is left over");
static_assert(kPageSize % kTileTokens == 0, "a tile lies within one page");
static_assert(kHeadDimV == kRopeChunk * kChunkColumns, "the rope chunk follows the latent");
static_assert(kGroupColumns == 256, "one WGMMA covers a group's columns");
static_assert(kThreads == MLA_THREADS, "mlacore/params.py launches another number of threads");

struct SharedPlan {
  alignas(1024) u16 q[kChunks][kTileRows * kChunkColumns];
  alignas(1024) u16 kv[kStages][kChunks][kTileTokens * kChunkColumns];
  alignas(1024) u16 p_odd[kTileRows * kTileTokens];        // P of odd tiles; P of even tiles lies in kv[stage][kRopeChunk]
  float row_reference[kStages][kTileRows];                 // softmax reference that P of the tile in this stage has
  float row_sum[2][kConsumerGroups][kTileRows];            // by parity of the item, so that the next may write already
  u64 q_full;
  u64 q_empty;
  u64 kv_full[kStages][kChunks];
  u64 kv_empty[kStages][kConsumerGroups];
};
static_assert(sizeof(SharedPlan) <= MLA_SHARED_BYTES, "mlacore/params.py asks for less shared memory");

using Tiles = ItemTiles<kTileTokens, kStages>;

enum NamedBarrier : u32 { kGroup = 1, kProbabilities = kGroup + kConsumerGroups, kSums = kProbabilities + kStages };

// ---- producers -----------------------------------------------------------------------------------------------------

// Warp 8: K tiles of all items, as far ahead as the stages allow. A page id outside the pool, or past the table's end,
// reads as zeros: TMA does not leave the tensor.
__device__ __forceinline__ void load_kv(SharedPlan& shared, const TensorMap* kv_map, const DecodeParams& params,
                                        const Block& block) {
  const u32 lane = threadIdx.x % kWarpThreads;
  const u32 first_row = kClusterCtas > 1 ? cluster_ctarank() * kShareRows : 0;
  RingPosition<kStages> ring;
  WorkerItems<kTileTokens> items(params, block.worker);
  Item item;
  while (items.next(item)) {
    const i32* pages = params.block_table + item.sequence * params.block_table_stride;
    for (i32 base = item.begin_tile; base < item.end_tile; base += i32(kWarpThreads)) {
      // One load brings the page ids of 32 tiles, so that none waits for its own.
      const i32 entry = (base + i32(lane)) * i32(kTileTokens) / i32(kPageSize);
      const i32 my_page = entry < params.max_pages ? pages[entry] : -1;
      const i32 end = min(base + i32(kWarpThreads), item.end_tile);
      for (i32 tile = base; tile < end; ++tile, ring.advance()) {
        const i32 page = __shfl_sync(0xffffffffu, my_page, tile - base);
        if (lane != 0) continue;
        const i32 page_row = tile * i32(kTileTokens) % i32(kPageSize) + i32(first_row);
        for (u32 chunk = 0; chunk < kChunks; ++chunk) {
          // The rope chunk doubles as P, which the peer reads: it is free once both halves are.
          if (chunk % kGroupChunks == 0 && chunk != kRopeChunk) {
            wait_phase(shared_address(&shared.kv_empty[ring.stage][chunk / kGroupChunks]), ring.phase ^ 1);
          }
          const u32 full = shared_address(&shared.kv_full[ring.stage][chunk]);
          mbarrier_arrive_expect_tx(full, kChunkBytes);
          const u32 destination = shared_address(shared.kv[ring.stage][chunk]) + first_row * kChunkRowBytes;
          const i32 column = i32(chunk * kChunkColumns);
          if constexpr (kClusterCtas == 1) {
            cp_async_bulk_tensor_4d(destination, kv_map, full, column, page_row, block.kv_head, page);
          } else {
            constexpr u16 kAllCtas = (1 << kClusterCtas) - 1;
            cp_async_bulk_tensor_4d_multicast(destination, kv_map, full, column, page_row, block.kv_head, page, kAllCtas);
          }
        }
      }
    }
  }
}

// Warps 9-11: Q of each item that has tiles. Rows past the last one are zeros.
__device__ __forceinline__ void load_q(SharedPlan& shared, const DecodeParams& params, const Block& block) {
  constexpr u32 kCells = kHeadDimQK * 2 / kCellBytes;
  const u32 warp = threadIdx.x % kWarpgroupThreads / kWarpThreads - 1, lane = threadIdx.x % kWarpThreads;
  const u32 q = shared_address(shared.q);
  WorkerItems<kTileTokens> items(params, block.worker);
  Item item;
  u32 phase = 0;
  while (items.next(item)) {
    if (item.num_tiles() == 0) continue;
    wait_phase(shared_address(&shared.q_empty), phase ^ 1);
    const u16* source = params.q + item.sequence * params.q_stride_batch;
    for (u32 row = warp; row < kTileRows; row += kQLoaderThreads / kWarpThreads) {
      const QueryRow at(params, block, row);
      const u16* from = at.exists ? source + at.seq * params.q_stride_seq + at.head * params.q_stride_head : source;
      for (u32 cell = lane; cell < kCells; cell += kWarpThreads) {
        const u32 destination = q + cell / kCellsPerRow * kChunkBytes + swizzled_offset(row, cell % kCellsPerRow);
        cp_async_16(destination, from + cell * 8, at.exists ? kCellBytes : 0);
      }
    }
    cp_async_wait_all();
    fence_proxy_async();
    mbarrier_arrive(shared_address(&shared.q_full));
    phase ^= 1;
  }
}

// ---- consumers -----------------------------------------------------------------------------------------------------

// One warpgroup: its half of O, its tiles' softmax. Step numbers are those of the schedule at the top.
template <u32 kGroupIndex>
struct Consumer {
  SharedPlan& shared;
  const DecodeParams& params;
  const Block& block;
  const u32 thread = threadIdx.x % kWarpgroupThreads;
  const u32 lane = threadIdx.x % kWarpThreads;
  const u32 row = fragment_row(thread);

  float out[kGroupColumns / 2];  // O fragment: 64 x 256 over 128 threads
  float scores[kTileTokens / 2];
  u32 probabilities[kTileTokens / 4];
  RowPair reference;  // of the online softmax (softmax.cuh); `out` and `sum` are relative to it
  RowPair sum;        // this thread's share of the sums over its own tiles

  __device__ __forceinline__ Consumer(SharedPlan& s, const DecodeParams& p, const Block& b)
      : shared(s), params(p), block(b) {}

  // Scores of chunks [kBegin, kEnd) of the tile's columns, as one committed group.
  template <u32 kBegin, u32 kEnd>
  __device__ __forceinline__ void start_scores(const Tile& tile) {
    const u64 q = k_major_descriptor(shared_address(shared.q));
    const u64 k = k_major_descriptor(shared_address(shared.kv[tile.stage]));
    wgmma_fence();
#pragma unroll
    for (u32 chunk = kBegin; chunk < kEnd; ++chunk) {
      wait_phase(shared_address(&shared.kv_full[tile.stage][chunk]), tile.phase);
#pragma unroll
      for (u32 step = 0; step < kStepsPerChunk; ++step) {
        const u64 at = chunk * (kChunkBytes / 16) + step * kKMajorStep;
        wgmma_m64n64k16_ss<Element>(scores, q + at, k + at, chunk + step > 0);
      }
    }
    wgmma_commit_group();
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
  __device__ __forceinline__ RowPair own_softmax(const Tile& tile) {
    if (tile.needs_mask) {
      i32 limit[2];
#pragma unroll
      for (u32 i = 0; i < 2; ++i) {
        const QueryRow at(params, block, row + 8 * i);
        limit[i] = tile.valid_tokens - (params.causal ? params.seq_len_q - 1 - at.seq : 0);
      }
      mask_scores(scores, fragment_column(thread), limit);
    }
    const float scale_log2 = params.softmax_scale_log2;
    RowPair factors = {1.f, 1.f};
    RowPair tile_sum = exponentiate<Element>(scores, probabilities, reference, scale_log2);
    if (needs_new_reference(tile_sum, reference)) {
      const RowPair updated = new_reference(thread_max(scores), reference, scale_log2);
      factors = rescale_factors(reference, updated);
      reference = updated;
      tile_sum = exponentiate<Element>(scores, probabilities, reference, scale_log2);
    }
#pragma unroll
    for (u32 i = 0; i < 2; ++i) sum.r[i] = sum.r[i] * factors.r[i] + tile_sum.r[i];
    return factors;
  }

  // P of the own tile and its references to the peer.
  __device__ __forceinline__ void publish_probabilities(const Tile& tile) {
    // All four warps have read the rope chunk (their QK^T is complete) before any writes P_a over it. P_b's buffer is free
    // because its last reader has released the stage that this tile was loaded into.
    if constexpr (kGroupIndex == 0) bar_sync(kGroup + kGroupIndex, kWarpgroupThreads);
    const u32 p = shared_address(kGroupIndex == 0 ? shared.kv[tile.stage][kRopeChunk] : shared.p_odd);
    const u32 p_row = thread / 32 * 16 + lane % 16;
#pragma unroll
    for (u32 step = 0; step < kStepsPerTile; ++step) {
      stmatrix_x4(p + swizzled_offset(p_row, 2 * step + lane / 16), probabilities[4 * step], probabilities[4 * step + 1],
                  probabilities[4 * step + 2], probabilities[4 * step + 3]);
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

  // Most tiles leave the references of a whole warp as they were. No WGMMA may be in flight here: the compiler would wait
  // for all of them before ordinary instructions that write accumulators.
  __device__ __forceinline__ void rescale_out(const RowPair& factors) {
    if (!__any_sync(0xffffffffu, factors.r[0] != 1.f || factors.r[1] != 1.f)) return;
#pragma unroll
    for (u32 i = 0; i < kGroupColumns / 2; ++i) out[i] *= factors.r[(i / 2) % 2];
  }

  // P is zero for tokens past the end, but 0 * NaN is not: the group clears those rows of its half of V.
  __device__ __forceinline__ void clear_past_end(const Tile& tile) {
    if (tile.valid_tokens >= i32(kTileTokens)) return;
    const u32 v = shared_address(shared.kv[tile.stage][kGroupIndex * kGroupChunks]);
    constexpr u32 kCellsPerToken = kGroupChunks * kCellsPerRow;
    for (u32 i = thread; i < (kTileTokens - u32(tile.valid_tokens)) * kCellsPerToken; i += kWarpgroupThreads) {
      const u32 token = u32(tile.valid_tokens) + i / kCellsPerToken, cell = i % kCellsPerToken;
      st_shared_zero_16(v + cell / kCellsPerRow * kChunkBytes + token * kChunkRowBytes + cell % kCellsPerRow * kCellBytes);
    }
    fence_proxy_async();
    bar_sync(kGroup + kGroupIndex, kWarpgroupThreads);
  }

  // O += P V with P of the own tile, from registers.
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
  __device__ __forceinline__ void start_peer_out(const Tile& tile) {
    clear_past_end(tile);
    const u64 p = k_major_descriptor(shared_address(kGroupIndex == 1 ? shared.kv[tile.stage][kRopeChunk] : shared.p_odd));
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
    if (lane == 0) mbarrier_arrive(shared_address(&shared.q_empty));
  }

  // To every CTA of the cluster, since each writes into this one's stages.
  __device__ __forceinline__ void release_half(const Tile& tile) {
    const u32 empty = shared_address(&shared.kv_empty[tile.stage][kGroupIndex]);
    if constexpr (kClusterCtas == 1) {
      if (lane == 0) mbarrier_arrive(empty);
    } else {
      if (lane < kClusterCtas) mbarrier_arrive_cluster(empty, lane);
    }
  }

  // Softmax and O update of an even tile, whose scores are complete.
  __device__ __forceinline__ void attend_own(const Tile& even) {
    rescale_out(own_softmax(even));  // 2
    start_own_out(even);             // 3
    publish_probabilities(even);     // 4
    finish_out();
    release_half(even);  // 5
  }

  // Even tiles are this group's own. The tile of one pair is scored behind the O update of the pair before.
  __device__ __forceinline__ void attend_even(const Tiles& tiles) {
    start_scores<0, kChunks>(tiles[0]);  // 1
    finish_scores();
    i32 a = 0;
    for (; a + 2 < tiles.count; a += 2) {
      const Tile even = tiles[a], odd = tiles[a + 1], next = tiles[a + 2];
      attend_own(even);
      rescale_out(take_probabilities(odd));
      start_peer_out(odd);  // 6
      // 1': one chunk keeps the tensor cores fed while the O update is awaited
      start_scores<0, 1>(next);
      wgmma_wait_group<1>();
      keep_order(out);
      release_half(odd);  // 8
      start_scores<1, kChunks>(next);
      finish_scores();
    }
    release_q();
    const Tile even = tiles[a];
    attend_own(even);
    if (a + 1 < tiles.count) {
      const Tile odd = tiles[a + 1];
      rescale_out(take_probabilities(odd));
      start_peer_out(odd);
      finish_out();
      release_half(odd);
    }
  }

  // Odd tiles are this group's own.
  __device__ __forceinline__ void attend_odd(const Tiles& tiles) {
    i32 a = 0;
    for (; a + 1 < tiles.count; a += 2) {
      const Tile even = tiles[a], odd = tiles[a + 1];
      start_scores<0, kChunks>(odd);                          // 1
      const RowPair peer_factors = take_probabilities(even);  // 2
      finish_scores();
      if (a + 3 >= tiles.count) release_q();
      rescale_out(peer_factors);
      start_peer_out(even);                       // 3
      const RowPair factors = own_softmax(odd);  // 4
      finish_out();
      release_half(even);  // 5
      rescale_out(factors);
      start_own_out(odd);          // 6
      publish_probabilities(odd);  // 7
      finish_out();
      release_half(odd);  // 8
    }
    if (tiles.count == 1) release_q();
    if (a < tiles.count) {
      const Tile even = tiles[a];
      rescale_out(take_probabilities(even));
      start_peer_out(even);
      finish_out();
      release_half(even);
    }
  }

  // Row sums over both groups' tiles; then out and lse, or a partial state when the sequence is split.
  __device__ __forceinline__ void write_item(const Item& item, u32 item_parity) {
    const bool is_empty = item.num_tiles() == 0;
    float total[2] = {0.f, 0.f};
    if (!is_empty) {
      float(&sums)[kConsumerGroups][kTileRows] = shared.row_sum[item_parity];
#pragma unroll
      for (u32 i = 0; i < 2; ++i) {
        const float group_sum = quad_sum(sum.r[i]);
        if (lane % 4 == 0) sums[kGroupIndex][row + 8 * i] = group_sum;
      }
      barrier_cta_sync(kSums, kConsumerThreads);
#pragma unroll
      for (u32 i = 0; i < 2; ++i) total[i] = sums[0][row + 8 * i] + sums[1][row + 8 * i];
    }
    const i32 num_splits = params.splits[2 * item.sequence + 1];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const float scale = total[i] == 0.f ? 0.f : 1.f / total[i];
      const float lse_log2 = total[i] == 0.f ? -infinity() : reference.r[i] + log2f(total[i]);
      if (num_splits > 1) {
        write_partial_row(item, i, scale, lse_log2);
      } else {
        write_final_row(item, i, scale, lse_log2);
      }
    }
  }

  __device__ __forceinline__ void write_partial_row(const Item& item, u32 i, float scale, float lse_log2) {
    const QueryRow at(params, block, row + 8 * i);
    if (!at.exists) return;
    const i64 slot = partial_slot(block.worker, item.is_first);
    const i64 index = ((slot * params.num_kv_heads + block.kv_head) * params.row_blocks + block.row_block) * kTileRows +
                      row + 8 * i;
    store_row_float(params.partial_out + index * kHeadDimV + kGroupIndex * kGroupColumns, out, i, scale);
    if (kGroupIndex == 0 && lane % 4 == 0) params.partial_lse[index] = lse_log2;
  }

  __device__ __forceinline__ void write_final_row(const Item& item, u32 i, float scale, float lse_log2) {
    const QueryRow at(params, block, row + 8 * i);
    const i64 sequence = item.sequence;
    const i64 index = (sequence * params.seq_len_q + at.seq) * params.num_heads + at.head;
    store_row_16bit<Element>(params.out + index * kHeadDimV + kGroupIndex * kGroupColumns, out, i, scale, at.exists);
    if (kGroupIndex == 0 && lane % 4 == 0 && at.exists) {
      params.lse[(sequence * params.num_heads + at.head) * params.seq_len_q + at.seq] = lse_log2 * kLn2;
    }
  }
};

template <u32 kGroupIndex>
__device__ __forceinline__ void consume(SharedPlan& shared, const DecodeParams& params, const Block& block) {
  Consumer<kGroupIndex> group(shared, params, block);
  WorkerItems<kTileTokens> items(params, block.worker);
  Item item;
  u32 tiles_before = 0, items_with_tiles = 0;
  while (items.next(item)) {
    group.reference = {-infinity(), -infinity()};
    group.sum = {0.f, 0.f};
#pragma unroll
    for (u32 i = 0; i < kGroupColumns / 2; ++i) group.out[i] = 0.f;
    if (item.num_tiles() > 0) {
      wait_phase(shared_address(&shared.q_full), items_with_tiles % 2);
      const Tiles tiles(params, block, item, tiles_before);
      if constexpr (kGroupIndex == 0) {
        group.attend_even(tiles);
      } else {
        group.attend_odd(tiles);
      }
      tiles_before += u32(item.num_tiles());
      ++items_with_tiles;
    }
    group.write_item(item, items_with_tiles % 2);
  }
}

// ---- kernel --------------------------------------------------------------------------------------------------------

// Barriers are initialised in all CTAs that will use them.
__device__ __forceinline__ void sync_ctas() {
  if constexpr (kClusterCtas == 1) {
    __syncthreads();
  } else {
    barrier_cluster_sync();
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) __cluster_dims__(kClusterCtas, 1, 1)
    mla_decode_sm90(const __grid_constant__ TensorMap kv_map, const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  SharedPlan& shared = *reinterpret_cast<SharedPlan*>(dynamic_shared);
  const i32 index = i32(blockIdx.x);
  const Block block = {index / (params.row_blocks * params.num_kv_heads), index / params.row_blocks % params.num_kv_heads,
                       index % params.row_blocks};

  if (threadIdx.x == 0) {
    prefetch_tensormap(&kv_map);
    mbarrier_init(shared_address(&shared.q_full), kQLoaderThreads);
    mbarrier_init(shared_address(&shared.q_empty), kConsumerThreads / kWarpThreads);
    for (u32 stage = 0; stage < kStages; ++stage) {
      for (u32 chunk = 0; chunk < kChunks; ++chunk) mbarrier_init(shared_address(&shared.kv_full[stage][chunk]), 1);
      for (u32 half = 0; half < kConsumerGroups; ++half) {
        mbarrier_init(shared_address(&shared.kv_empty[stage][half]), kClusterCtas * kWarpgroupThreads / kWarpThreads);
      }
    }
    fence_mbarrier_init();
  }
  sync_ctas();
  griddepcontrol_launch_dependents();

  const u32 warp = threadIdx.x / kWarpThreads;
  if (threadIdx.x >= kConsumerThreads) {
    setmaxnreg_dec<kProducerRegisters>();
    if (warp == kConsumerThreads / kWarpThreads) {
      load_kv(shared, &kv_map, params, block);
    } else {
      load_q(shared, params, block);
    }
  } else if (threadIdx.x < kWarpgroupThreads) {
    setmaxnreg_inc<kConsumerRegisters>();
    consume<0>(shared, params, block);
  } else {
    setmaxnreg_inc<kConsumerRegisters>();
    consume<1>(shared, params, block);
  }
  if constexpr (kClusterCtas > 1) {
    __syncwarp();
    barrier_cluster_sync();  // the other CTA may still arrive at our barriers
  }
}
