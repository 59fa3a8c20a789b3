"""A pretended Hopper GPU for the cache's tests: as much of CuPy as it uses, in NumPy, and the cache's own CUDA kernels,
built for the host and run thread by thread on exactly the arguments of each launch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import on_host
import pytest

from mlacore import DecodePlan, arrays, attention, cache_cuda, cache_kernels, driver, jit, launch, libcuda, params
from mlacore.arrays import bfloat16
from mlacore.block_tables import advance_rows_numpy, apply_changes_numpy
from mlacore.dispatch import KernelShape

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
    variant = jit.VARIANTS[name]
    defines = dict(variant.defines) | {"LANES_MEET": int(variant.kernel == "cache_write")}
    flags = ("-ffp-contract=off", "-fno-strict-aliasing")
    return on_host.build(SHIM.replace("KERNEL", variant.kernel), defines, ptx=PTX, flags=flags).launch


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

    class HostLaunch:
        """Stands for `launch.Launch`."""

        def __init__(self, variant, device, grid, threads, shared_bytes, record, addresses, *, has_leading=False):
            assert (device, shared_bytes, grid[2]) == (0, 0, 1)
            assert record.dtype.names[: len(addresses)] == addresses
            self.variant, self.grid, self.threads = variant, grid, threads
            self.record, self.addresses, self.has_leading = record, addresses, has_leading

        def __call__(self, stream, addresses, leading=0):
            launches.append((self.variant, self.grid, stream))
            record = self.record.copy()
            for name, address in zip(self.addresses, addresses, strict=True):
                record[name] = address
            arguments = [leading] * self.has_leading + [record.ctypes.data]
            pointers = (ctypes.c_void_p * len(arguments))(*arguments)
            kernel_on_host(self.variant)(pointers, *self.grid[:2], self.threads)

    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    monkeypatch.setattr(arrays, "device_of", lambda array: 0 if isinstance(array, FakeGPUArray) else None)
    monkeypatch.setattr(driver, "hopper_devices", lambda: [0])
    monkeypatch.setattr(driver, "require_hopper", lambda device: None)
    monkeypatch.setattr(driver, "_function", lambda name, device, shared_bytes: name)
    monkeypatch.setattr(cache_kernels, "Launch", HostLaunch)
    forget_cache_launches(monkeypatch)
    return launches


def forget_cache_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests prepared, and after this one what it will."""
    for name in ("_update_launch", "prepare_write", "_copy_launch", "_gather_launch"):
        prepare = getattr(cache_kernels, name).__wrapped__
        monkeypatch.setattr(cache_kernels, name, functools.lru_cache(prepare))


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


# ---- a driver library ----------------------------------------------------------------------------------------------

_addresses = itertools.count(1 << 40, 1 << 32)


class _Owner:
    """What keeps an array's memory, for weak references."""


def gpu_array(shape: tuple[int, ...], dtype: Any, *, strides: Any = None, offset: int = 0, device: int = 0) -> Any:
    """CuPy array at a made-up address of its own, `offset` bytes past an aligned one."""
    cupy = pytest.importorskip("cupy")
    memory = cupy.cuda.UnownedMemory(next(_addresses) + offset, 1 << 30, _Owner(), device)
    return cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(memory, 0), strides=strides)


@dataclass
class Launched:
    """One launch, as the driver saw it."""

    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    stream: int
    overlaps_previous: bool
    device: int | None
    leading_address: int
    leading: bytes
    record_before: bytes
    record: bytes

    def fields(self, struct: np.dtype) -> dict[str, Any]:
        """The kernel's parameter struct by name."""
        assert struct.names is not None
        values = np.frombuffer(self.record, struct, 1)[0]
        return {name: values[name] for name in struct.names}


class FakeDriver:
    """As much of libcuda as launches use."""

    def __init__(self) -> None:
        self.launches: list[Launched] = []
        self.tensor_maps: list[tuple] = []
        self.status = 0  # what a launch answers
        self.current: int | None = 0  # device of the current context
        self.pause: Callable[[], None] = lambda: None  # while a launch is inside
        self.resident = {1: 132, 2: 132, 4: 128, 8: 120}  # CTAs at once in clusters of so many: they do not fill GPCs
        self.occupancies: list[tuple] = []  # what it was asked of them
        self.real = {name: getattr(libcuda, name) for name in ("library", "required")}
        self._handles: dict[tuple[str, int], int] = {}
        self._sizes: dict[int, tuple[int, int]] = {}  # bytes of a kernel's leading parameter, and of its struct
        self._pushed: list[int | None] = []

    def function(self, name: str, shared_bytes: int) -> int:
        kernel, *forms = name.split(".")
        if kernel == "cache_update":
            leading, struct = 4 * int(forms[0]), params.UPDATE_PARAMS
        else:
            leading = 128 if kernel.startswith("mla_decode") else 0
            struct = {"mla_plan": params.PLAN_PARAMS, "cache_write": params.WRITE_PARAMS}.get(
                kernel, params.DECODE_PARAMS
            )
        handle = self._handles.setdefault((name, shared_bytes), 0x7000_0000_0000 + 4096 * len(self._handles))
        self._sizes[handle] = (leading, struct.itemsize)
        return handle

    def cuOccupancyMaxActiveClusters(self, function: Any, config: Any) -> tuple[int, int]:
        (attribute,) = config.attrs
        assert attribute.id.name == "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION"
        cluster = attribute.value.clusterDim
        assert (config.gridDimX % cluster.x, cluster.y, cluster.z) == (0, 1, 1)
        self.occupancies.append((int(function), config.blockDimX, config.sharedMemBytes, cluster.x, self.current))
        return 0, self.resident[cluster.x] // cluster.x

    def cuLaunchKernelEx(self, config: Any, function: Any, parameters: int, extra: int) -> tuple[int]:
        if self.status:
            return (self.status,)
        leading_size, size = self._sizes[int(function)]
        pointers = (ctypes.c_void_p * (2 if leading_size else 1)).from_address(parameters)
        before = ctypes.string_at(pointers[-1], size)
        stream = int(config.hStream)
        self.pause()
        attributes = [
            (attribute.id.name, attribute.value.programmaticStreamSerializationAllowed) for attribute in config.attrs
        ]
        assert attributes in ([], [("CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION", 1)])
        assert config.numAttrs == len(attributes)
        self.launches.append(
            Launched(
                int(function),
                (config.gridDimX, config.gridDimY, config.gridDimZ),
                (config.blockDimX, config.blockDimY, config.blockDimZ),
                config.sharedMemBytes,
                stream,
                bool(attributes),
                self.current,
                pointers[0],
                ctypes.string_at(pointers[0], leading_size),
                before,
                ctypes.string_at(pointers[-1], size),
            )
        )
        return (0,)

    def cuTensorMapEncodeTiled(
        self, memory: Any, dtype: int, rank: int, address: Any, dims: Any, strides: Any, box: Any, *rest: Any
    ) -> int:
        self.tensor_maps.append((address.value, dtype, tuple(dims), tuple(strides), tuple(box)))
        ctypes.memset(memory, len(self.tensor_maps), 128)
        return 0

    def cuCtxGetDevice(self, device: Any) -> int:
        if self.current is None:
            return 201
        device._obj.value = self.current
        return 0

    def cuDeviceGet(self, handle: Any, device: int) -> int:
        handle._obj.value = device
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        context._obj.value = 0x100 + device.value
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self._pushed.append(self.current)
        self.current = context.value - 0x100
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        self.current = self._pushed.pop()
        return 0

    def cuGetErrorName(self, status: int, name: Any) -> int:
        name._obj.value = f"CUDA_ERROR_{status}".encode()
        return 0


def pretend_driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Make CuPy's devices 0 and 1 Hopper GPUs with that driver library; launches are logged, not run."""
    cupy = pytest.importorskip("cupy")
    fake = FakeDriver()
    binding = pytest.importorskip("cuda.bindings.driver")
    for name in ("cuLaunchKernelEx", "cuOccupancyMaxActiveClusters"):
        monkeypatch.setattr(binding, name, getattr(fake, name))
    for name in ("library", "required", "keeping_gil"):
        monkeypatch.setattr(libcuda, name, lambda: fake)
    monkeypatch.setattr(driver, "_function", lambda name, device, shared_bytes: fake.function(name, shared_bytes))
    monkeypatch.setattr(driver, "num_sms", lambda device: 132)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda device=-1: cupy.cuda.Stream.null)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    for name in ("empty", "zeros"):
        monkeypatch.setattr(cupy, name, gpu_array)
    # What other tests prepared, or these will.
    monkeypatch.setattr(driver, "prepare_plan", functools.lru_cache(driver.prepare_plan.__wrapped__))
    monkeypatch.setattr(driver, "resident_ctas", functools.cache(driver.resident_ctas.__wrapped__))
    forget_cache_launches(monkeypatch)
    maps = functools.lru_cache(launch.tensor_maps.__wrapped__)
    monkeypatch.setattr(driver, "tensor_maps", maps)
    monkeypatch.setattr(launch, "tensor_maps", maps)
    monkeypatch.setattr(libcuda, "_retained_context", functools.cache(libcuda._retained_context.__wrapped__))
    monkeypatch.setattr(attention, "_prepared", {})
    return fake


# ---- a call ---------------------------------------------------------------------------------------------------------

PLAN_SCRATCH = ("partial_out", "partial_lse", "merge_counters", "merge_abandoned", "launches")


def make_plan(**changes: Any) -> DecodePlan:
    """A plan of 4 workers for `make_call`'s shape; its arrays but `work` are not looked into, they have addresses."""
    shape = {"batch": 3, "seq_len_q": 2, "num_heads": 128, "num_kv_heads": 1, "causal": False, "num_workers": 4}
    kernel = KernelShape(tile_rows=64, cluster_ctas=2, row_blocks=4)
    arrays_of_plan = {name: gpu_array((5, 2), np.int32) for name in ("work", "splits", *PLAN_SCRATCH)}
    return DecodePlan(**shape | {"device": 0, "kernel": kernel} | arrays_of_plan | changes)


def make_call(**changes: Any) -> dict[str, Any]:
    """A valid call: 3 sequences, 2 queries, 128 heads, 12 pages, 4 columns. Every array has its own address."""
    call = {
        "q": gpu_array((3, 2, 128, 576), bfloat16),
        "kv_cache": gpu_array((12, 64, 1, 576), bfloat16),
        "block_table": gpu_array((3, 4), np.int32),
        "cache_seqlens": gpu_array((3,), np.int32),
        "out": gpu_array((3, 2, 128, 512), bfloat16),
        "lse": gpu_array((3, 128, 2), np.float32),
        "plan": make_plan(),
    }
    return call | changes


def cupy_stream(handle: int) -> Any:
    """What launches take of a CuPy stream."""
    return types.SimpleNamespace(ptr=handle)
