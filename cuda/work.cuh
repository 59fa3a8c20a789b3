// What a CTA works on: a block of query rows, and its worker's share of the schedule, the items (sequence, range of tiles)
// that every role walks in step.
#pragma once
#include "params.cuh"
#include "schedule.cuh"

constexpr u32 kRowsPerBlock = MLA_TILE_ROWS;

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
    const i32 index = block.row_block * i32(kRowsPerBlock) + i32(row);
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
