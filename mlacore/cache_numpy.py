"""The cache's memory and its operations in NumPy. `mlacore.cache_cuda` is the same on a GPU."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from mlacore.block_tables import TableChanges, advance_rows_numpy, apply_changes_numpy, spread
from mlacore.cache_layout import CacheLayout, RowTransform


class NumpyStore:
    """Pool, block table, lengths and limits as NumPy arrays, and what is done to them.

    Attributes
    ----------
    pool : array
        As `CacheLayout.pool_shape` says.
    layers : array
        A view of it, ``[num_layers, num_pages, page_size, 1, row]``.
    block_table, cache_seqlens, limits : array
        int32 ``[max_seqs, max_pages]``, ``[max_seqs]`` and ``[max_seqs]``.
    """

    def __init__(self, layout: CacheLayout, max_seqs: int, max_pages: int) -> None:
        self._layout = layout
        self.pool = np.empty(layout.pool_shape, layout.dtype)
        self.layers = layout.by_layer(self.pool)
        self.block_table = np.full((max_seqs, max_pages), -1, np.int32)
        self.cache_seqlens = np.zeros(max_seqs, np.int32)
        self.limits = np.zeros(max_seqs, np.int32)

    def at(self, stream: None) -> contextlib.AbstractContextManager[Any]:
        """The context that the methods below run in."""
        return contextlib.nullcontext()

    def empty_tokens(self, num_tokens: int) -> np.ndarray:
        """Room for slots and positions of tokens: int64 ``[2, num_tokens]``, -1."""
        return np.full((2, num_tokens), -1, np.int64)

    def apply(self, changes: TableChanges, stream: None) -> np.ndarray:
        """Bring tables up to date; slots and positions of the tokens asked for, int64 ``[2, n]``."""
        where = np.empty((2, changes.num_tokens), np.int64)
        page_size = self._layout.page_size
        apply_changes_numpy(changes, self.block_table, self.cache_seqlens, self.limits, where, page_size)
        return where

    def advance(self, where: np.ndarray, num_tokens: int, stream: None) -> None:
        """Advance rows by their own lengths and limits; see `advance_rows_numpy`."""
        tables = self.block_table, self.cache_seqlens, self.limits
        advance_rows_numpy(*tables, where, num_tokens, self._layout.page_size)

    def as_rows(self, ckv: np.ndarray, kpe: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of tokens with one leading axis: ckv ``[n, kv_lora_rank]`` and kpe ``[n, qk_rope_head_dim]``."""
        return ckv.reshape(-1, self._layout.kv_lora_rank), kpe.reshape(-1, self._layout.qk_rope_head_dim)

    def write(
        self, layer: int, where: np.ndarray, ckv: np.ndarray, kpe: np.ndarray, transform: RowTransform, stream: None
    ) -> None:
        """Write rows of tokens, as `as_rows` gives them, where they belong."""
        write_rows(self.layers[layer], where, ckv, kpe, transform)

    def copy_pages(self, pages: np.ndarray, stream: None) -> None:
        """Copy pages in all layers: int32 ``[n, 2]`` (from, to), none of which is in both columns."""
        self.layers[:, pages[:, 1]] = self.layers[:, pages[:, 0]]

    def gather(self, layer: int, rows: np.ndarray, lengths: np.ndarray, stream: None) -> np.ndarray:
        """The tokens of `rows`, one after the other: dtype ``[sum(lengths), row]``."""
        owner, position = spread(lengths)
        columns, offsets = np.divmod(position, self._layout.page_size)
        return self.layers[layer, self.block_table[rows[owner], columns], offsets, 0]

    def batch(self, rows: np.ndarray, width: int, stream: None) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the table's first `width` columns and of the lengths."""
        return self.block_table[rows, :width], self.cache_seqlens[rows]

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Block table, lengths and limits on the host."""
        return self.block_table, self.cache_seqlens, self.limits

    def set_tables(self, block_table: np.ndarray, cache_seqlens: np.ndarray) -> None:
        """Block table and lengths from the host; no row may be advanced."""
        self.block_table[...], self.cache_seqlens[...] = block_table, cache_seqlens

    def read_pages(self, pages: np.ndarray) -> np.ndarray:
        """Pages on the host: dtype ``[num_layers, n, page_size, row]``."""
        return self.layers[:, :, :, 0][:, pages]

    def write_pages(self, pages: np.ndarray) -> None:
        """Fill the first pages of the pool from the host, as `read_pages` gave them."""
        self.layers[:, : pages.shape[1], :, 0] = pages


def write_rows(layer: np.ndarray, where: np.ndarray, ckv: np.ndarray, kpe: np.ndarray, transform: RowTransform) -> None:
    """Write rows of tokens into one layer's pool ``[num_pages, page_size, 1, row]``; slots outside it are skipped."""
    num_pages, page_size = layer.shape[:2]
    slots, positions = where
    inside = (slots >= 0) & (slots < num_pages * page_size)
    pages, offsets = np.divmod(slots[inside], page_size)
    rows, latent = layer[:, :, 0], ckv.shape[1]
    rows[pages, offsets, :latent] = normalised(ckv[inside], transform)
    rows[pages, offsets, latent:] = rotated(kpe[inside], positions[inside], transform)


def normalised(ckv: np.ndarray, transform: RowTransform) -> np.ndarray:
    """RMSNorm in float32, rounded once: ``ckv / sqrt(mean(ckv^2) + eps) * weight``."""
    if transform.norm_weight is None:
        return ckv
    values = ckv.astype(np.float32)
    mean = np.mean(values * values, axis=-1, keepdims=True)
    scale = np.float32(1) / np.sqrt(mean + np.float32(transform.norm_eps))
    return (values * scale * transform.norm_weight.astype(np.float32)).astype(ckv.dtype)


def rotated(kpe: np.ndarray, positions: np.ndarray, transform: RowTransform) -> np.ndarray:
    """RoPE in float32, rounded once: pairs (a, b) become ``(a cos - b sin, a sin + b cos)``; NaN past the tables."""
    if transform.rope_cos is None:
        return kpe
    in_table = (positions >= 0) & (positions < len(transform.rope_cos))
    at = np.where(in_table, positions, 0)
    cos, sin = (np.where(in_table[:, None], table[at], np.nan) for table in (transform.rope_cos, transform.rope_sin))
    cos, sin = cos.astype(np.float32), sin.astype(np.float32)
    half = kpe.shape[1] // 2
    first, second = (
        (np.s_[:, 0::2], np.s_[:, 1::2]) if transform.rope_interleaved else (np.s_[:, :half], np.s_[:, half:])
    )
    values = kpe.astype(np.float32)
    a, b = values[first], values[second]
    result = np.empty_like(values)
    result[first], result[second] = a * cos - b * sin, a * sin + b * cos
    return result.astype(kpe.dtype)
