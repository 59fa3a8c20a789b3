"""Kernel launches that are prepared once and repeated with other addresses, and tensor maps.

A decode step makes the same launches in every layer: what differs is the stream and where the arrays lie. All else (the
driver's launch configuration, the kernel's parameters) is laid out once, so that a call fills in a few words.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlacore import libcuda


class _Frame:
    """Memory of one launch in flight. The driver has copied it when the launch returns."""

    __slots__ = ("config", "device", "device_reference", "parameters", "parameters_address", "record", "stream")

    def __init__(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        overlaps_previous: bool,
        record: bytes,
        has_leading: bool,
    ) -> None:
        from cuda.bindings import driver

        self.config = driver.CUlaunchConfig()
        self.config.gridDimX, self.config.gridDimY, self.config.gridDimZ = grid
        self.config.blockDimX, self.config.blockDimY, self.config.blockDimZ = threads, 1, 1
        self.config.sharedMemBytes = shared_bytes
        if overlaps_previous:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            self.config.attrs, self.config.numAttrs = [attribute], 1
        self.record = ctypes.create_string_buffer(record, len(record))
        addresses = [0] * has_leading + [ctypes.addressof(self.record)]
        self.parameters = (ctypes.c_void_p * len(addresses))(*addresses)
        self.parameters_address = ctypes.addressof(self.parameters)
        self.stream: int | None = None  # that of `config`
        self.device = ctypes.c_int()
        self.device_reference = ctypes.byref(self.device)


class Launch:
    """One kernel on one device, with everything fixed but the stream, some addresses and a leading parameter.

    Several threads may call it at once.

    Parameters
    ----------
    function : int
        The kernel's handle.
    device : int
        CUDA ordinal.
    grid : tuple of int
        Blocks in x, y, z.
    threads : int
        Threads of a block.
    shared_bytes : int
        Dynamic shared memory of a block.
    record : structured array ``[1]``
        The kernel's parameter struct, its last parameter.
    addresses : sequence of str
        Fields of `record` that every call gives: its first ones, in their order.
    given : str, optional
        How every call gives them, as `struct` has it, if some come in one as bytes; each is an int if None.
    has_leading : bool
        Whether a parameter comes before the struct that every call brings by value, such as a tensor map.
    overlaps_previous : bool
        Let the grid start while the previous one drains (programmatic dependent launch); such a kernel waits before it
        relies on that one's results.
    """

    def __init__(
        self,
        function: int,
        device: int,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        record: np.ndarray,
        addresses: Sequence[str],
        *,
        given: str | None = None,
        has_leading: bool = False,
        overlaps_previous: bool = False,
    ) -> None:
        first = record.dtype.names[: len(addresses)] if record.dtype.names else ()
        assert first == tuple(addresses), f"the struct begins with {first}, the call gives {addresses}"
        from cuda.bindings import driver

        self._binding = driver
        self._current_device = libcuda.keeping_gil().cuCtxGetDevice
        self._function = driver.CUfunction(function)
        self._device = device
        self._make_frame = functools.partial(
            _Frame, grid, threads, shared_bytes, overlaps_previous, record.tobytes(), has_leading
        )
        layout = struct.Struct(given or f"{len(addresses)}P")  # quicker than Q
        assert layout.size == 8 * len(addresses), f"{given} gives {layout.size} bytes for {len(addresses)} addresses"
        self._pack_addresses = layout.pack_into
        self._frames: list[_Frame] = []  # not in use; a list's pop and append are atomic

    def __call__(self, stream: int, addresses: Sequence[int | bytes], leading: int = 0) -> None:
        """Launch on the stream with that handle. `leading` is where the leading parameter lies, until this returns."""
        try:
            frame = self._frames.pop()
        except IndexError:
            frame = self._make_frame()
        self._pack_addresses(frame.record, 0, *addresses)
        if leading:
            frame.parameters[0] = leading
        binding, config = self._binding, frame.config
        if frame.stream != stream:
            config.hStream = binding.CUstream(stream)
            frame.stream = stream
        # The default streams (0, 1, 2) are those of the current context, and a new thread has none. The launch itself
        # lets go of the GIL: where the queue is full it waits, perhaps for a host function in Python.
        if self._current_device(frame.device_reference) == 0 and frame.device.value == self._device:
            (status,) = binding.cuLaunchKernelEx(config, self._function, frame.parameters_address, 0)
        else:
            with libcuda.primary_context(self._device):
                (status,) = binding.cuLaunchKernelEx(config, self._function, frame.parameters_address, 0)
        if status:
            libcuda.check(status, "kernel launch")
        self._frames.append(frame)


def pack_addresses(*addresses: int) -> bytes:
    """Addresses as they lie in a kernel's parameter struct."""
    return struct.pack(f"{len(addresses)}P", *addresses)


def make_record(fields: np.dtype, values: dict[str, Any], addresses: Sequence[str]) -> np.ndarray:
    """A kernel's parameter struct with `values` for all fields but `addresses`, which every launch gives."""
    assert fields.names is not None
    values = values | dict.fromkeys(addresses, 0)
    return np.array([tuple(values.pop(name) for name in fields.names)], fields)


# ---- tensor maps ---------------------------------------------------------------------------------------------------

_TENSOR_MAP_BYTES = 128
_TENSOR_MAP_ALIGNMENT = 64
_TENSOR_MAP_DTYPES = {"float16": 6, "bfloat16": 9}
_SWIZZLE_128B, _L2_PROMOTION_256B = 3, 3


class TensorMap(NamedTuple):
    """A ``CUtensorMap``: where it lies, and what keeps it there."""

    address: int
    memory: Any


@functools.lru_cache(maxsize=64)
def tensor_maps(
    device: int, dtype: str, dims: tuple[int, ...], strides_bytes: tuple[int, ...], box: tuple[int, ...]
) -> Callable[[int], TensorMap]:
    """Tensor maps of one layout, innermost dimension first, as a function of the tensor's address.

    Boxes outside the tensor read as zeros. 256 addresses are remembered: a map says nothing about what lies there.
    """

    @functools.lru_cache(maxsize=256)
    def at(address: int) -> TensorMap:
        with libcuda.primary_context(device):  # a new thread has none, and the driver wants one
            return _encode(address, dtype, dims, strides_bytes, box)

    return at


def _encode(
    address: int, dtype: str, dims: tuple[int, ...], strides_bytes: tuple[int, ...], box: tuple[int, ...]
) -> TensorMap:
    memory = ctypes.create_string_buffer(_TENSOR_MAP_BYTES + _TENSOR_MAP_ALIGNMENT)
    start = ctypes.addressof(memory)
    aligned = start + -start % _TENSOR_MAP_ALIGNMENT  # which the driver demands
    rank = len(dims)
    status = libcuda.required().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        _TENSOR_MAP_DTYPES[dtype],
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*dims),
        (ctypes.c_uint64 * (rank - 1))(*strides_bytes),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*([1] * rank)),
        0,  # no interleave
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        0,  # out of bounds: zeros
    )
    libcuda.check(status, f"cuTensorMapEncodeTiled for dims={dims}, strides_bytes={strides_bytes}")
    return TensorMap(aligned, memory)
