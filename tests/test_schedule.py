"""The device planner's arithmetic (cuda/schedule.cuh), built by the host compiler, against the planner in NumPy."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlacore import jit, params
from mlacore.plan import schedule

# The loops of cuda/mla_plan.cu with one sequence at a time in place of one a thread.
SHIM = r"""
#define MLA_SCHEDULE_FUNCTION static inline
#include "schedule.cuh"
extern "C" void plan(const int* lengths, int batch, int workers, int tile, int cost, int* work, int* splits) {
  int line = (batch - 1) * cost;
  for (int b = 0; b < batch; ++b) line += tiles_of(lengths[b], tile);
  const int extent = worker_extent(line, workers);
  int position = 0, previous_last = -1, last = -1;
  for (int b = 0; b < batch; ++b) {
    const int tiles = tiles_of(lengths[b], tile), first = first_worker(position, extent, workers);
    last = last_worker(position, tiles, extent, workers);
    splits[2 * b] = first;
    splits[2 * b + 1] = last - first + 1;
    for (int w = begin_workers_from(previous_last, extent); w <= last; ++w) {
      work[2 * w] = b;
      work[2 * w + 1] = begin_tile(w, extent, position);
    }
    previous_last = position + item_extent(tiles) - 1;
    position += tiles + cost;
  }
  for (int w = last + 1; w <= workers; ++w) {
    work[2 * w] = batch;
    work[2 * w + 1] = 0;
  }
}
"""


@pytest.fixture(scope="module")
def host_plan(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "shim.cpp").write_text(SHIM)
    library = folder / "shim.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-I", str(jit.source_dir()), "-o", str(library)]
    subprocess.run([*command, str(folder / "shim.cpp")], check=True, capture_output=True)
    function = ctypes.CDLL(str(library)).plan

    def plan(lengths: np.ndarray, workers: int) -> tuple[np.ndarray, np.ndarray]:
        work, splits = np.full((workers + 1, 2), -7, np.int32), np.full((len(lengths), 2), -7, np.int32)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (lengths, work, splits)]
        cost = params.ITEM_COST_TILES
        function(pointers[0], len(lengths), workers, params.TILE_TOKENS, cost, pointers[1], pointers[2])
        return work, splits

    return plan


@settings(max_examples=500, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(-3, 300), st.integers(0, 2**20 + 5)), min_size=1, max_size=40),
    workers=st.integers(1, 140),
)
def test_both_planners_agree(host_plan, lengths, workers):
    lengths = np.array(lengths, np.int32)
    work, splits = host_plan(lengths, workers)
    expected_work, expected_splits = schedule(lengths, workers)
    np.testing.assert_array_equal(work, expected_work)
    np.testing.assert_array_equal(splits, expected_splits)
