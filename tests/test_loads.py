"""The producer warp (cuda/load_kv.cuh), run on the host: which rows of which pages land where, for any plan. And what
comes of hints, right or wrong (cuda/first_tile.cuh).

The host compiler builds the real source, the 32 lanes as threads that meet in its shuffles. What would be a TMA copy
is written down.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import on_host
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlacore import params
from mlacore.params import DECODE_PARAMS, HEAD_DIM_QK, PAGE_SIZES, TILE_ROWS, TILE_TOKENS
from mlacore.plan import schedule, worker_items

STAGES, CHUNKS, CHUNK_COLUMNS = 2, HEAD_DIM_QK // 64, 64
NUM_PAGES = 1 << 20
ROW_BYTES = HEAD_DIM_QK * 2
CLUSTERS = sorted({*params.CLUSTER_CTAS, *(ctas for _, ctas in params.SWAPPED_VARIANTS)})
PARTS = CHUNKS // params.PART_CHUNKS
# Of a load: what it is, stage, chunk, first row in the tile, first column, first row in the page, KV head, page. Also
# written down, filled up with zeros: which barrier of the first tile the producer waits for, or which part of a tile
# (stage, part, parity), and what it prefetches of the next tiles (first row of the pool, rows).
FIELDS = 8
LOADED, ASKED, AWAITED_LANDED, AWAITED_JUDGED, AWAITED_DISCARDED, AWAITED_PART, PREFETCHED = range(7)
NOT_ASKED, IN_VAIN, RIGHT = range(3)  # verdicts

# Stands for ptx.cuh: what the producer uses of it.
PTX = r"""
#pragma once
#include "types.cuh"
#include <mutex>
#include <vector>
struct TensorMap { u64 opaque[16]; };
inline u32 rank_of_cta;
inline std::vector<int> events;
inline u32 bytes_expected[2];  // of tiles; of the first one that was asked for on a hint
inline u16 kv[STAGES][CHUNKS][64 * 64];
inline u64 kv_full[STAGES][PARTS], kv_empty[STAGES][2];
template <typename T> u32 shared_address(const T& object) {
  return u32(reinterpret_cast<const char*>(&object) - reinterpret_cast<const char*>(kv));
}
template <typename T> u32 shared_address(T* object) {
  return u32(reinterpret_cast<const char*>(object) - reinterpret_cast<const char*>(kv));
}
inline u32 landed_at, judged_at, discarded_at;  // barriers of the first tile
inline bool is_landed(u32 barrier) { return barrier - landed_at < PARTS * sizeof(u64); }
inline void note(int what, int a = 0, int b = 0, int c = 0) {
  for (int value : {what, a, b, c, 0, 0, 0, 0}) events.push_back(value);
}
inline u32 cluster_ctarank() { return rank_of_cta; }
inline bool knows_barriers;  // other CTAs have initialised theirs
inline void barrier_cluster_arrive() {}
inline void barrier_cluster_wait() { if (threadIdx.x == 0) knows_barriers = true; }
inline void __syncthreads() {}
inline void mbarrier_init(u32, u32) {}
inline std::vector<int> arrivals;  // at barriers of kv_full[0]: part, and how many parts had been awaited
inline int parts_awaited;
inline void mbarrier_arrive(u32 barrier) {
  const u32 part = (barrier - shared_address(&kv_full[0][0])) / sizeof(u64);
  if (part < PARTS) arrivals.insert(arrivals.end(), {int(part), parts_awaited});
}
inline void mbarrier_arrive_cluster(u32, u32) {}
// What the other CTA is told, and what it says; 100 for a word that goes elsewhere.
inline u32 verdict_of_other;
inline int told;
inline void st_async_cluster(u32 address, u32 value, u32 barrier, u32 rank) {
  *reinterpret_cast<u32*>(reinterpret_cast<char*>(kv) + i32(address)) = verdict_of_other;
  told = barrier == judged_at && rank == (rank_of_cta ^ 1) ? int(value) : 100;
}
void lanes_meet();
inline std::vector<int> waits;  // of lane 0: stage, half, parity
inline bool mbarrier_try_wait_parity(u32 address, u32 parity) {
  if (is_landed(address) || address == judged_at || address == discarded_at) {
    lanes_meet();
    if (threadIdx.x == 0) {
      if (is_landed(address)) ++parts_awaited;
      note(is_landed(address) ? AWAITED_LANDED : address == judged_at ? AWAITED_JUDGED : AWAITED_DISCARDED);
    }
    lanes_meet();
    return true;
  }
  if (threadIdx.x != 0 || !knows_barriers) return true;
  const u32 part = (address - shared_address(&kv_full[0][0])) / sizeof(u64);
  if (part < STAGES * PARTS) {
    note(AWAITED_PART, part / PARTS, part % PARTS, parity);
    return true;
  }
  const u32 barrier = (address - shared_address(&kv_empty[0][0])) / sizeof(u64);
  for (u32 value : {barrier / 2, barrier % 2, parity}) waits.push_back(int(value));
  return true;
}
inline u32 verdict_bytes;
inline void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes) {
  (barrier == judged_at ? verdict_bytes : bytes_expected[is_landed(barrier)]) += bytes;
}
inline void fence_proxy_async() {}
inline void st_shared_zero_16(u32) {}
inline void trap() {}
inline void previous_kernel_ends();
inline void griddepcontrol_wait() { previous_kernel_ends(); }
inline i32 ld_relaxed_gpu(const i32* address) { return *address; }
inline bool has_begun;  // phase 0 is over; before, the one with parity 1 counts as over
inline bool has_tested_early;
inline bool mbarrier_test_parity(u32, u32 parity) {
  if (threadIdx.x == 0 && !knows_barriers) has_tested_early = true;
  return parity == 1 || has_begun;
}
inline bool has_wrong_barrier, has_waited, has_loaded_early;
inline std::vector<long long> prefetched;  // address, bytes
inline std::mutex prefetched_mutex;
inline void cp_async_bulk_prefetch(const void* source, u32 bytes) {
  const std::lock_guard<std::mutex> lock(prefetched_mutex);
  if (has_waited) return note(PREFETCHED, int((long long)(source) / ROW_BYTES), int(bytes / ROW_BYTES));
  prefetched.insert(prefetched.end(), {(long long)(source), bytes});
}
inline u64 createpolicy_evict_first() { return 1; }
inline u64 createpolicy_evict_normal() { return 2; }
// `map` says how many rows and chunks a box has. Its barrier is that of its part.
inline void cp_async_bulk_tensor_5d(u32 destination, const TensorMap* map, u32 barrier, i32 c0, i32 c1, i32 c2, i32 c3,
                                    i32 c4, u64) {
  if (!has_waited) has_loaded_early = true;
  for (int chunk = 0; chunk < int(map->opaque[1]); ++chunk) {
    const int row = destination / 128 + chunk * map->opaque[0], stage = row / 64 / CHUNKS, at = row / 64 % CHUNKS;
    for (int value : {int(is_landed(barrier)), stage, at, row % 64, c0 + 64 * (c2 + chunk), c1, c3, c4}) {
      events.push_back(value);
    }
    const u32 first = is_landed(barrier) ? landed_at : shared_address(&kv_full[stage][0]);
    if (barrier != first + at / (CHUNKS / PARTS) * sizeof(u64)) has_wrong_barrier = true;
  }
}
inline void cp_async_bulk_tensor_5d_multicast(u32 d, const TensorMap* m, u32 b, i32 c0, i32 c1, i32 c2, i32 c3, i32 c4,
                                              u16) {
  cp_async_bulk_tensor_5d(d, m, b, c0, c1, c2, c3, c4, 0);
}
"""

SHIM = r"""
#include <algorithm>
#include <barrier>
#include <thread>
#include <vector>
#define __device__
#define __forceinline__ inline
using std::max;
using std::min;
struct Index { unsigned x; };
static thread_local Index threadIdx;
struct int2 { int x, y; };
static float __int_as_float(int) { return 0; }
static std::barrier<> warp(32);
static int lanes[32];
static void __syncwarp() { warp.arrive_and_wait(); }
static int __shfl_sync(unsigned, int value, int lane) {
  lanes[threadIdx.x % 32] = value;
  warp.arrive_and_wait();
  const int received = lanes[lane & 31];
  warp.arrive_and_wait();
  return received;
}
void lanes_meet() { warp.arrive_and_wait(); }
#include "load_kv.cuh"
static TensorMap pool_map;
// What the kernel is given, and the arrays as they will be when the previous kernel has ended: before, table and
// lengths may be others, the schedule is zeros of the same size, and what is read of it is a hint.
static DecodeParams given;
static const DecodeParams* true_arrays;
void previous_kernel_ends() {
  warp.arrive_and_wait();
  if (threadIdx.x == 0) {
    given.block_table = true_arrays->block_table;
    given.cache_seqlens = true_arrays->cache_seqlens;
    given.work = true_arrays->work;
    has_waited = true;
  }
  warp.arrive_and_wait();
}
template <u32 kCtas>
using Tile0 = FirstTile<kCtas, PARTS, CHUNKS / PARTS * kChunkBytes>;
template <u32 kCtas>
static Tile0<kCtas> first_tile;
template <u32 kCtas>
static void place_barriers() {
  first_tile<kCtas> = {};
  landed_at = shared_address(&first_tile<kCtas>.landed[0]);
  judged_at = shared_address(&first_tile<kCtas>.judged);
  discarded_at = shared_address(&first_tile<kCtas>.discarded);
}
template <u32 kCtas>
static void producer(const DecodeParams& params, const Block& block, const int* hint) {
  static u64 begun;
  load_kv<kCtas>(kv, kv_full, kv_empty, first_tile<kCtas>, begun, &pool_map, params, block,
                 Stretch::from_hint(hint[threadIdx.x % 4]));
}
template <typename Lane>
static void run_warp(const Lane& run_lane) {
  std::vector<std::thread> threads;
  for (unsigned lane = 0; lane < 32; ++lane) threads.emplace_back([&, lane] {
    threadIdx.x = lane;
    run_lane();
  });
  for (std::thread& thread : threads) thread.join();
}
extern "C" int run(const DecodeParams* params, const int* box, int ctas, int rank, int worker, int kv_head,
                   const int* hint, const int* table_before, const int* lengths_before, int other, int* out,
                   int capacity) {
  pool_map = {{u64(box[1]), u64(box[2])}};
  events.clear();
  waits.clear();
  has_wrong_barrier = has_loaded_early = false;
  knows_barriers = ctas == 1;
  bytes_expected[0] = bytes_expected[1] = verdict_bytes = 0;
  told = -1;
  has_tested_early = false;
  rank_of_cta = rank;
  verdict_of_other = other;
  ctas == 1 ? place_barriers<1>() : place_barriers<2>();
  const Block block = {worker, kv_head, rank};
  given = *params;
  true_arrays = params;
  has_waited = has_begun = false;
  const std::vector<int> zeros(std::max(params->batch, 2 * worker + 4));
  given.work = zeros.data();
  given.cache_seqlens = lengths_before;
  given.block_table = table_before;
  run_warp([&] { ctas == 1 ? producer<1>(given, block, hint) : producer<2>(given, block, hint); });
  if (!has_waited || has_loaded_early) return -2;
  if (has_wrong_barrier) return -3;
  if (has_tested_early) return -4;
  const u32 own = ctas == 1 ? first_tile<1>.verdicts[0] : first_tile<2>.verdicts[0];
  if (ctas == 2 && (told != int(own) || verdict_bytes != sizeof(u32))) return -5;
  told = int(own);
  if (int(events.size()) > capacity) return -1;
  std::copy(events.begin(), events.end(), out);
  return int(events.size());
}
extern "C" int verdict() { return told; }
extern "C" int hand_over(int ctas, int own, int other, int* out) {
  arrivals.clear();
  parts_awaited = 0;
  ctas == 1 ? place_barriers<1>() : place_barriers<2>();
  const auto hand = [&](auto& tile) {
    tile.verdicts[0] = own;
    tile.verdicts[1] = other;
    run_warp([&] { tile.hand_over(kv_full[0]); });
  };
  if (ctas == 1) hand(first_tile<1>);
  if (ctas == 2) hand(first_tile<2>);
  std::copy(arrivals.begin(), arrivals.end(), out);
  return int(arrivals.size());
}
extern "C" int prefetch(const DecodeParams* params, int row_block, int worker, int begun, long long* out,
                        int capacity) {
  prefetched.clear();
  has_waited = false;
  has_begun = begun != 0;
  const Block block = {worker, 0, row_block};
  u64 barrier = 0;
  run_warp([&] {
    const Stretch stretch = Stretch::from_hint(Stretch::read_hint(*params, worker));
    PageIds pages(*params);
    pages.load(stretch.first_sequence, stretch.first_tile);
    const int length = stretch.leads_to_items(*params) ? params->cache_seqlens[stretch.first_sequence] : 0;
    prefetch_first_tile(*params, block, pages, stretch.leads_to_tile(length) ? length : 0, barrier);
  });
  if (int(prefetched.size()) > capacity) return -1;
  std::copy(prefetched.begin(), prefetched.end(), out);
  return int(prefetched.size());
}
extern "C" unsigned expected_bytes(int of_first) { return bytes_expected[of_first]; }
extern "C" int waited(int* out, int capacity) {
  if (int(waits.size()) > capacity) return -1;
  std::copy(waits.begin(), waits.end(), out);
  return int(waits.size());
}
"""


@pytest.fixture(scope="module")
def library():
    defines = {"MLA_TILE_ROWS": TILE_ROWS, "MLA_TILE_TOKENS": TILE_TOKENS, "STAGES": STAGES, "CHUNKS": CHUNKS}
    defines |= {"PARTS": PARTS, "MLA_HEAD_DIM_QK": HEAD_DIM_QK, "AWAITED_LANDED": AWAITED_LANDED}
    defines |= {"AWAITED_JUDGED": AWAITED_JUDGED, "AWAITED_DISCARDED": AWAITED_DISCARDED}
    defines |= {"AWAITED_PART": AWAITED_PART, "PREFETCHED": PREFETCHED, "ROW_BYTES": ROW_BYTES}
    return on_host.build(SHIM, defines, ptx=PTX)


class Produced(NamedTuple):
    """What a CTA's producer does."""

    events: list[tuple[int, ...]]
    announced: int  # bytes of tiles
    announced_first: int  # bytes of what it has asked for on a hint
    verdict: int  # on the hint, which the other CTA of a cluster is told, too
    waits: list[list[int]]


@pytest.fixture(scope="module")
def producer(library):
    """``run(record, ctas, rank, worker, hint, before, other)``.

    `before` are table and lengths before the previous kernel's end, `other` is the other CTA's verdict.
    """
    library.expected_bytes.restype = ctypes.c_uint

    def run(
        record: np.ndarray,
        ctas: int,
        rank: int,
        worker: int,
        hint: np.ndarray,
        before: tuple[np.ndarray, np.ndarray],
        other: int,
    ) -> Produced:
        events = np.empty(1 << 18, np.int32)
        box = (ctypes.c_int * 5)(*params.pool_box(1 << int(record["page_size_log2"][0]), ctas))
        at = [ctypes.c_void_p(array.ctypes.data) for array in (record, hint, *before, events)]
        count = library.run(at[0], box, ctas, rank, worker, 0, *at[1:4], other, at[4], events.size)
        assert count != -2, "it has not waited for the previous kernel"
        assert count != -3, "a box comes with the barrier of another part"
        assert count != -4, "a barrier is tested before it is known to be initialised"
        assert count != -5, "the other CTA is told something else"
        assert count >= 0, "more loads than expected"
        waits = np.empty(1 << 16, np.int32)
        num_waits = library.waited(ctypes.c_void_p(waits.ctypes.data), waits.size)
        assert num_waits >= 0, "more waits than expected"
        return Produced(
            [tuple(event) for event in events[:count].reshape(-1, FIELDS).tolist()],
            library.expected_bytes(0),
            library.expected_bytes(1),
            library.verdict(),
            waits[:num_waits].reshape(-1, 3).tolist(),
        )

    return run


def expected_loads(
    table: np.ndarray, lengths: np.ndarray, page_size: int, work: np.ndarray, worker: int, ctas: int, rank: int
) -> list[list[tuple[int, ...]]]:
    """In order, by the definition: every tile of the worker's items, part by part, this CTA's share of the rows."""
    return [
        tile_loads(table, page_size, sequence, tile, ctas, rank, position % STAGES)
        for position, (sequence, tile) in enumerate(worker_tiles(lengths, work, worker))
    ]


def with_prefetches(
    loads: list[list[tuple[int, ...]]],
    table: np.ndarray,
    lengths: np.ndarray,
    page_size: int,
    work: np.ndarray,
    worker: int,
    ctas: int,
    rank: int,
) -> list[list[tuple[int, ...]]]:
    """The worker's loads, tile by tile, and what it prefetches: this CTA's share of the next tile of the item.

    Before the tile's loads, once the tile before begins to come in. The worker's first tiles are prefetched by nobody;
    its third one is itself, and the fourth one behind the loads of the third one's first part.
    """
    found: list[list[tuple[int, ...]]] = []
    share = TILE_TOKENS // ctas
    tiles = list(worker_tiles(lengths, work, worker))
    first_sequence = next(iter(worker_items(work, worker)), (None,))[0]

    def prefetch(sequence: int, tile: int) -> list[tuple[int, ...]]:
        page, row = divmod(tile * TILE_TOKENS + rank * share, page_size)
        return [(PREFETCHED, int(table[sequence, page]) * page_size + row, share, 0, 0, 0, 0, 0)]

    for position, ((sequence, tile), of_tile) in enumerate(zip(tiles, loads, strict=True)):
        of_item = [other for of, other in tiles if of == sequence]
        has_next = tile < of_item[-1] and (tile + 1 - of_item[0]) % 32 > 0  # page ids come 32 at a time
        next_ = prefetch(sequence, tile + 1) if has_next else []
        before = [(AWAITED_PART, (position - 1) % STAGES, 0, (position - 1) // STAGES % 2, 0, 0, 0, 0)]
        of_part = len(of_tile) // PARTS
        number = tile - of_item[0] if sequence == first_sequence else STAGES + 1
        if number < STAGES:
            found.append(of_tile)
        elif number == STAGES:
            found.append([*before, *prefetch(sequence, tile), *of_tile[:of_part], *next_, *of_tile[of_part:]])
        else:
            found.append([*(before if has_next else []), *next_, *of_tile])
    return found


def tile_loads(
    table: np.ndarray, page_size: int, sequence: int, tile: int, ctas: int, rank: int, stage: int, what: int = LOADED
) -> list[tuple[int, ...]]:
    share = TILE_TOKENS // ctas
    box, loads = min(page_size, share), []
    for chunks in np.split(np.arange(CHUNKS), PARTS):
        for row in range(rank * share, (rank + 1) * share, box):
            column, place = divmod(tile * TILE_TOKENS + row, page_size)
            page = int(table[sequence, column]) if column < table.shape[1] else -1
            loads += [(what, stage, int(c), row, int(c) * CHUNK_COLUMNS, place, 0, page) for c in chunks]
    return loads


def worker_tiles(lengths: np.ndarray, work: np.ndarray, worker: int) -> Iterator[tuple[int, int]]:
    """Sequence and tile of all that a worker attends to."""
    for sequence, begin, end in worker_items(work, worker):
        tiles = -(-max(int(lengths[sequence]), 0) // TILE_TOKENS)
        for tile in range(begin, tiles if end is None else min(end, tiles)):
            yield sequence, tile


def record_of(table: np.ndarray, lengths: np.ndarray, work: np.ndarray, page_size: int) -> np.ndarray:
    """Parameters of a launch with one KV head, one row block and a pool of NUM_PAGES pages without gaps."""
    record = np.zeros(1, DECODE_PARAMS)
    for name, array in {"block_table": table, "cache_seqlens": lengths, "work": work}.items():
        record[name] = array.ctypes.data
    record["batch"], record["max_pages"] = table.shape
    record["block_table_stride"] = table.shape[1]
    record["page_size_log2"], record["num_pages"] = page_size.bit_length() - 1, NUM_PAGES
    record["kv_stride_page"], record["prefetches_first"] = page_size * HEAD_DIM_QK, 1
    record["num_kv_heads"] = record["row_blocks"] = record["blocks_per_worker"] = 1
    return record


def hint_of(data: st.DataObject | None, work: np.ndarray, worker: int) -> np.ndarray:
    """What was read of the schedule before the previous kernel had ended: the same, another worker's, or anything."""
    kind = "right" if data is None else data.draw(st.sampled_from(("right", "other", "any")))
    if kind == "any":
        hint = data.draw(st.lists(st.one_of(st.integers(-2, 12), INT32), min_size=4, max_size=4))
        return np.array(hint, np.int32)
    other = worker if kind == "right" else data.draw(st.integers(0, len(work) - 2))
    return np.ascontiguousarray(work[other : other + 2], np.int32).reshape(4)


INT32 = st.integers(-(1 << 31), (1 << 31) - 1)
LENGTHS = st.lists(st.one_of(st.just(0), st.integers(-3, 200), st.integers(0, 9000)), min_size=1, max_size=7)


@settings(max_examples=60)
@given(
    st.data(),
    LENGTHS,
    st.integers(1, 12),
    st.sampled_from(PAGE_SIZES),
    st.sampled_from(CLUSTERS),
    st.booleans(),
)
@example(None, [0, 700], 1, 64, 1, False)  # a worker whose first item has no tiles
@example(None, [0, 9000, 0, 0, 5000], 2, 16, 2, False)
@example(None, [9000], 1, 256, 2, False)
@example(None, [9000, 64], 3, 64, 1, True)  # without data: nothing is left of what was planned
@example(None, [9000], 2, 64, 2, True)
def test_every_tile_comes_from_its_own_pages(producer, data, planned, num_workers, page_size, ctas, is_stale):
    """Lengths that have moved on since the plan was made included, tables too narrow for them, and wrong hints."""
    planned = np.array(planned, np.int32)
    lengths = planned
    if is_stale:
        drawn = st.lists(st.integers(0, 9000), min_size=len(planned), max_size=len(planned))
        lengths = np.array(data.draw(drawn), np.int32) if data is not None else np.zeros_like(planned)
    work, _ = schedule(planned, num_workers)
    columns = max(1, -(-int(max(lengths.max(), planned.max(), 1)) // page_size) - (page_size == 32))
    table = np.arange(len(planned) * columns, dtype=np.int32).reshape(-1, columns) * 7 + 3
    record = record_of(table, lengths, work, page_size)
    prefetches = ctas > 1 and page_size >= TILE_TOKENS
    record["prefetches_next"] = prefetches
    # Before the previous kernel's end: the same, or a table with other pages, some outside the pool, and other lengths.
    table_before, lengths_before = table, planned
    if data is not None:
        if data.draw(st.booleans()):
            table_before = np.ascontiguousarray(table[::-1] - data.draw(st.sampled_from((0, 9))))
        drawn = st.lists(st.one_of(st.integers(-3, 9000), INT32), min_size=len(table), max_size=len(table))
        others = drawn.map(lambda values: np.array(values, np.int32))
        lengths_before = data.draw(st.one_of(st.just(lengths), st.just(planned), others))
    for worker in range(num_workers):
        hint = hint_of(data, work, worker)
        for rank in range(ctas):
            other = RIGHT if data is None else data.draw(st.sampled_from((NOT_ASKED, IN_VAIN, RIGHT)))
            expected = expected_loads(table, lengths, page_size, work, worker, ctas, rank)
            asked = hinted_loads(table_before, lengths_before, page_size, hint, ctas, rank)
            produced = producer(record, ctas, rank, worker, hint, (table_before, lengths_before), other)
            is_right = len(asked) > 0 and len(expected) > 0 and begins_like(hint, work, worker)
            is_right = is_right and [load[1:] for load in asked] == [load[1:] for load in expected[0]]
            assert produced.verdict == (RIGHT if is_right else IN_VAIN if asked else NOT_ASKED)
            is_taken = is_right and (ctas == 1 or other == RIGHT)
            shares = (len(asked) > 0) + (ctas > 1 and other != NOT_ASKED)
            whole = expected
            if prefetches:
                whole = with_prefetches(expected, table, lengths, page_size, work, worker, ctas, rank)
            remaining = [event for tile in whole[is_taken:] for event in tile]
            split = len(produced.events) - len(remaining)
            assert produced.events[split:] == remaining
            assert [event for event in produced.events[:split] if event[0] == ASKED] == asked
            # What was asked for in vain has landed, in both CTAs, before anything is loaded to the same place.
            waits = [event[0] for event in produced.events[:split] if event[0] != ASKED]
            vain = [] if is_taken else [AWAITED_LANDED] * PARTS + [AWAITED_DISCARDED] * (ctas > 1)
            second = [AWAITED_LANDED] * (is_taken and ctas == 1 and first_item_tiles(lengths, work, worker) > 1)
            assert waits == [AWAITED_JUDGED] * (ctas > 1) + vain + second
            assert produced.announced_first == shares * TILE_TOKENS * HEAD_DIM_QK * 2 // ctas
            # Each CTA waits for the bytes of whole tiles, whoever of the cluster sends them.
            assert produced.announced == (len(expected) - is_taken) * TILE_TOKENS * HEAD_DIM_QK * 2
            # Both halves of a stage are handed back before it is loaded again; of a cluster, before its CTAs exit, too.
            rounds = range(is_taken, len(expected) + (STAGES if ctas > 1 else 0))
            assert produced.waits == [[n % STAGES, half, (n // STAGES + 1) % 2] for n in rounds for half in range(2)]


@pytest.mark.parametrize(("end_tile", "asks"), [(5, False), (6, True)])
def test_a_hint_that_ends_before_it_begins_leads_nowhere(producer, end_tile, asks):
    lengths, table = np.array([9000], np.int32), np.arange(200, dtype=np.int32)[None]
    work, _ = schedule(lengths, 1)
    record = record_of(table, lengths, work, TILE_TOKENS)
    hint = np.array([0, 5, 0, end_tile], np.int32)  # from tile 5 of sequence 0 to there
    produced = producer(record, 1, 0, 0, hint, (table, lengths), RIGHT)
    assert produced.verdict == (IN_VAIN if asks else NOT_ASKED)
    assert produced.events[0][0] == (ASKED if asks else AWAITED_LANDED)


def begins_like(hint: np.ndarray, work: np.ndarray, worker: int) -> bool:
    """Whether the hint's first item begins where the worker's first one does."""
    return bool((hint[:2] == work[worker]).all())


def first_item_tiles(lengths: np.ndarray, work: np.ndarray, worker: int) -> int:
    sequences = [sequence for sequence, _ in worker_tiles(lengths, work, worker)]
    return sequences.count(work[worker][0])


def hinted_loads(
    table: np.ndarray, lengths: np.ndarray, page_size: int, hint: np.ndarray, ctas: int, rank: int
) -> list[tuple[int, ...]]:
    """What a hint leads to: the first tile, if there is one and its share lies in one page of the pool."""
    sequence, tile, last_sequence, last_end_tile = (int(word) for word in hint)
    if last_end_tile <= 0:
        last_sequence, last_end_tile = int(np.int64(last_sequence - 1).astype(np.int32)), (1 << 31) - 1
    if page_size < TILE_TOKENS // ctas or sequence > last_sequence or not 0 <= sequence < len(table):
        return []
    if not 0 <= tile < -(-max(int(lengths[sequence]), 0) // TILE_TOKENS):
        return []
    if sequence == last_sequence and tile >= last_end_tile:
        return []
    column = (tile * TILE_TOKENS + rank * (TILE_TOKENS // ctas)) // page_size
    if column >= table.shape[1] or not 0 <= table[sequence, column] < NUM_PAGES:
        return []
    return tile_loads(table, page_size, sequence, tile, ctas, rank, 0, ASKED)


@pytest.mark.parametrize("ctas", CLUSTERS)
def test_the_first_tile_is_handed_over_if_the_hint_was_right_everywhere(library, ctas):
    for own in (NOT_ASKED, IN_VAIN, RIGHT):
        for other in (NOT_ASKED, IN_VAIN, RIGHT):
            out = np.zeros(4 * PARTS, np.int32)
            count = library.hand_over(ctas, own, other, ctypes.c_void_p(out.ctypes.data))
            is_right = own == RIGHT and (ctas == 1 or other == RIGHT)
            # Each part once it has landed.
            assert out[:count].tolist() == ([value for part in range(PARTS) for value in (part, part + 1)] * is_right)


KV = 1 << 40  # an address, which nobody reads
PIECE_TOKENS = 16


@pytest.fixture(scope="module")
def prefetch(library):
    """``run(record, row_block, worker, begun)``: what one CTA prefetches, ``[n, 2]``: address, bytes."""

    def run(record: np.ndarray, row_block: int, worker: int, begun: bool) -> np.ndarray:
        out = np.empty(1 << 10, np.int64)
        record_at, out_at = ctypes.c_void_p(record.ctypes.data), ctypes.c_void_p(out.ctypes.data)
        count = library.prefetch(record_at, row_block, worker, int(begun), out_at, out.size)
        assert count >= 0, "more than expected"
        return out[:count].reshape(-1, 2)

    return run


@settings(max_examples=60)
@given(st.data(), LENGTHS, st.integers(1, 12), st.sampled_from(PAGE_SIZES), st.integers(1, 9))
def test_hints_prefetch_the_first_tile_and_nothing_else(prefetch, data, lengths, num_workers, page_size, row_blocks):
    lengths = np.array(lengths, np.int32)
    work, _ = schedule(lengths, num_workers)
    columns, num_pages = max(1, -(-int(lengths.max()) // page_size)), 3 * len(lengths)
    is_right = data.draw(st.booleans())
    pages = st.integers(0, num_pages - 1) if is_right else st.one_of(st.integers(-2, num_pages + 1), INT32)
    size = len(lengths) * columns
    table = np.array(data.draw(st.lists(pages, min_size=size, max_size=size)), np.int32).reshape(-1, columns)
    seen = np.ascontiguousarray(work, np.int32)
    if not is_right:
        values = st.lists(st.one_of(st.integers(-2, 12), INT32), min_size=seen.size, max_size=seen.size)
        seen = np.array(data.draw(values), np.int32)
    record = record_of(table, lengths, seen, page_size)
    record["kv"], record["kv_stride_page"] = KV, (page_size + 3) * HEAD_DIM_QK
    record["num_pages"], record["row_blocks"] = num_pages, row_blocks
    page_bytes = int(record["kv_stride_page"][0]) * 2
    for worker in range(num_workers):
        pieces = [prefetch(record, block, worker, False) for block in range(row_blocks)]
        found = [tuple(piece) for piece in np.concatenate(pieces).tolist()]
        for address, size in found:
            page, inside = divmod(address - KV, page_bytes)
            assert 0 <= page < num_pages
            assert inside % ROW_BYTES == 0
            assert inside + size <= page_size * ROW_BYTES
        if is_right:
            first = next(iter(worker_items(work, worker)), None)
            items = [tile for tile in worker_tiles(lengths, work, worker) if tile[0] == first[0]][:1]
            expected = []
            for sequence, tile in items:
                for token in range(tile * TILE_TOKENS, (tile + 1) * TILE_TOKENS, PIECE_TOKENS):
                    if token < lengths[sequence]:
                        column, row = divmod(token, page_size)
                        address = KV + int(table[sequence, column]) * page_bytes + row * ROW_BYTES
                        expected.append((address, PIECE_TOKENS * ROW_BYTES))
            assert sorted(found) == sorted(expected)
        assert all(len(prefetch(record, block, worker, True)) == 0 for block in range(row_blocks))
    record["prefetches_first"] = 0
    assert len(prefetch(record, 0, 0, False)) == 0
