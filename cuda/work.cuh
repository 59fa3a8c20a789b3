// A CTA's share of the work: a block of query rows, and its worker's items of the schedule (sequence, range of tiles), which
// every role walks in step.
#pragma once
#include "params.cuh"
#include "schedule.cuh"

constexpr u32 kTileRows = MLA_TILE_ROWS;  // query rows of a CTA

// What a CTA works on; the same for all roles.
struct Block {
  i32 worker;
  i32 kv_head;
  i32 row_block;
};

// Position of a query row of this CTA in q, out and lse.
struct QueryRow {
  i32 seq;
  i32 head;
  bool exists;  // the last row block may be partly empty

  __device__ __forceinline__ QueryRow(const DecodeParams& params, const Block& block, u32 row) {
    const i32 index = block.row_block * i32(kTileRows) + i32(row);
    seq = index / params.heads_per_kv;
    head = block.kv_head * params.heads_per_kv + index % params.heads_per_kv;
    exists = seq < params.seq_len_q;
  }
};

struct Item {
  i32 sequence;
  i32 length;      // tokens of the sequence
  i32 begin_tile;  // tiles [begin_tile, end_tile) of it
  i32 end_tile;
  bool is_first;   // of this worker

  __device__ __forceinline__ i32 num_tiles() const { return end_tile - begin_tile; }
};

template <i32 kTileTokens>
class WorkerItems {
 public:
  __device__ __forceinline__ WorkerItems(const DecodeParams& params, i32 worker) : params_(params) {
    begin_sequence_ = sequence_ = params.work[2 * worker];
    begin_tile_ = params.work[2 * worker + 1];
    end_sequence_ = params.work[2 * worker + 2];
    end_tile_ = params.work[2 * worker + 3];
  }

  // Fills `item` with the next item, or returns false. Empty sequences are items without tiles.
  __device__ __forceinline__ bool next(Item& item) {
    const bool is_first = sequence_ == begin_sequence_;
    const i32 begin = is_first ? begin_tile_ : 0;
    if (sequence_ > end_sequence_ || (sequence_ == end_sequence_ && begin >= end_tile_)) return false;
    const i32 length = params_.cache_seqlens[sequence_];
    const i32 tiles = tiles_of(length, kTileTokens);
    const i32 end = sequence_ == end_sequence_ ? min(end_tile_, tiles) : tiles;
    item = {sequence_, length, begin, max(begin, end), is_first};
    ++sequence_;
    return true;
  }

 private:
  const DecodeParams& params_;
  i32 begin_sequence_, begin_tile_, end_sequence_, end_tile_, sequence_;
};

// One tile of an item, as the consumers need it.
struct Tile {
  u32 stage;
  u32 phase;
  i32 valid_tokens;  // tokens of the sequence from the tile's first one on
  bool needs_mask;   // some row of the CTA sees fewer
};

// The tiles of an item; `tiles_before` counts those of earlier items, which fixes stages and phases.
template <u32 kTileTokens, u32 kStages>
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
            first_token + i32(kTileTokens) > shortest_limit};
  }
};
