"""Cells of partial states (cuda/cells.cuh), run on the host: what packing costs, and who finds what where."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import on_host
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlacore.dispatch import KernelShape
from mlacore.params import CLEAR_TURNS, HEAD_DIM_V, STATE_MARKS, SWAPPED_VARIANTS, TILE_ROWS

# Stands for ptx.cuh. An "element" is the integer that a float holds.
PTX = r"""
#pragma once
#include "types.cuh"
template <typename Element> u32 cvt_pack(float low, float high) { return u32(low) | u32(high) << 16; }
inline u32 select_bits(u32 mask, u32 ones, u32 zeros) { return (ones & mask) | (zeros & ~mask); }
inline float max_nan(float x, float y) { return x != x || y != y ? x + y : x > y ? x : y; }
"""

SHIM = r"""
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>
#define __device__
#define __forceinline__ inline
using std::max;
struct uint4 { unsigned x, y, z, w; };
struct Index { unsigned x; };
static thread_local Index threadIdx;
template <typename To, typename From> static To bits(From from) { To to; memcpy(&to, &from, sizeof to); return to; }
static unsigned __float_as_uint(float x) { return bits<unsigned>(x); }
static float __uint_as_float(unsigned x) { return bits<float>(x); }
static float __int_as_float(int x) { return bits<float>(x); }
static std::barrier<> warp(32);
static unsigned lanes[32];
static unsigned __shfl_xor_sync(unsigned, unsigned value, int mask) {
  lanes[threadIdx.x % 32] = value;
  warp.arrive_and_wait();
  const unsigned received = lanes[threadIdx.x % 32 ^ mask];
  warp.arrive_and_wait();
  return received;
}
#include "cells.cuh"

template <typename Cell> static void pack(const float* values, float scale, unsigned mark, unsigned* words) {
  float all[Cell::kValues];
  std::copy(values, values + Cell::kValues, all);
  const uint4 cell = Cell(all, scale).packed(mark);
  memcpy(words, &cell, sizeof cell);
}
template <typename Cell> static int unpack(const unsigned* words, unsigned mark, float weight, float* values) {
  uint4 cell;
  memcpy(&cell, words, sizeof cell);
  const Cell found(cell);
  for (u32 i = 0; i < Cell::kValues; ++i) values[i] = found.number(i) * found.unit(weight);
  return is_marked<Cell>(cell, mark);
}

// Every lane of every unit writes what it finds in `cells` to `out`.
template <typename Cells> static void read(const std::vector<float>& cells, u16* out) {
  constexpr u32 kValues = Cells::Cell::kValues;
  std::vector<std::thread> threads;
  for (u32 lane = 0; lane < 32; ++lane) threads.emplace_back([&, lane] {
    threadIdx.x = lane;
    for (i32 unit = 0; unit < Cells::units(Cells::kRows); ++unit) {
      const Cells at(unit);
      float sums[Cells::kUnitCells][kValues];
      for (u32 c = 0; c < Cells::kUnitCells; ++c) {
        const u32 cell = (u32(unit) * Cells::kUnitCells + c) * kWarpThreads + at.lane;
        std::copy_n(&cells.at(cell * kValues), kValues, sums[c]);
      }
      at.template store<Bf16>(out + at.row() * kHeadDimV, sums, 1.f);
    }
  });
  for (std::thread& thread : threads) thread.join();
}

// What the kernels' fragments (layout.cuh, mla_decode_swapped_sm90.cu) hold: value row * 512 + column.
static std::vector<float> written_on_m() {
  std::vector<float> cells(HeadsOnM::kCells * 8, -1.f);
  for (u32 group = 0; group < 2; ++group) for (u32 thread = 0; thread < 128; ++thread)
    for (u32 i = 0; i < 2; ++i) for (u32 c = 0; c < 8; ++c) for (u32 k = 0; k < 8; ++k) {
      const u32 row = fragment_row(thread) + 8 * i;
      const u32 column = group * 256 + 8 * (4 * c + k / 2) + fragment_column(thread) + k % 2;
      cells.at(HeadsOnM::memory_index(group * 8 + c, i, thread) * 8 + k) = float(row * 512 + column);
    }
  return cells;
}
template <u32 kRows> static std::vector<float> written_on_n() {
  using Cells = HeadsOnN<kRows>;
  std::vector<float> cells(Cells::kCells * 4, -1.f);
  for (u32 group = 0; group < 2; ++group) for (u32 thread = 0; thread < 128; ++thread)
    for (u32 j = 0; j < kRows / 8; ++j) for (u32 e = 0; e < 2; ++e) for (u32 c = 0; c < 2; ++c)
      for (u32 k = 0; k < 4; ++k) {
        const u32 row = 8 * j + fragment_column(thread) + e;
        const u32 column = group * 256 + 64 * (2 * c + k / 2) + fragment_row(thread) + 8 * (k % 2);
        cells.at((Cells::memory_index(group, thread) + Cells::begin_of(j, e, c)) * 4 + k) = float(row * 512 + column);
      }
  return cells;
}

extern "C" {
void pack_floats(const float* v, float s, unsigned mark, unsigned* words) { pack<FloatCell>(v, s, mark, words); }
void pack_integers(const float* v, float s, unsigned mark, unsigned* words) { pack<IntegerCell>(v, s, mark, words); }
int unpack_floats(const unsigned* w, unsigned mark, float weight, float* v) {
  return unpack<FloatCell>(w, mark, weight, v);
}
int unpack_integers(const unsigned* w, unsigned mark, float weight, float* v) {
  return unpack<IntegerCell>(w, mark, weight, v);
}
unsigned state_bytes(int rows) {
  return 16 * (rows == 16 ? HeadsOnN<16>::kCells : rows == 32 ? HeadsOnN<32>::kCells : HeadsOnM::kCells);
}
int units(int tile_rows, int rows) {
  if (tile_rows == 64) return HeadsOnM::units(rows);
  return tile_rows == 16 ? HeadsOnN<16>::units(rows) : HeadsOnN<32>::units(rows);
}
void write_and_read(int rows, u16* out) {
  if (rows == 16) read<HeadsOnN<16>>(written_on_n<16>(), out);
  if (rows == 32) read<HeadsOnN<32>>(written_on_n<32>(), out);
  if (rows == 64) read<HeadsOnM>(written_on_m(), out);
}
}
"""

VALUES = {"floats": 4, "integers": 8}
ROWS = sorted({TILE_ROWS, *(rows for rows, _ in SWAPPED_VARIANTS)})


@pytest.fixture(scope="module")
def cells() -> Any:
    defines = {"MLA_HEAD_DIM_V": HEAD_DIM_V, "MLA_STATE_MARKS": STATE_MARKS, "MLA_CLEAR_TURNS": CLEAR_TURNS}
    return on_host.build(SHIM, defines, ptx=PTX)


def through_memory(
    cells: Any, kind: str, values: np.ndarray, scale: float = 1.0, mark: int = 1, weight: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """What a reader gets, and the words in memory, which carry the mark and no other."""
    values = np.ascontiguousarray(values, np.float32)
    words, found = np.empty(4, np.uint32), np.empty_like(values)
    at = [ctypes.c_void_p(array.ctypes.data) for array in (values, words, found)]
    getattr(cells, f"pack_{kind}")(at[0], ctypes.c_float(scale), mark, at[1])
    for other in range(256):
        is_there = getattr(cells, f"unpack_{kind}")(at[1], other, ctypes.c_float(weight), at[2])
        assert bool(is_there) == (other == mark)
    return found, words


@settings(deadline=None, max_examples=300)
@given(st.data())
@pytest.mark.parametrize("kind", VALUES)
def test_packing_costs_little(cells: Any, kind: str, data: st.DataObject) -> None:
    size = st.floats(-1, 1, width=32)
    values = np.array(data.draw(st.lists(size, min_size=VALUES[kind], max_size=VALUES[kind])), np.float32)
    values *= np.float32(2.0 ** data.draw(st.integers(-60, 60)))
    scale = np.float32(2.0 ** data.draw(st.floats(-20, 20)))
    weight = np.float32(data.draw(st.floats(2**-10, 1)))
    found, _ = through_memory(cells, kind, values, float(scale), data.draw(st.integers(1, 254)), float(weight))
    expected = values.astype(np.float64) * scale * weight
    error, top = np.abs(found - expected), np.abs(expected).max()
    limits = np.abs(expected) * 2**-15 if kind == "floats" else top * 2**-13
    assert (error <= limits * (1 + 2**-9) + 2**-110).all()


@pytest.mark.parametrize("top", [1.0, 1.0 - 2**-24, 1.0 - 2**-14, 1.0 + 2**-23, 1.5, 2.0 - 2**-23, 1e-30, 1e30])
def test_the_largest_value_may_be_rounded_up(cells: Any, top: float) -> None:
    for sign in (1, -1):
        values = sign * np.array([top, 0, top / 2, -top / 3, top, -top, 0, top], np.float32)
        found, _ = through_memory(cells, "integers", values)
        assert np.abs(found - values).max() <= top * 2**-13


@pytest.mark.parametrize("kind", VALUES)
def test_zeros_and_values_of_few_bits_stay(cells: Any, kind: str) -> None:
    values = np.zeros(VALUES[kind])
    assert not through_memory(cells, kind, values)[0].any()
    for first in (1.0, -0.75, 2.0**-20, 240.0):
        values[:3] = first, first / 2, -first / 16
        assert np.allclose(through_memory(cells, kind, values)[0], values, rtol=2**-22, atol=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", VALUES)
def test_what_is_not_finite_does_not_become_finite(cells: Any, kind: str, bad: float) -> None:
    for at in range(VALUES[kind]):
        values = np.ones(VALUES[kind])
        values[at] = bad
        found, _ = through_memory(cells, kind, values, mark=0xA5)
        assert not np.isfinite(found[at])
        assert kind == "floats" or np.isnan(found).all()


def test_cleared_memory_carries_no_mark(cells: Any) -> None:
    for fill in (0, 0xFFFFFFFF):
        words, values = np.full(4, fill, np.uint32), np.empty(8, np.float32)
        for kind in VALUES:
            for mark in range(1, STATE_MARKS + 1):
                at = ctypes.c_void_p(words.ctypes.data), mark, ctypes.c_float(1), ctypes.c_void_p(values.ctypes.data)
                assert not getattr(cells, f"unpack_{kind}")(*at)


@pytest.mark.parametrize("rows", ROWS)
def test_readers_find_what_was_written(cells: Any, rows: int) -> None:
    out = np.full((rows, HEAD_DIM_V), 0xFFFF, np.uint16)
    cells.write_and_read(rows, ctypes.c_void_p(out.ctypes.data))
    assert (out == np.arange(out.size).reshape(out.shape)).all()


@pytest.mark.parametrize("rows", ROWS)
def test_states_have_the_size_that_plans_allocate(cells: Any, rows: int) -> None:
    assert cells.state_bytes(rows) == 4 * KernelShape(rows, 1, 1).state_words
    units = [cells.units(rows, n) for n in range(rows + 1)]
    assert units == [units[-1] * (-(-n // 8) * 8) // rows for n in range(rows + 1)]
