"""The producer warp (cuda/load_kv.cuh) and what comes of its hints (cuda/first_tile.cuh), run on the host.

The host compiler builds the real source, the 32 lanes as threads that meet in its shuffles. What would be a TMA copy
is written down.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
import on_host

from mlacore import params
from mlacore.params import HEAD_DIM_QK, TILE_ROWS, TILE_TOKENS

STAGES, CHUNKS = 2, HEAD_DIM_QK // 64
ROW_BYTES = HEAD_DIM_QK * 2
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


class Produced(NamedTuple):
    """What a CTA's producer does."""

    events: list[tuple[int, ...]]
    announced: int  # bytes of tiles
    announced_first: int  # bytes of what it has asked for on a hint
    verdict: int  # on the hint, which the other CTA of a cluster is told, too
    waits: list[list[int]]


class Producer:
    """The sources, built: what one CTA does, of launches given by their parameters (a record of DECODE_PARAMS)."""

    def __init__(self) -> None:
        defines = {"MLA_TILE_ROWS": TILE_ROWS, "MLA_TILE_TOKENS": TILE_TOKENS, "STAGES": STAGES, "CHUNKS": CHUNKS}
        defines |= {"PARTS": PARTS, "MLA_HEAD_DIM_QK": HEAD_DIM_QK, "AWAITED_LANDED": AWAITED_LANDED}
        defines |= {"AWAITED_JUDGED": AWAITED_JUDGED, "AWAITED_DISCARDED": AWAITED_DISCARDED}
        defines |= {"AWAITED_PART": AWAITED_PART, "PREFETCHED": PREFETCHED, "ROW_BYTES": ROW_BYTES}
        library = on_host.build(SHIM, defines, ptx=PTX)
        library.expected_bytes.restype = ctypes.c_uint
        self._library = library

    def run(
        self,
        record: np.ndarray,
        ctas: int,
        rank: int,
        worker: int,
        hint: np.ndarray,
        before: tuple[np.ndarray, np.ndarray],
        other: int,
    ) -> Produced:
        """All of the producer's loads; `before` are table and lengths before the previous kernel's end, `other` is the
        other CTA's verdict."""
        events = np.empty(1 << 18, np.int32)
        box = (ctypes.c_int * 5)(*params.pool_box(1 << int(record["page_size_log2"][0]), ctas))
        at = [ctypes.c_void_p(array.ctypes.data) for array in (record, hint, *before, events)]
        count = self._library.run(at[0], box, ctas, rank, worker, 0, *at[1:4], other, at[4], events.size)
        assert count != -2, "it has not waited for the previous kernel"
        assert count != -3, "a box comes with the barrier of another part"
        assert count != -4, "a barrier is tested before it is known to be initialised"
        assert count != -5, "the other CTA is told something else"
        assert count >= 0, "more loads than expected"
        waits = np.empty(1 << 16, np.int32)
        num_waits = self._library.waited(ctypes.c_void_p(waits.ctypes.data), waits.size)
        assert num_waits >= 0, "more waits than expected"
        return Produced(
            [tuple(event) for event in events[:count].reshape(-1, FIELDS).tolist()],
            self._library.expected_bytes(0),
            self._library.expected_bytes(1),
            self._library.verdict(),
            waits[:num_waits].reshape(-1, 3).tolist(),
        )

    def hand_over(self, ctas: int, own: int, other: int) -> list[int]:
        """Of each part that is handed over: its number, and how many had been awaited."""
        out = np.zeros(4 * PARTS, np.int32)
        count = self._library.hand_over(ctas, own, other, ctypes.c_void_p(out.ctypes.data))
        return [int(value) for value in out[:count]]

    def prefetch(self, record: np.ndarray, row_block: int, worker: int, begun: bool) -> np.ndarray:
        """What is prefetched of the first tile, ``[n, 2]``: address, bytes."""
        out = np.empty(1 << 10, np.int64)
        record_at, out_at = ctypes.c_void_p(record.ctypes.data), ctypes.c_void_p(out.ctypes.data)
        count = self._library.prefetch(record_at, row_block, worker, int(begun), out_at, out.size)
        assert count >= 0, "more than expected"
        return out[:count].reshape(-1, 2)
