"""The CUDA driver: which devices there are, loaded kernels, tensor maps, and one launch function for each kernel.

Callers have validated their arrays. Nothing here synchronises; everything goes to the stream it is given.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from mlacore import jit, params
from mlacore.shapes import LOG2_E

if TYPE_CHECKING:
    from mlacore.plan import DecodePlan

log = logging.getLogger("mlacore.driver")

HOPPER = (9, 0)
_ATTRIBUTE_MULTIPROCESSORS = 16
_ATTRIBUTE_CC_MAJOR, _ATTRIBUTE_CC_MINOR = 75, 76


# ---- devices -------------------------------------------------------------------------------------------------------


_initialised_in: list[int] = []  # the process that initialised the driver; a forked child inherits a useless one


def _libcuda() -> ctypes.CDLL | None:
    """The initialised driver library, None on a machine without one."""
    if _initialised_in and _initialised_in != [os.getpid()]:
        raise RuntimeError(
            "CUDA was initialised before this process was forked, and does not work in a fork: start processes with "
            "the spawn method, or set MLACORE_COMPILE=lazy and leave the GPU alone before forking"
        )
    return _initialised_libcuda()


@functools.cache
def _initialised_libcuda() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if library.cuInit(0) != 0:
        return None
    _initialised_in.append(os.getpid())
    return library


def _device(device: int) -> tuple[ctypes.CDLL, ctypes.c_int]:
    """The driver library and its handle of a device; RuntimeError where there is no such device."""
    library, handle = _libcuda(), ctypes.c_int()
    if library is None or library.cuDeviceGet(ctypes.byref(handle), device) != 0:
        raise RuntimeError(f"no CUDA device {device}; python -m mlacore info tells what is there")
    return library, handle


def _attribute(device: int, attribute: int) -> int:
    library, handle = _device(device)
    value = ctypes.c_int()
    library.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
    return value.value


@functools.cache
def compute_capability(device: int) -> tuple[int, int]:
    """(major, minor) of a CUDA device."""
    return _attribute(device, _ATTRIBUTE_CC_MAJOR), _attribute(device, _ATTRIBUTE_CC_MINOR)


@functools.cache
def num_sms(device: int) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return _attribute(device, _ATTRIBUTE_MULTIPROCESSORS)


def device_name(device: int) -> str:
    """Marketing name of a CUDA device."""
    library, handle = _device(device)
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGetName(name, len(name), handle)
    return name.value.decode()


def hopper_devices() -> list[int]:
    """Ordinals of the devices the kernels run on; empty without a driver. Imports no GPU library."""
    library = _libcuda()
    count = ctypes.c_int()
    if library is None or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    return [device for device in range(count.value) if compute_capability(device) == HOPPER]


def require_hopper(device: int) -> None:
    """Raise RuntimeError, naming what was found, unless the device has compute capability 9.0."""
    found = compute_capability(device)
    if found != HOPPER:
        raise RuntimeError(
            f"mlacore's kernels need a Hopper GPU (compute capability 9.0: H100, H200, H800, H20); device {device} is "
            f"{device_name(device)} with {found[0]}.{found[1]}. NumPy arrays run on the CPU"
        )


# ---- kernels -------------------------------------------------------------------------------------------------------


def _check(status: Any, what: str) -> None:
    if int(status) != 0:
        raise RuntimeError(f"{what} failed: {getattr(status, 'name', status)}")


_keep: list[Any] = []  # libraries stay loaded as long as the process lives


@functools.cache
def _kernel(name: str) -> Any:
    """A variant as a context-free kernel handle; every device loads it at its first launch there."""
    cubin = jit.cubin(jit.VARIANTS[name])  # first, since it says what to install where the bindings are missing
    from cuda.bindings import driver

    _libcuda()
    status, library = driver.cuLibraryLoadData(cubin, None, None, 0, None, None, 0)
    _check(status, f"loading {name}")
    status, kernel = driver.cuLibraryGetKernel(library, jit.VARIANTS[name].kernel.encode())
    _check(status, f"finding the kernel of {name}")
    _keep.append(library)
    log.debug("loaded %s", name)
    return kernel


@functools.cache
def _function(name: str, device: int, shared_bytes: int) -> Any:
    """A variant ready for launches on `device` with that much dynamic shared memory."""
    from cuda.bindings import driver

    require_hopper(device)
    kernel = _kernel(name)
    if shared_bytes:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, driver.CUdevice(device))
        _check(status, f"shared memory of {name}")
    return driver.CUfunction(int(kernel))


def load_default_kernels() -> None:
    """Compile, or read from the cache, every default variant and load it."""
    for name, variant in jit.VARIANTS.items():
        if variant.is_default:
            _kernel(name)


def _launch(
    function: Any,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    stream: Any,
    arguments: tuple[np.ndarray, ...],
    *,
    overlaps_previous: bool = False,
) -> None:
    """One launch. `overlaps_previous` lets the grid start while the previous one drains (programmatic dependent
    launch); such a kernel waits before it reads that one's results."""
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = driver.CUstream(stream.ptr)
    if overlaps_previous:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    pointers = np.array([argument.ctypes.data for argument in arguments], np.uint64)
    (status,) = driver.cuLaunchKernelEx(config, function, int(pointers.ctypes.data), 0)
    _check(status, "kernel launch")


# ---- tensor maps ---------------------------------------------------------------------------------------------------

_TENSOR_MAP_BYTES = 128
_TENSOR_MAP_ALIGNMENT = 64
_TENSOR_MAP_DTYPES = {"float16": 6, "bfloat16": 9}
_SWIZZLE_128B, _L2_PROMOTION_256B = 3, 3


@functools.lru_cache(maxsize=256)
def _tensor_map(
    pointer: int, dtype: str, dims: tuple[int, ...], strides_bytes: tuple[int, ...], box: tuple[int, ...]
) -> np.ndarray:
    """A CUtensorMap over a pool, innermost dimension first; boxes outside the tensor read as zeros.

    The driver wants the descriptor at a 64-byte boundary, which a binding's own object does not promise.
    """
    memory = np.zeros(_TENSOR_MAP_BYTES + _TENSOR_MAP_ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % _TENSOR_MAP_ALIGNMENT
    aligned = memory[offset : offset + _TENSOR_MAP_BYTES]
    rank = len(dims)
    library = _libcuda()
    assert library is not None
    status = library.cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned.ctypes.data),
        _TENSOR_MAP_DTYPES[dtype],
        rank,
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*dims),
        (ctypes.c_uint64 * (rank - 1))(*strides_bytes),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*([1] * rank)),
        0,  # no interleave
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        0,  # out of bounds: zeros
    )
    if status != 0:
        raise RuntimeError(f"cuTensorMapEncodeTiled failed ({status}) for dims={dims}, strides_bytes={strides_bytes}")
    return aligned


def _pool_map(pool: Any, box_rows: int) -> np.ndarray:
    """Tensor map over `[num_pages, page_size, num_kv_heads, head_dim]` in boxes of `box_rows` tokens by 64 columns."""
    num_pages, page_size, heads, head_dim = pool.shape
    page, row, head = pool.strides[:3]
    # The stride of a dimension of extent 1 is never used, but may be anything; the driver wants a multiple of 16.
    strides = (row, head if heads > 1 else row, page if num_pages > 1 else row)
    dims = (head_dim, page_size, heads, num_pages)
    return _tensor_map(pool.data.ptr, str(pool.dtype), dims, strides, (64, box_rows, 1, 1))


def _record(struct: np.dtype, fields: dict[str, Any]) -> np.ndarray:
    """A kernel's parameter struct; every field must be given."""
    assert struct.names is not None
    return np.array([tuple(fields[name] for name in struct.names)], struct)


# ---- launches ------------------------------------------------------------------------------------------------------


def launch_plan(cache_seqlens: Any, work: Any, splits: Any, stream: Any) -> None:
    """Compute the split schedule on the device (`cuda/mla_plan.cu`)."""
    device = cache_seqlens.device.id
    fields = {
        "cache_seqlens": cache_seqlens.data.ptr,
        "work": work.data.ptr,
        "splits": splits.data.ptr,
        "batch": len(cache_seqlens),
        "num_workers": len(work) - 1,
    }
    record = _record(params.PLAN_PARAMS, fields)
    with cache_seqlens.device:
        _launch(_function("mla_plan", device, 0), (1, 1, 1), params.PLAN_THREADS, 0, stream, (record,))


def launch_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    plan: DecodePlan,
    out: Any,
    lse: Any,
    softmax_scale: float,
    causal: bool,
    stream: Any,
) -> None:
    """Attend, then merge the sequences that the plan split (`cuda/mla_decode_sm90.cu`, `cuda/mla_combine.cu`)."""
    device, dtype = q.device.id, str(q.dtype)
    item_bytes = q.dtype.itemsize
    heads_per_kv = plan.num_heads // plan.num_kv_heads
    fields = {
        "q": q.data.ptr,
        "block_table": block_table.data.ptr,
        "cache_seqlens": cache_seqlens.data.ptr,
        "work": plan.work.data.ptr,
        "splits": plan.splits.data.ptr,
        "out": out.data.ptr,
        "lse": lse.data.ptr,
        "partial_out": plan.partial_out.data.ptr,
        "partial_lse": plan.partial_lse.data.ptr,
        "q_stride_batch": q.strides[0] // item_bytes,
        "q_stride_seq": q.strides[1] // item_bytes,
        "q_stride_head": q.strides[2] // item_bytes,
        "block_table_stride": block_table.strides[0] // block_table.dtype.itemsize,
        "batch": plan.batch,
        "max_pages": block_table.shape[1],
        "seq_len_q": plan.seq_len_q,
        "num_heads": plan.num_heads,
        "num_kv_heads": plan.num_kv_heads,
        "heads_per_kv": heads_per_kv,
        "row_blocks": plan.row_blocks,
        "num_workers": plan.num_workers,
        "causal": causal,
        "softmax_scale_log2": softmax_scale * LOG2_E,
    }
    record = _record(params.DECODE_PARAMS, fields)
    with q.device:
        shared_bytes = params.DECODE_SHARED_BYTES
        cluster = 2 if plan.row_blocks % 2 == 0 else 1  # an odd block would leave an SM of its pair idle
        decode = _function(f"mla_decode_sm90.{dtype}.cluster{cluster}", device, shared_bytes)
        pool_map = _pool_map(kv_cache, params.TILE_TOKENS // cluster)
        ctas = plan.num_workers * plan.num_kv_heads * plan.row_blocks
        _launch(decode, (ctas, 1, 1), params.DECODE_THREADS, shared_bytes, stream, (pool_map, record))
        if plan.num_workers > 1:
            grid = (plan.seq_len_q * plan.num_heads, min(plan.batch, plan.num_workers), 1)
            combine = _function(f"mla_combine.{dtype}", device, 0)
            _launch(combine, grid, params.COMBINE_THREADS, 0, stream, (record,), overlaps_previous=True)
