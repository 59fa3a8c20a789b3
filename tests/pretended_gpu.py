"""A pretended Hopper GPU for the cache's tests: as much of CuPy as it uses, in NumPy, and logs of what it launches."""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any

import numpy as np
import pytest

from mlacore import arrays, driver
from mlacore import cache as cache_module
from mlacore.block_tables import apply_changes_numpy


class FakeGPUArray(np.ndarray):
    """Stands for cupy.ndarray: what a fake CuPy makes."""


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
        Device=Device, Stream=FakeStream, ExternalStream=FakeStream, get_current_stream=lambda device=-1: stream
    )
    module.empty = lambda shape, dtype: np.empty(shape, dtype).view(FakeGPUArray)
    module.asarray = lambda array: np.array(array).view(FakeGPUArray)
    module.asnumpy = lambda array: np.array(array).view(np.ndarray)
    return module


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Make device 0 a Hopper GPU whose arrays are NumPy's; returns the log of data-writing launches."""
    launches: list[tuple] = []

    def launch_append(pool, ckv, kpe, slots, stream):
        launches.append((ckv.shape, kpe.shape, slots.shape, stream))
        rows = pool.reshape(-1, pool.shape[-1])
        rows[slots] = np.concatenate([ckv, kpe], axis=1)

    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    monkeypatch.setattr(arrays, "device_of", lambda array: 0 if isinstance(array, FakeGPUArray) else None)
    monkeypatch.setattr(driver, "hopper_devices", lambda: [0])
    monkeypatch.setattr(driver, "require_hopper", lambda device: None)
    monkeypatch.setattr(driver, "launch_append", launch_append)
    return launches


def pretend_updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Do the Numba kernel's work in NumPy; returns the log of launches that update tables."""
    updates: list[int] = []

    def apply_changes_cuda(changes, packed, block_table, cache_seqlens, slots, page_size, stream_ptr):
        np.testing.assert_array_equal(packed, changes.packed)
        updates.append(changes.num_changes)
        apply_changes_numpy(changes, block_table, cache_seqlens, slots[: changes.num_tokens], page_size)

    monkeypatch.setattr(cache_module, "apply_changes_cuda", apply_changes_cuda)
    return updates
