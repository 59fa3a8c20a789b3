// A CTA's share of the work: a block of query rows, and its worker's items of the schedule (sequence, range of tiles),
// which every role walks in step.
#pragma once
#include "params.cuh"
#include "ptx.cuh"
#include "schedule.cuh"

constexpr u32 kTileRows = MLA_TILE_ROWS;      // query rows of a CTA
constexpr u32 kTileTokens = MLA_TILE_TOKENS;  // cache rows of a tile

// What a CTA works on; the same for all roles.
struct Block {
  i32 worker;
  i32 kv_head;
  i32 row_block;

  // Query rows that exist from the CTA's first one on; maybe more than it has, or none.
  __device__ __forceinline__ i32 num_rows(const DecodeParams& params) const {
    return params.seq_len_q * params.heads_per_kv - row_block * i32(kTileRows);
  }
};

// Index of this block in an array [workers or slots, num_kv_heads, row_blocks].
__device__ __forceinline__ i64 index_of_block(const DecodeParams& params, const Block& block, i32 worker) {
  return i64(worker) * params.blocks_per_worker + (block.kv_head * params.row_blocks + block.row_block);
}

// Rows of out, and values of lse, before those of a sequence.
__device__ __forceinline__ i64 first_row_of(const DecodeParams& params, i32 sequence) {
  return i64(sequence) * (params.seq_len_q * params.num_heads);  // mlacore/plan.py keeps the latter at 2^20
}

// Position of a query row of this CTA in q, out and lse.
struct QueryRow {
  i32 seq;
  i32 head;
  bool exists;  // the last row blocks may be partly or wholly empty

  __device__ __forceinline__ QueryRow(const DecodeParams& params, const Block& block, u32 row) {
    const i32 index = block.row_block * i32(kTileRows) + i32(row);
    seq = index / params.heads_per_kv;
    head = block.kv_head * params.heads_per_kv + index % params.heads_per_kv;
    exists = seq < params.seq_len_q;
  }
};

// The same for all rows of the CTA, worked out once: the divisions behind it are slow.
struct RowTable {
  i32 out_row[kTileRows];        // row of a sequence's out, -1 if there is none
  i32 lse_row[kTileRows];        // index within a sequence's lse
  i32 hidden_tokens[kTileRows];  // last tokens of the sequence that the row does not see

  __device__ __forceinline__ void fill(const DecodeParams& params, const Block& block, u32 row) {
    const QueryRow at(params, block, row);
    out_row[row] = at.exists ? at.seq * params.num_heads + at.head : -1;
    lse_row[row] = at.head * params.seq_len_q + at.seq;
    hidden_tokens[row] = params.causal && at.exists ? params.seq_len_q - 1 - at.seq : 0;
  }
};

struct Item {
  i32 sequence;
  i32 length;      // tokens of the sequence
  i32 begin_tile;  // tiles [begin_tile, end_tile) of it
  i32 end_tile;
  bool is_first;   // of this worker
  bool is_last;

  __device__ __forceinline__ i32 num_tiles() const { return end_tile - begin_tile; }
};

// A worker's part of the schedule: tiles from first_tile of its first sequence up to last_end_tile of its last one.
struct Stretch {
  i32 first_sequence;
  i32 first_tile;
  i32 last_sequence;  // before the first one if there is nothing to do
  i32 last_end_tile;  // or kNoEnd

  __device__ __forceinline__ Stretch(const DecodeParams& params, i32 worker) {
    const int2* work = reinterpret_cast<const int2*>(params.work) + worker;
    *this = Stretch(work[0], work[1]);
  }
  // As a hint, by whole warps: read_hint() may come before the end of the previous kernel, which may be about to write
  // it. One request a warp, as all warps of the GPU read a few lines of L2 (four cost clusters 0.7 us at b=1, h_q=128,
  // 4K on an H100), and nothing stays in L1.
  __device__ __forceinline__ static i32 read_hint(const DecodeParams& params, i32 worker) {
    return ld_relaxed_gpu(params.work + 2 * worker + threadIdx.x % 4);
  }
  __device__ __forceinline__ static Stretch from_hint(i32 word) {
    i32 words[4];
#pragma unroll
    for (i32 i = 0; i < 4; ++i) words[i] = __shfl_sync(0xffffffffu, word, i);
    return {{words[0], words[1]}, {words[2], words[3]}};
  }
  // Of a hint: whether it can be one.
  __device__ __forceinline__ bool leads_to_items(const DecodeParams& params) const {
    return has_items() && u32(first_sequence) < u32(params.batch);
  }
  // Of one that leads to items, of which the first has so many tokens: whether it leads to a tile.
  __device__ __forceinline__ bool leads_to_tile(i32 length) const {
    return u32(first_tile) < u32(tiles_of(length, i32(kTileTokens))) &&
           (first_sequence != last_sequence || first_tile < last_end_tile);
  }
  __device__ __forceinline__ bool has_items() const { return first_sequence <= last_sequence; }
  __device__ __forceinline__ bool begins_like(const Stretch& other) const {
    return first_sequence == other.first_sequence && first_tile == other.first_tile;
  }

 private:
  static constexpr i32 kNoEnd = 0x7fffffff;
  __device__ __forceinline__ Stretch(int2 begin, int2 end)
      : first_sequence(begin.x),
        first_tile(begin.y),
        last_sequence(end.y > 0 ? end.x : i32(u32(end.x) - 1)),
        last_end_tile(end.y > 0 ? end.y : kNoEnd) {}
};

class WorkerItems {
 public:
  // The length of the hint's first item comes at the same time as the schedule. Does not wait for them.
  __device__ __forceinline__ WorkerItems(const DecodeParams& params, i32 worker, const Stretch& hint)
      : params_(params),
        hinted_sequence_(hint.first_sequence),
        hinted_length_(u32(hint.first_sequence) < u32(params.batch) ? params.cache_seqlens[hint.first_sequence] : 0),
        stretch_(params, worker),
        sequence_(stretch_.first_sequence) {}

  // Fills `item` with the next item, or returns false. Empty sequences are items without tiles.
  __device__ __forceinline__ bool next(Item& item) {
    if (sequence_ > stretch_.last_sequence) return false;
    const bool is_first = sequence_ == stretch_.first_sequence, is_last = sequence_ == stretch_.last_sequence;
    const i32 length = sequence_ == hinted_sequence_ ? hinted_length_ : params_.cache_seqlens[sequence_];
    const i32 tiles = tiles_of(length, i32(kTileTokens));
    const i32 begin = is_first ? stretch_.first_tile : 0, end = is_last ? min(stretch_.last_end_tile, tiles) : tiles;
    item = {sequence_, length, begin, max(begin, end), is_first, is_last};
    ++sequence_;
    return true;
  }
  __device__ __forceinline__ const Stretch& stretch() const { return stretch_; }

 private:
  const DecodeParams& params_;
  i32 hinted_sequence_;
  i32 hinted_length_;
  Stretch stretch_;
  i32 sequence_;
};

// One tile of an item, as the consumers need it.
struct Tile {
  u32 stage;
  u32 phase;
  i32 valid_tokens;  // tokens of the sequence from the tile's first one on
  bool needs_mask;   // some row of the CTA sees fewer
};

// The tiles of an item; `tiles_before` counts those of earlier items, which fixes stages and phases.
template <u32 kStages>
struct ItemTiles {
  i32 count;
  i32 begin_tile;
  i32 length;
  i32 shortest_limit;  // tokens that the CTA's first row sees
  u32 tiles_before;

  __device__ __forceinline__ ItemTiles(const DecodeParams& params, const Block& block, const Item& item, u32 before)
      : count(item.num_tiles()), begin_tile(item.begin_tile), length(item.length), tiles_before(before) {
    const i32 first_seq = block.row_block * i32(kTileRows) / params.heads_per_kv;
    shortest_limit = params.causal ? length - (params.seq_len_q - 1 - first_seq) : length;
  }

  __device__ __forceinline__ Tile operator[](i32 index) const {
    const u32 position = tiles_before + u32(index);
    const i32 first_token = (begin_tile + index) * i32(kTileTokens);
    return {position % kStages, position / kStages % 2, length - first_token,
            length - first_token < i32(kTileTokens) || first_token > shortest_limit - i32(kTileTokens)};
  }
};
