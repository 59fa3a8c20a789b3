"""The cache's memory and its operations on a GPU. `mlacore.cache_numpy` is the same in NumPy, and the definition."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from mlacore import arrays, cache_kernels
from mlacore.block_tables import NUM_FIELDS, TableChanges, advance_rows_cuda, apply_changes_cuda
from mlacore.cache_layout import CacheLayout, RowTransform


class CudaStore:
    """Pool, block table, lengths and limits as CuPy arrays, and what is launched to change them.

    Attributes and methods as in `mlacore.cache_numpy.NumpyStore`. Methods run inside ``at(stream)``.
    """

    def __init__(self, layout: CacheLayout, max_seqs: int, max_pages: int, stream: Any) -> None:
        self._layout = layout
        self._cupy = arrays.import_cupy()
        self._nothing_to_enter = contextlib.nullcontext(self._cupy)
        with self.at(stream) as cupy:
            self.pool = cupy.empty(layout.pool_shape, layout.dtype)
            self.layers = layout.by_layer(self.pool)
            self._each_layer = tuple(self.layers)
            self.block_table = cupy.asarray(np.full((max_seqs, max_pages), -1, np.int32))
            self.cache_seqlens = cupy.asarray(np.zeros(max_seqs, np.int32))
            self.limits = cupy.asarray(np.zeros(max_seqs, np.int32))
            self._load_kernels(cupy, stream)
        stream.synchronize()  # the first step may come on another stream

    def at(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """The cache's device and `stream`, current."""
        cuda, device = self._cupy.cuda, self._layout.device
        assert device is not None
        if cuda.get_current_stream() == stream and cuda.runtime.getDevice() == device:
            return self._nothing_to_enter
        return arrays.on_device(device, stream)

    def empty_tokens(self, num_tokens: int) -> Any:
        return self._cupy.asarray(np.full((2, num_tokens), -1, np.int64))

    def apply(self, changes: TableChanges, stream: Any) -> Any:
        num_tokens, page_size = changes.num_tokens, self._layout.page_size
        where = self._cupy.empty((2, num_tokens or 1), np.int64)
        tables = self.block_table, self.cache_seqlens, self.limits, where
        if changes.num_changes:
            if words := cache_kernels.update_words(changes):
                cache_kernels.launch_update(changes, words, *tables, page_size, stream)
            else:
                apply_changes_cuda(changes, self._cupy.asarray(changes.packed), *tables, page_size, stream.ptr)
        return where if num_tokens else where[:, :0]

    def advance(self, where: Any, num_tokens: int, stream: Any) -> None:
        tables = self.block_table, self.cache_seqlens, self.limits
        advance_rows_cuda(*tables, where, num_tokens, self._layout.page_size, stream.ptr)

    def as_rows(self, ckv: Any, kpe: Any) -> tuple[Any, Any]:
        # A view of whatever has evenly spaced rows, such as a slice of a projection's output; else one copy. With one
        # token for each sequence, the first axis is that of rows as it is.
        if ckv.ndim != 2 and ckv.shape[1] != 1:
            ckv = ckv.reshape(-1, self._layout.kv_lora_rank)
        if kpe.ndim != 2 and kpe.shape[1] != 1:
            kpe = kpe.reshape(-1, self._layout.qk_rope_head_dim)
        return ckv, kpe

    def write(self, layer: int, where: Any, ckv: Any, kpe: Any, transform: RowTransform, stream: Any) -> None:
        cache_kernels.launch_write(self._each_layer[layer], where, ckv, kpe, transform, stream)

    def copy_pages(self, pages: np.ndarray, stream: Any) -> None:
        cache_kernels.launch_copy(self.layers, self._cupy.asarray(pages.astype(np.int32)), stream)

    def gather(self, layer: int, rows: np.ndarray, lengths: np.ndarray, stream: Any) -> Any:
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        gathered = self._cupy.empty((total, self._layout.row), self._layout.dtype)
        if total:
            spans = self._cupy.asarray(np.column_stack([rows, lengths, ends - lengths]).astype(np.int64))
            longest = int(lengths.max())
            cache_kernels.launch_gather(self._each_layer[layer], self.block_table, spans, longest, gathered, stream)
        return gathered

    def batch(self, rows: np.ndarray, width: int, stream: Any) -> tuple[Any, Any]:
        index = self._cupy.asarray(rows)
        return self.block_table[:, :width].take(index, axis=0), self.cache_seqlens.take(index)

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Block table, lengths and limits on the host, once the device has done all that it was given."""
        self._cupy.cuda.Device(self._layout.device).synchronize()
        return tuple(self._cupy.asnumpy(array) for array in (self.block_table, self.cache_seqlens, self.limits))

    def set_tables(self, block_table: np.ndarray, cache_seqlens: np.ndarray) -> None:
        self.block_table[...] = self._cupy.asarray(block_table)
        self.cache_seqlens[...] = self._cupy.asarray(cache_seqlens)

    def read_pages(self, pages: np.ndarray) -> np.ndarray:
        self._cupy.cuda.Device(self._layout.device).synchronize()
        index = self._cupy.asarray(pages)
        # As bits, which CuPy can index whatever they stand for.
        layers = [self._cupy.asnumpy(layer.view(np.uint16)[:, :, 0][index]) for layer in self._each_layer]
        return np.stack(layers).view(self._layout.dtype)

    def write_pages(self, pages: np.ndarray) -> None:
        for layer, values in zip(self._each_layer, np.ascontiguousarray(pages).view(np.uint16), strict=True):
            layer.view(np.uint16)[: len(values), :, 0] = self._cupy.asarray(values)

    def _load_kernels(self, cupy: Any, stream: Any) -> None:
        """Changes that change nothing, so that kernels are compiled now and not in the first step, or in a capture; a
        kernel that cannot be had fails here, before there are books to change."""
        where = cupy.empty((2, 1), np.int64)
        nothing = TableChanges.pack(np.zeros(1, np.int32), lengths=0)
        assert len(nothing.packed) == NUM_FIELDS
        tables = self.block_table, self.cache_seqlens, self.limits, where
        self.apply(nothing, stream)
        apply_changes_cuda(nothing, cupy.asarray(nothing.packed), *tables, self._layout.page_size, stream.ptr)
        self.advance(where, 0, stream)
        assert self._layout.device is not None
        cache_kernels.load_write(str(self._layout.dtype), self._layout.device)
