"""A pretended Hopper GPU for the cache's tests: as much of CuPy as it uses, in NumPy, and the cache's own CUDA kernels,
built for the host and run thread by thread on exactly the arguments of each launch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlacore import arrays, cache_cuda, cache_kernels, driver, jit
from mlacore.block_tables import advance_rows_numpy, apply_changes_numpy

# Stands for ptx.cuh: what the cache's kernels use of it, in bfloat16.
PTX = r"""
#pragma once
#include "types.cuh"
#include <cstring>
template <typename Element>
inline void cvt_unpack(u32 packed, float& low, float& high) {
  static_assert(kIsSame<Element, Bf16>);
  const u32 bits[2] = {packed << 16, packed & 0xffff0000u};
  std::memcpy(&low, &bits[0], 4);
  std::memcpy(&high, &bits[1], 4);
}
inline u32 to_bf16(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <typename Element>
inline u32 cvt_pack(float low, float high) {
  return to_bf16(low) | to_bf16(high) << 16;
}
"""

# The 32 lanes of a warp are threads that meet in its shuffles; warps and blocks come one after the other.
SHIM = r"""
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <tuple>
#include <vector>
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __restrict__
#define __launch_bounds__(threads)
struct Index { unsigned x, y; };
static thread_local Index threadIdx, blockIdx;
static Index gridDim;
struct alignas(16) uint4 { unsigned x, y, z, w; };
static float __int_as_float(int bits) { float value; std::memcpy(&value, &bits, 4); return value; }
static std::barrier<> warp_barrier(32);
static unsigned long long lanes[32];
template <typename T> static T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  const unsigned lane = threadIdx.x % 32;
  std::memcpy(&lanes[lane], &value, sizeof(T));
  warp_barrier.arrive_and_wait();
  T received;
  std::memcpy(&received, &lanes[lane ^ mask], sizeof(T));
  warp_barrier.arrive_and_wait();
  return received;
}
#include "KERNEL.cu"
template <typename... Params>
static void run(void (*kernel)(Params...), void** arguments, unsigned grid_x, unsigned grid_y, unsigned threads) {
  gridDim = {grid_x, grid_y};
  unsigned i = 0;
  const std::tuple<Params...> params{*static_cast<Params*>(arguments[i++])...};
  const auto lane_of_all_warps = [&](unsigned lane) {
    for (unsigned y = 0; y < grid_y; ++y) for (unsigned x = 0; x < grid_x; ++x) {
      blockIdx = {x, y};
      for (unsigned first = 0; first < threads; first += 32) {
        threadIdx = {first + lane, 0};
        std::apply(kernel, params);
      }
    }
  };
  std::vector<std::thread> warp;
  if (LANES_MEET) for (unsigned lane = 0; lane < 32; ++lane) warp.emplace_back(lane_of_all_warps, lane);
  else for (unsigned lane = 32; lane-- > 0;) lane_of_all_warps(lane);  // backwards: none may rely on a lower one
  for (std::thread& lane : warp) lane.join();
}
extern "C" void launch(void** arguments, unsigned grid_x, unsigned grid_y, unsigned threads) {
  run(KERNEL, arguments, grid_x, grid_y, threads);
}
"""


@functools.cache
def kernel_on_host(name: str) -> Any:
    """``launch(arguments, grid_x, grid_y, threads)`` of a variant, built by the host's compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    variant = jit.VARIANTS[name]
    folder = Path(tempfile.mkdtemp(prefix="mlacore-"))
    for source in (f"{variant.kernel}.cu", "types.cuh", "params.cuh"):
        shutil.copy(jit.source_dir() / source, folder)
    (folder / "ptx.cuh").write_text(PTX)
    (folder / "shim.cpp").write_text(SHIM.replace("KERNEL", variant.kernel))
    defines = [f"-D{key}={value}" for key, value in variant.defines]
    defines.append(f"-DLANES_MEET={int(variant.kernel == 'cache_write')}")
    command = [
        compiler,
        "-std=c++20",
        "-O1",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-shared",
        "-fPIC",
        "-pthread",
    ]
    subprocess.run([*command, *defines, "-o", str(folder / "shim.so"), str(folder / "shim.cpp")], check=True)
    library = ctypes.CDLL(str(folder / "shim.so"))
    shutil.rmtree(folder)
    return library.launch


class FakeGPUArray(np.ndarray):
    """Stands for cupy.ndarray: what a fake CuPy makes."""

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.ctypes.data, device_id=0)


class FakeStream:
    ptr = 0

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


def fake_cupy() -> types.ModuleType:
    """As much of CuPy as the cache uses, in NumPy."""

    class Device(contextlib.nullcontext):
        id = 0

        def synchronize(self) -> None:
            pass

    module: Any = types.ModuleType("cupy")
    stream = FakeStream()
    module.ndarray = FakeGPUArray
    module.cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(getDevice=lambda: 0),
        Device=Device,
        Stream=FakeStream,
        ExternalStream=FakeStream,
        get_current_stream=lambda device=-1: stream,
    )
    module.empty = lambda shape, dtype: np.empty(shape, dtype).view(FakeGPUArray)
    module.asarray = lambda array: np.array(array).view(FakeGPUArray)
    module.asnumpy = lambda array: np.array(array).view(np.ndarray)
    return module


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Make device 0 a Hopper GPU whose arrays are NumPy's; returns the log of launches of CUDA kernels."""
    launches: list[tuple] = []

    def launch(variant, array, grid, threads, stream, arguments):
        launches.append((variant, grid, stream))
        pointers = (ctypes.c_void_p * len(arguments))(*(argument.ctypes.data for argument in arguments))
        assert grid[2] == 1
        kernel_on_host(variant)(pointers, *grid[:2], threads)

    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    monkeypatch.setattr(arrays, "device_of", lambda array: 0 if isinstance(array, FakeGPUArray) else None)
    monkeypatch.setattr(driver, "hopper_devices", lambda: [0])
    monkeypatch.setattr(driver, "require_hopper", lambda device: None)
    monkeypatch.setattr(cache_kernels, "_launch", launch)
    return launches


def pretend_numba(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Do the Numba kernels' work in NumPy; returns the log of their launches."""
    launches: list[str] = []

    def apply_changes_cuda(changes, packed, block_table, cache_seqlens, limits, where, page_size, stream_ptr):
        np.testing.assert_array_equal(packed, changes.packed)
        launches.append("apply_changes")
        where = where[:, : changes.num_tokens]
        apply_changes_numpy(changes, block_table, cache_seqlens, limits, where, page_size)

    def advance_rows_cuda(block_table, cache_seqlens, limits, where, num_tokens, page_size, stream_ptr):
        launches.append("advance_rows")
        if num_tokens:
            advance_rows_numpy(block_table, cache_seqlens, limits, where, num_tokens, page_size)

    monkeypatch.setattr(cache_cuda, "apply_changes_cuda", apply_changes_cuda)
    monkeypatch.setattr(cache_cuda, "advance_rows_cuda", advance_rows_cuda)
    return launches
