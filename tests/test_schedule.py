"""The planner kernel itself (cuda/mla_plan.cu), run on the host, against the planner in NumPy.

The host compiler builds the kernel's source with threads for CUDA threads: a barrier for __syncthreads, and for a
warp's shuffle an array that its lanes exchange through.
"""

from __future__ import annotations

import ctypes

import numpy as np
import on_host
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlacore import jit, params
from mlacore.plan import schedule

THREADS = 64  # two warps, so that a thread takes several sequences of larger batches

SHIM = r"""
#include <barrier>
#include <memory>
#include <thread>
#include <vector>
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(threads)
using std::min;
static float __int_as_float(int) { return 0; }
struct Index { unsigned x; };
static thread_local Index threadIdx;
static std::barrier block_barrier(MLA_PLAN_THREADS);
static std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
static long long lanes[MLA_PLAN_THREADS];
static void __syncthreads() { block_barrier.arrive_and_wait(); }
// What `use` makes of the values of all lanes of the warp.
template <typename T, typename Use> static auto of_lanes(T value, Use use) {
  std::barrier<>& warp = *warp_barriers[threadIdx.x / 32];
  lanes[threadIdx.x] = value;
  warp.arrive_and_wait();
  const auto found = use(lanes + threadIdx.x / 32 * 32);
  warp.arrive_and_wait();
  return found;
}
template <typename T> static T __shfl_up_sync(unsigned, T value, unsigned offset) {
  const unsigned lane = threadIdx.x % 32;
  return of_lanes(value, [&](const long long* said) { return T(said[lane >= offset ? lane - offset : lane]); });
}
template <typename T> static T __shfl_sync(unsigned, T value, int lane) {
  return of_lanes(value, [&](const long long* said) { return T(said[lane]); });
}
static unsigned __ballot_sync(unsigned, bool value) {
  return of_lanes(value, [](const long long* said) {
    unsigned found = 0;
    for (int lane = 0; lane < 32; ++lane) found |= unsigned(said[lane] != 0) << lane;
    return found;
  });
}
static int __reduce_add_sync(unsigned, int value) {
  return of_lanes(value, [](const long long* said) {
    int sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += int(said[lane]);
    return sum;
  });
}
static int __ffs(int bits) { return __builtin_ffs(bits); }
#include "mla_plan.cu"
extern "C" void plan(const int* lengths, int batch, int workers, int max_splits, int* work, int* splits) {
  if (warp_barriers.empty()) {
    for (int warp = 0; warp < MLA_PLAN_THREADS / 32; ++warp) warp_barriers.emplace_back(new std::barrier<>(32));
  }
  const PlanParams params = {lengths, work, splits, batch, workers, max_splits};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < MLA_PLAN_THREADS; ++i) {
    threads.emplace_back([&, i] { threadIdx.x = i; mla_plan(params); });
  }
  for (std::thread& thread : threads) thread.join();
}
"""


@pytest.fixture(scope="module")
def kernel_on_host():
    defines = dict(jit.VARIANTS["mla_plan"].defines) | {"MLA_PLAN_THREADS": THREADS}
    function = on_host.build(SHIM, defines).plan

    def plan(lengths: np.ndarray, workers: int, max_splits: int = 0) -> tuple[np.ndarray, np.ndarray]:
        guard = 3  # rows before and behind, which nothing may write
        work = np.full((workers + 1 + 2 * guard, 2), -7, np.int32)
        splits = np.full((len(lengths) + 2 * guard, 2), -7, np.int32)
        inner = work[guard:-guard], splits[guard:-guard]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (lengths, *inner)]
        function(pointers[0], len(lengths), workers, max_splits, pointers[1], pointers[2])
        for array in (work, splits):
            outside = np.concatenate([array[:guard], array[-guard:]])
            assert (outside == -7).all(), "a write outside the schedule"
        return inner

    return plan


LENGTHS = st.lists(st.one_of(st.integers(-3, 300), st.integers(0, 2**20 + 5), st.just(2**30)), min_size=1, max_size=200)


@settings(max_examples=150)
@given(LENGTHS, st.integers(1, 140))
@example([2**30] * 200, 132)  # more than 2^31 tiles in all
@example([2**31 - 1] * 64, 5)
@example([-(2**31)] * 130, 132)
@example([0] * 65, 3)
def test_both_planners_agree(kernel_on_host, lengths, workers):
    lengths = np.array(lengths, np.int32)
    work, splits = kernel_on_host(lengths, workers)
    expected_work, expected_splits = schedule(lengths, workers)
    np.testing.assert_array_equal(work, expected_work)
    np.testing.assert_array_equal(splits, expected_splits)


@settings(max_examples=100)
@given(LENGTHS, st.integers(1, 64))
@example([2**31 - 1] * 64, 64)
@example([0, -5], 1)
def test_both_batch_invariant_planners_agree(kernel_on_host, lengths, max_splits):
    lengths = np.array(lengths, np.int32)
    workers = len(lengths) * max_splits
    for got, expected in zip(
        kernel_on_host(lengths, workers, max_splits), schedule(lengths, workers, max_splits), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


def test_the_kernel_is_built_for_more_than_one_warp():
    assert THREADS > params.WARP_THREADS
    assert params.PLAN_THREADS % params.WARP_THREADS == 0
