"""Launches of the cache's CUDA kernels (`cuda/cache_*.cu`), one function for each.

Callers have validated their arrays and made their device and stream current. Nothing here synchronises. As for
attention, what a launch fixes (strides, counts) is laid out once and remembered; a call gives addresses.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlacore import driver, params
from mlacore.block_tables import TableChanges
from mlacore.cache_layout import RowTransform
from mlacore.launch import Launch, make_record

MAX_GRID_Y = 65535
UPDATE_LONGEST = 1024  # pages or tokens of one change, all done by one warp; longer ones are worth an upload

_UPDATE_ADDRESSES = ("block_table", "cache_seqlens", "limits", "where")
_WRITE_ADDRESSES = ("pool", "ckv", "kpe", "where", "norm_weight", "rope_cos", "rope_sin")
_COPY_ADDRESSES = ("pool", "pages")
_GATHER_ADDRESSES = ("pool", "rows", "block_table", "spans")


def _prepare(
    variant: str,
    device: int,
    grid: tuple[int, int, int],
    threads: int,
    struct: np.dtype,
    values: dict[str, Any],
    addresses: Sequence[str],
    has_leading: bool = False,
) -> Launch:
    function, record = driver._function(variant, device, 0), make_record(struct, values, addresses)
    return Launch(function, device, grid, threads, 0, record, addresses, has_leading=has_leading)


# ---- block table and lengths ---------------------------------------------------------------------------------------


def update_words(changes: TableChanges) -> int | None:
    """The variant of `cuda/cache_update.cu` that takes `changes` by value; None where none does."""
    if changes.longest > UPDATE_LONGEST:
        return None
    for words in params.UPDATE_WORDS:
        if len(changes.packed) <= words:
            return words
    return None


# Memory that launches by value have used, and its address, which NumPy takes a while to say. As `Launch` keeps its
# frames: whoever takes one has it alone, as a list's pop and append are atomic.
_by_value: dict[int, list[tuple[np.ndarray, int]]] = {words: [] for words in params.UPDATE_WORDS}


def launch_update(
    changes: TableChanges,
    words: int,
    block_table: Any,
    cache_seqlens: Any,
    limits: Any,
    where: Any,
    page_size: int,
    stream: Any,
) -> None:
    """`apply_changes_numpy` on the device (`cuda/cache_update.cu`); `words` from `update_words`."""
    table = block_table.data
    packed = changes.packed
    launch = _update_launch(
        table.device_id, words, block_table.shape[1], changes.num_changes, changes.num_tokens, page_size
    )
    addresses = (table.ptr, cache_seqlens.data.ptr, limits.data.ptr, where.data.ptr)
    spare = _by_value[words]
    try:
        by_value, address = spare.pop()
    except IndexError:
        by_value = np.empty(words, np.int32)
        address = by_value.ctypes.data
    by_value[: len(packed)] = packed
    launch(stream.ptr, addresses, address)
    spare.append((by_value, address))  # the driver has copied it


@functools.lru_cache(maxsize=256)
def _update_launch(
    device: int, words: int, block_table_stride: int, num_changes: int, num_tokens: int, page_size: int
) -> Launch:
    values = {
        "block_table_stride": block_table_stride,
        "num_changes": num_changes,
        "num_tokens": num_tokens,
        "page_size_log2": _log2(page_size),
    }
    return _prepare(
        f"cache_update.{words}",
        device,
        (-(-num_changes // params.UPDATE_ROWS), 1, 1),
        params.UPDATE_ROWS * params.WARP_THREADS,
        params.UPDATE_PARAMS,
        values,
        _UPDATE_ADDRESSES,
        has_leading=True,  # the changes
    )


# ---- rows of new tokens --------------------------------------------------------------------------------------------


def launch_write(layer: Any, where: Any, ckv: Any, kpe: Any, transform: RowTransform, stream: Any) -> None:
    """Write cache rows (`cuda/cache_write.cu`).

    layer `[num_pages, page_size, 1, 576]`, ckv `[n, 512]`, kpe `[n, 64]` (or `[n, 1, …]`), 16-bit elements with last
    stride 1 and rows at multiples of 16 bytes; where int64 `[2, n]`.
    """
    num_tokens = ckv.shape[0]
    if not num_tokens:
        return
    weight, cos, sin = transform.norm_weight, transform.rope_cos, transform.rope_sin
    launch = prepare_write(
        layer.data.device_id,
        layer.dtype,
        layer.shape[:2],
        layer.strides[:2],
        ckv.strides[0],
        kpe.strides[0],
        num_tokens,
        0 if cos is None else len(cos),
        transform.rope_interleaved,
        transform.norm_eps,
    )
    addresses = (
        layer.data.ptr,
        ckv.data.ptr,
        kpe.data.ptr,
        where.data.ptr,
        0 if weight is None else weight.data.ptr,
        0 if cos is None else cos.data.ptr,
        0 if sin is None else sin.data.ptr,
    )
    launch(stream.ptr, addresses)


@functools.lru_cache(maxsize=256)
def prepare_write(
    device: int,
    dtype: np.dtype,
    pages: tuple[int, int],
    strides: tuple[int, int],
    ckv_stride: int,
    kpe_stride: int,
    num_tokens: int,
    rope_positions: int,
    rope_interleaved: bool,
    norm_eps: float,
) -> Launch:
    """The writer of `launch_write` for one shape, strides in bytes; a call gives ``_WRITE_ADDRESSES``."""
    num_pages, page_size = pages
    item_bytes = dtype.itemsize
    values = {
        "pool_stride_page": strides[0] // item_bytes,
        "pool_stride_row": strides[1] // item_bytes,
        "ckv_stride": ckv_stride // item_bytes,
        "kpe_stride": kpe_stride // item_bytes,
        "num_slots": num_pages * page_size,
        "page_size_log2": _log2(page_size),
        "num_tokens": num_tokens,
        "rope_positions": rope_positions,
        "rope_interleaved": rope_interleaved,
        "norm_eps": norm_eps,
    }
    grid = (-(-num_tokens // params.WRITE_ROWS), 1, 1)
    threads = params.WRITE_ROWS * params.WARP_THREADS
    return _prepare(f"cache_write.{dtype}", device, grid, threads, params.WRITE_PARAMS, values, _WRITE_ADDRESSES)


def load_write(dtype: str, device: int) -> None:
    """Have the kernel of `launch_write` ready."""
    driver._function(f"cache_write.{dtype}", device, 0)


# ---- pages and sequences -------------------------------------------------------------------------------------------


def launch_copy(layers: Any, pages: Any, stream: Any) -> None:
    """Copy pages in all layers (`cuda/cache_copy.cu`): layers `[num_layers, num_pages, page_size, 1, 576]`, pages int32
    `[n, 2]` (from, to), none of which is in both columns."""
    pool = layers.data
    launch = _copy_launch(pool.device_id, layers.dtype.itemsize, layers.shape, layers.strides[:2], len(pages))
    launch(stream.ptr, (pool.ptr, pages.data.ptr))


@functools.lru_cache(maxsize=64)
def _copy_launch(
    device: int, item_bytes: int, shape: tuple[int, ...], strides: tuple[int, int], num_copies: int
) -> Launch:
    num_layers, num_pages, page_size, _, row = shape
    values = {
        "pool_stride_layer": strides[0] // item_bytes,
        "pool_stride_page": strides[1] // item_bytes,
        "page_elems": page_size * row,
        "num_layers": num_layers,
        "num_pages": num_pages,
    }
    shares = -(-page_size * row * item_bytes // (16 * params.COPY_THREADS))
    grid = (num_copies * num_layers, shares, 1)
    return _prepare("cache_copy", device, grid, params.COPY_THREADS, params.COPY_PARAMS, values, _COPY_ADDRESSES)


def launch_gather(layer: Any, block_table: Any, spans: Any, longest: int, rows: Any, stream: Any) -> None:
    """Gather sequences (`cuda/cache_gather.cu`): spans int64 `[n, 3]` (row of the table, tokens, first of rows), rows
    `[total, 576]`; `longest` is the largest number of tokens."""
    pool = layer.data
    grid = (len(spans), min(-(-longest // params.GATHER_ROWS), MAX_GRID_Y), 1)
    launch = _gather_launch(
        pool.device_id, layer.dtype.itemsize, layer.shape[:2], layer.strides[:2], block_table.shape[1], grid
    )
    launch(stream.ptr, (pool.ptr, rows.data.ptr, block_table.data.ptr, spans.data.ptr))


@functools.lru_cache(maxsize=64)
def _gather_launch(
    device: int,
    item_bytes: int,
    pages: tuple[int, int],
    strides: tuple[int, int],
    max_pages: int,
    grid: tuple[int, int, int],
) -> Launch:
    num_pages, page_size = pages
    values = {
        "pool_stride_page": strides[0] // item_bytes,
        "pool_stride_row": strides[1] // item_bytes,
        "block_table_stride": max_pages,
        "max_pages": max_pages,
        "num_pages": num_pages,
        "page_size_log2": _log2(page_size),
    }
    threads = params.GATHER_ROWS * params.WARP_THREADS
    return _prepare("cache_gather", device, grid, threads, params.GATHER_PARAMS, values, _GATHER_ADDRESSES)


def _log2(page_size: int) -> int:
    return page_size.bit_length() - 1
