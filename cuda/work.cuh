// A worker's share of the schedule: the items (sequence, range of tiles) that every role of its CTAs walks in step.
#pragma once
#include "params.cuh"
#include "schedule.cuh"

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
