// The split-KV schedule's arithmetic, free of CUDA so that a host compiler can check it against mlacore/plan.py.
//
// All sequences lie end to end on a line, each on its span, and equal cuts of the line, one stretch a worker, are the
// schedule; a cut inside a sequence splits it. Two ways to lay them out:
//
// packed   a span is the sequence's tiles and an item cost more, which is what another item costs a worker (prologue,
//          epilogue, merge). Stretches balance tiles + cost * (items - 1) within one tile.
// aligned  a span is a whole number of stretches: no worker has more than one item. Taken where stretches get no
//          longer.
//
// Positions fit 32 bits, which divide several times faster than 64: of a longer sequence than kMaxPlannedTiles over the
// batch's size, the rest is left to its last worker. Garbage lengths must not wrap around and send a write outside the
// schedule.
//
// A batch-invariant schedule cuts every sequence by its own length instead, a worker a split.
#pragma once

#ifndef MLA_SCHEDULE_FUNCTION
#define MLA_SCHEDULE_FUNCTION __device__ __forceinline__
#endif

// Quotient of two numbers that are not negative: without signs it is half the instructions.
MLA_SCHEDULE_FUNCTION int quotient(int a, int b) { return int(unsigned(a) / unsigned(b)); }

// Tiles of `tile` tokens that a sequence of `length` tokens fills; a negative length counts as empty.
MLA_SCHEDULE_FUNCTION int tiles_of(int length, int tile) { return length > 0 ? (length - 1) / tile + 1 : 0; }

// An empty sequence still is one item, which writes out = 0 and lse = -inf.
MLA_SCHEDULE_FUNCTION int item_extent(int tiles) { return tiles > 0 ? tiles : 1; }

// Positions a worker walks; `total` is the line's length.
MLA_SCHEDULE_FUNCTION int worker_extent(int total, int workers) {
  const int extent = quotient(total + workers - 1, workers);
  return extent > 0 ? extent : 1;
}

// Workers of `extent` positions that a sequence takes when it shares none with another.
MLA_SCHEDULE_FUNCTION int own_workers(int tiles, int extent) {
  return quotient(item_extent(tiles) + extent - 1, extent);
}

// Positions from one sequence to the next.
MLA_SCHEDULE_FUNCTION int span_of(int tiles, int extent, bool is_aligned, int item_cost_tiles) {
  return is_aligned ? own_workers(tiles, extent) * extent : tiles + item_cost_tiles;
}

// Batch-invariant: stretch of a sequence's splits, from its own tiles alone.
MLA_SCHEDULE_FUNCTION int invariant_extent(int tiles, int split_tiles, int max_splits) {
  const int extent = item_extent(tiles), splits = quotient(extent - 1, split_tiles) + 1;
  const int bounded = splits < max_splits ? splits : max_splits;
  return quotient(extent - 1, bounded) + 1;
}

// First and last worker of the sequence at `position`.
MLA_SCHEDULE_FUNCTION int first_worker(int position, int extent, int workers) {
  const int worker = quotient(position, extent);
  return worker < workers ? worker : workers - 1;
}
MLA_SCHEDULE_FUNCTION int last_worker(int position, int tiles, int extent, int workers) {
  return first_worker(position + item_extent(tiles) - 1, extent, workers);
}

// The workers that begin at this sequence are [begin_workers_from, last_worker]: those whose first position lies past
// the previous sequence's last one.
MLA_SCHEDULE_FUNCTION int begin_workers_from(int previous_last_position, int extent) {
  return previous_last_position < 0 ? 0 : quotient(previous_last_position, extent) + 1;
}

// Tile at which worker `worker` begins when its first sequence lies at `position`.
MLA_SCHEDULE_FUNCTION int begin_tile(int worker, int extent, int position) {
  const int tile = worker * extent - position;
  return tile > 0 ? tile : 0;
}

// Where a split's partial state goes: each worker has one slot for its first item and one for any later item; only its
// first and its last item can be shared with other workers.
MLA_SCHEDULE_FUNCTION int partial_slot(int worker, bool is_first_item) { return 2 * worker + (is_first_item ? 0 : 1); }
