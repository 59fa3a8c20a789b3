"""Launches of the cache's CUDA kernels (`cuda/cache_*.cu`), one function for each.

Callers have validated their arrays and made their device and stream current. Nothing here synchronises.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from struct import Struct
from typing import Any

import numpy as np

from mlacore import driver, params
from mlacore.block_tables import TableChanges
from mlacore.cache_layout import RowTransform

MAX_GRID_Y = 65535
UPDATE_LONGEST = 1024  # pages or tokens of one change, all done by one warp; longer ones are worth an upload


def update_words(changes: TableChanges) -> int | None:
    """The variant of `cuda/cache_update.cu` that takes `changes` by value; None where none does."""
    if changes.longest > UPDATE_LONGEST:
        return None
    return next((words for words in params.UPDATE_WORDS if len(changes.packed) <= words), None)


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
    fields = {
        "block_table": block_table.data.ptr,
        "cache_seqlens": cache_seqlens.data.ptr,
        "limits": limits.data.ptr,
        "where": where.data.ptr,
        "block_table_stride": block_table.shape[1],
        "num_changes": changes.num_changes,
        "num_tokens": changes.num_tokens,
        "page_size_log2": _log2(page_size),
    }
    by_value = np.empty(words, np.int32)
    by_value[: len(changes.packed)] = changes.packed
    _launch(
        f"cache_update.{words}",
        block_table,
        (-(-changes.num_changes // params.UPDATE_ROWS), 1, 1),
        params.UPDATE_ROWS * params.WARP_THREADS,
        stream,
        (_record(params.UPDATE_PARAMS, fields), by_value),
    )


def launch_write(layer: Any, where: Any, ckv: Any, kpe: Any, transform: RowTransform, stream: Any) -> None:
    """Write cache rows (`cuda/cache_write.cu`).

    layer `[num_pages, page_size, 1, 576]`, ckv `[n, 512]`, kpe `[n, 64]`, 16-bit elements with last stride 1 and rows
    at multiples of 16 bytes; where int64 `[2, n]`.
    """
    if len(ckv) == 0:
        return
    item_bytes = layer.dtype.itemsize
    num_pages, page_size = layer.shape[:2]
    has_norm, has_rope = transform.norm_weight is not None, transform.rope_cos is not None
    fields = {
        "pool": layer.data.ptr,
        "ckv": ckv.data.ptr,
        "kpe": kpe.data.ptr,
        "where": where.data.ptr,
        "norm_weight": transform.norm_weight.data.ptr if has_norm else 0,
        "rope_cos": transform.rope_cos.data.ptr if has_rope else 0,
        "rope_sin": transform.rope_sin.data.ptr if has_rope else 0,
        "pool_stride_page": layer.strides[0] // item_bytes,
        "pool_stride_row": layer.strides[1] // item_bytes,
        "ckv_stride": ckv.strides[0] // item_bytes,
        "kpe_stride": kpe.strides[0] // item_bytes,
        "num_slots": num_pages * page_size,
        "page_size_log2": _log2(page_size),
        "num_tokens": len(ckv),
        "rope_positions": len(transform.rope_cos) if has_rope else 0,
        "rope_interleaved": transform.rope_interleaved,
        "norm_eps": transform.norm_eps,
    }
    _launch(
        f"cache_write.{layer.dtype}",
        layer,
        (-(-len(ckv) // params.WRITE_ROWS), 1, 1),
        params.WRITE_ROWS * params.WARP_THREADS,
        stream,
        (_record(params.WRITE_PARAMS, fields),),
    )


def launch_copy(layers: Any, pages: Any, stream: Any) -> None:
    """Copy pages in all layers (`cuda/cache_copy.cu`): layers `[num_layers, num_pages, page_size, 1, 576]`, pages int32
    `[n, 2]` (from, to), none of which is in both columns."""
    item_bytes = layers.dtype.itemsize
    num_layers, num_pages, page_size, _, row = layers.shape
    fields = {
        "pool": layers.data.ptr,
        "pages": pages.data.ptr,
        "pool_stride_layer": layers.strides[0] // item_bytes,
        "pool_stride_page": layers.strides[1] // item_bytes,
        "page_elems": page_size * row,
        "num_layers": num_layers,
        "num_pages": num_pages,
    }
    shares = -(-page_size * row * item_bytes // (16 * params.COPY_THREADS))
    grid = (len(pages) * num_layers, shares, 1)
    _launch("cache_copy", layers, grid, params.COPY_THREADS, stream, (_record(params.COPY_PARAMS, fields),))


def launch_gather(layer: Any, block_table: Any, spans: Any, longest: int, rows: Any, stream: Any) -> None:
    """Gather sequences (`cuda/cache_gather.cu`): spans int64 `[n, 3]` (row of the table, tokens, first of rows), rows
    `[total, 576]`; `longest` is the largest number of tokens."""
    item_bytes = layer.dtype.itemsize
    num_pages, page_size = layer.shape[:2]
    fields = {
        "pool": layer.data.ptr,
        "rows": rows.data.ptr,
        "block_table": block_table.data.ptr,
        "spans": spans.data.ptr,
        "pool_stride_page": layer.strides[0] // item_bytes,
        "pool_stride_row": layer.strides[1] // item_bytes,
        "block_table_stride": block_table.shape[1],
        "max_pages": block_table.shape[1],
        "num_pages": num_pages,
        "page_size_log2": _log2(page_size),
    }
    grid = (len(spans), min(-(-longest // params.GATHER_ROWS), MAX_GRID_Y), 1)
    threads = params.GATHER_ROWS * params.WARP_THREADS
    _launch("cache_gather", layer, grid, threads, stream, (_record(params.GATHER_PARAMS, fields),))


def _record(struct: np.dtype, fields: dict[str, Any]) -> np.ndarray:
    """`driver._record` in a third of the time: appends are launched token by token."""
    packer, in_order = _packer(struct)
    return np.frombuffer(packer.pack(*in_order(fields)), np.uint8)


@functools.cache
def _packer(struct: np.dtype) -> tuple[Struct, Callable[[dict[str, Any]], tuple[Any, ...]]]:
    assert struct.names is not None
    assert struct.fields is not None
    code = "".join(struct.fields[name][0].char for name in struct.names)
    return Struct(f"@{code}0Q"), operator.itemgetter(*struct.names)


def _launch(
    variant: str, array: Any, grid: tuple[int, int, int], threads: int, stream: Any, arguments: tuple[np.ndarray, ...]
) -> None:
    driver._launch(driver._function(variant, array.data.device_id, 0), grid, threads, 0, stream, arguments)


def _log2(page_size: int) -> int:
    return page_size.bit_length() - 1
