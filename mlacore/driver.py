"""The GPU side: which devices there are, loaded kernels, and how each kernel is launched.

Callers have validated their arrays. Nothing here synchronises; everything goes to the stream it is given.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from mlacore import jit, libcuda, params
from mlacore.launch import Launch, TensorMap, make_record, pack_addresses, tensor_maps
from mlacore.shapes import LOG2_E

if TYPE_CHECKING:
    from mlacore.dispatch import KernelShape
    from mlacore.plan import DecodePlan

log = logging.getLogger("mlacore.driver")

HOPPER = (9, 0)
_ATTRIBUTE_MULTIPROCESSORS = 16
_ATTRIBUTE_CC_MAJOR, _ATTRIBUTE_CC_MINOR = 75, 76


# ---- devices -------------------------------------------------------------------------------------------------------


def _device(device: int) -> tuple[ctypes.CDLL, ctypes.c_int]:
    """The driver library and its handle of a device; RuntimeError where there is no such device."""
    library, handle = libcuda.library(), ctypes.c_int()
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
    library = libcuda.library()
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


_keep: list[Any] = []  # libraries stay loaded as long as the process lives


@functools.cache
def _kernel(name: str) -> Any:
    """A variant as a context-free kernel handle; every device loads it at its first launch there."""
    cubin = jit.cubin(jit.VARIANTS[name])  # first, since it says what to install where the bindings are missing
    from cuda.bindings import driver

    libcuda.library()  # the binding expects an initialised driver
    status, library = driver.cuLibraryLoadData(cubin, None, None, 0, None, None, 0)
    libcuda.check(status, f"loading {name}")
    status, kernel = driver.cuLibraryGetKernel(library, jit.VARIANTS[name].kernel.encode())
    libcuda.check(status, f"finding the kernel of {name}")
    _keep.append(library)
    log.debug("loaded %s", name)
    return kernel


@functools.cache
def _function(name: str, device: int, shared_bytes: int) -> int:
    """Handle of a variant, ready for launches on `device` with that much dynamic shared memory."""
    from cuda.bindings import driver

    require_hopper(device)
    kernel = _kernel(name)
    if shared_bytes:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, driver.CUdevice(device))
        libcuda.check(status, f"shared memory of {name}")
    return int(kernel)  # the driver takes a kernel's handle for a function's


def load_default_kernels() -> None:
    """Compile, or read from the cache, every default variant and load it."""
    defaults = [name for name, variant in jit.VARIANTS.items() if variant.is_default]
    with ThreadPoolExecutor() as pool:  # NVRTC compiles several programs at once
        list(pool.map(_kernel, defaults))


# ---- launches ------------------------------------------------------------------------------------------------------

_PLAN_ADDRESSES = ("cache_seqlens", "work", "splits")
_DECODE_ADDRESSES = (
    "q",
    "kv",
    "block_table",
    "cache_seqlens",
    "work",
    "splits",
    "out",
    "lse",
    "partial_out",
    "partial_lse",
    "merge_counters",
    "merge_abandoned",
    "launches",
)
_DECODE_GIVEN = "4P16s2P40s"  # those of a plan as bytes, packed once


@functools.lru_cache(maxsize=64)
def prepare_plan(device: int, batch: int, num_workers: int, max_splits: int) -> Launch:
    """The planner for one shape; a call gives the addresses of lengths, `work` and `splits`."""
    values = {"batch": batch, "num_workers": num_workers, "max_splits": max_splits}
    log.debug(
        "plans of %d sequences for %d workers: mla_plan, 1 CTA of %d threads", batch, num_workers, params.PLAN_THREADS
    )
    record = make_record(params.PLAN_PARAMS, values, _PLAN_ADDRESSES)
    function = _function("mla_plan", device, 0)
    return Launch(function, device, (1, 1, 1), params.PLAN_THREADS, 0, record, _PLAN_ADDRESSES)


@functools.cache
def resident_ctas(kernel: KernelShape, device: int) -> int:
    """CTAs of a decode kernel that `device` runs at once: fewer than its SMs where clusters do not fill them."""
    from cuda.bindings import driver

    name, ctas = kernel.variant("bfloat16"), kernel.cluster_ctas  # of either dtype alike
    function = driver.CUfunction(_function(name, device, params.DECODE_SHARED_BYTES))
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = ctas, 1, num_sms(device)
    config.blockDimX, config.blockDimY, config.blockDimZ = params.DECODE_THREADS, 1, 1
    config.sharedMemBytes = params.DECODE_SHARED_BYTES
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = ctas, 1, 1
    config.attrs, config.numAttrs = [attribute], 1
    with libcuda.primary_context(device):
        status, clusters = driver.cuOccupancyMaxActiveClusters(function, config)
    libcuda.check(status, f"occupancy of {name}")
    return int(clusters) * ctas


def _has_contiguous_rows(kv_cache: Any) -> bool:
    """Whether rows of a page lie one behind the other, so that one prefetch covers several."""
    row_bytes: int = kv_cache.shape[3] * kv_cache.dtype.itemsize
    return kv_cache.shape[2] == 1 and kv_cache.strides[1] == row_bytes


def _prefetches_first(kernel: KernelShape, kv_cache: Any) -> bool:
    """Whether a worker's first tile is prefetched to L2 while the previous kernel ends.

    Measured on an H100 (2026-11-23), calls one behind the other: 16 rows b=1 4K 7.7 -> 7.2 us, 32K 19.4 -> 17.8 us, 64
    rows b=4 4K 18.4 -> 17.7 us; CTAs of 16 rows in a cluster do not gain by it. Behind another short kernel -1 to +1 %.
    """
    is_small_cluster = kernel.cluster_ctas > 1 and kernel.tile_rows < params.TILE_ROWS
    return _has_contiguous_rows(kv_cache) and not is_small_cluster


def _prefetches_next(kernel: KernelShape, kv_cache: Any) -> bool:
    """Whether clusters prefetch the next tile to L2 while one is on its way: where its rows are contiguous in memory.

    Measured on an H100 (2026-11-23, h_q=128): s_q=1 b=128 4K -10 % of the time, s_q=2 b=32 4K -7 %. CTAs without a
    cluster are bound by memory and lose 5 to 40 % by it; those of 16 rows in a cluster have few tiles, whose loads it
    holds up (+3 % at b=1, 4K).
    """
    is_large_cluster = kernel.cluster_ctas > 1 and kernel.tile_rows == params.TILE_ROWS
    return _has_contiguous_rows(kv_cache) and kv_cache.shape[1] >= params.TILE_TOKENS and is_large_cluster


def prepare_decode(
    q: Any, kv_cache: Any, block_table: Any, plan: DecodePlan, softmax_scale: float, causal: bool
) -> DecodeLaunch:
    """Attention (a kernel of `mlacore.dispatch`) over arrays of these shapes and strides, for plans of this shape.

    It depends on no address: other arrays and plans that agree in all else can take its place.
    """
    device, dtype = plan.device, str(q.dtype)
    item_bytes = q.dtype.itemsize
    num_pages, page_size, kv_heads, head_dim = kv_cache.shape
    kernel = plan.kernel
    assert device is not None
    assert kernel is not None
    grid = (kernel.row_blocks, plan.num_kv_heads, plan.num_workers)  # a cluster lies along the row blocks
    is_resident = math.prod(grid) <= resident_ctas(kernel, device)
    values = {
        "q_stride_batch": q.strides[0] // item_bytes,
        "q_stride_seq": q.strides[1] // item_bytes,
        "q_stride_head": q.strides[2] // item_bytes,
        "block_table_stride": block_table.strides[0] // block_table.dtype.itemsize,
        "kv_stride_page": kv_cache.strides[0] // item_bytes,
        "num_pages": num_pages,
        "prefetches_next": int(_prefetches_next(kernel, kv_cache)),
        "prefetches_first": int(_prefetches_first(kernel, kv_cache)),
        "batch": plan.batch,
        "max_pages": block_table.shape[1],
        "seq_len_q": plan.seq_len_q,
        "num_heads": plan.num_heads,
        "num_kv_heads": plan.num_kv_heads,
        "heads_per_kv": plan.num_heads // plan.num_kv_heads,
        "row_blocks": kernel.row_blocks,
        "blocks_per_worker": plan.num_kv_heads * kernel.row_blocks,
        "page_size_log2": page_size.bit_length() - 1,
        "causal": causal,
        "merge_patience_cycles": params.MERGE_PATIENCE_CYCLES if is_resident else 0,
        "softmax_scale_log2": softmax_scale * LOG2_E,
    }
    # Once a shape: the launch is prepared here and repeated.
    log.debug(
        "decode of batch %d, %d query tokens, %d heads, %d KV heads, pages of %d tokens on device %d: %s, grid %s of "
        "clusters of %d, %d workers, so at most as many splits of a sequence; splits merged by %s; tiles %s",
        plan.batch,
        plan.seq_len_q,
        plan.num_heads,
        plan.num_kv_heads,
        page_size,
        device,
        kernel.variant(dtype),
        " x ".join(map(str, grid)),
        kernel.cluster_ctas,
        plan.num_workers,
        "all their workers" if is_resident else "those that start last, as not all CTAs are resident at once",
        "prefetched to L2" if values["prefetches_next"] else "not prefetched",
    )
    launch = Launch(
        _function(kernel.variant(dtype), device, params.DECODE_SHARED_BYTES),
        device,
        grid,
        params.DECODE_THREADS,
        params.DECODE_SHARED_BYTES,
        make_record(params.DECODE_PARAMS, values, _DECODE_ADDRESSES),
        _DECODE_ADDRESSES,
        given=_DECODE_GIVEN,
        has_leading=True,  # the pool's tensor map
        overlaps_previous=True,
    )
    page, row, head = kv_cache.strides[:3]
    # The stride of a dimension of extent 1 is never used, but may be anything; the driver wants a multiple of 16.
    strides = (row, params.CHUNK_COLUMNS * item_bytes, head if kv_heads > 1 else row, page if num_pages > 1 else row)
    dims = (params.CHUNK_COLUMNS, page_size, head_dim // params.CHUNK_COLUMNS, kv_heads, num_pages)
    return DecodeLaunch(
        launch, tensor_maps(device, dtype, dims, strides, params.pool_box(page_size, kernel.cluster_ctas))
    )


class DecodeLaunch:
    """One launch of attention, which merges the sequences that the plan split; made by `prepare_decode`."""

    __slots__ = ("_launch", "_pool_maps")

    def __init__(self, launch: Launch, pool_maps: Callable[[int], TensorMap]) -> None:
        self._launch = launch
        self._pool_maps = pool_maps

    def at(self, stream: int, addresses: tuple[int, int, int, int, bytes, int, int, bytes]) -> None:
        """Launch on the stream with that handle; `addresses` in the order of ``_DECODE_ADDRESSES``, a plan's packed."""
        self._launch(stream, addresses, self._pool_maps(addresses[1]).address)

    @staticmethod
    def addresses_of(plan: DecodePlan) -> tuple[bytes, bytes]:
        """The addresses that are a plan's, packed: of its schedule, and of its scratch memory."""
        schedule = plan.work, plan.splits
        scratch = plan.partial_out, plan.partial_lse, plan.merge_counters, plan.merge_abandoned, plan.launches
        return pack_addresses(*(a.data.ptr for a in schedule)), pack_addresses(*(a.data.ptr for a in scratch))
