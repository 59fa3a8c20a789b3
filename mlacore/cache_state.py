"""What a cache is made of, and how it is read: layout, books, memory, and the calls that change nothing.

`mlacore.cache.PagedKVCache` adds the calls that do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlacore import arrays, cache_checks, shapes
from mlacore.cache_layout import CacheLayout, NewTokens
from mlacore.cache_numpy import NumpyStore
from mlacore.cache_stats import CacheStats, measure
from mlacore.host_tables import Change, HostTables
from mlacore.params import KV_LORA_RANK, PAGE_SIZE, QK_ROPE_HEAD_DIM

Integers = Sequence[int] | np.ndarray


class CacheState:
    """Books and memory of a cache; `PagedKVCache` says what the parameters and attributes are."""

    def __init__(
        self,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        *,
        kv_lora_rank: int = KV_LORA_RANK,
        qk_rope_head_dim: int = QK_ROPE_HEAD_DIM,
        dtype: Any = "bfloat16",
        num_layers: int | None = None,
        interleaved: bool = False,
        max_seqs: int = 256,
        max_seq_len: int = 2**20,
        device: int | str | None = None,
    ) -> None:
        self.layout = layout = CacheLayout(
            num_pages=cache_checks.check_int32_count("num_pages", num_pages),
            page_size=shapes.check_count("page_size", page_size),
            kv_lora_rank=shapes.check_count("kv_lora_rank", kv_lora_rank),
            qk_rope_head_dim=shapes.check_count("qk_rope_head_dim", qk_rope_head_dim),
            dtype=arrays.as_dtype(dtype),
            num_layers=None if num_layers is None else shapes.check_count("num_layers", num_layers),
            interleaved=shapes.check_bool("interleaved", interleaved),
            device=cache_checks.resolve_device(device),
        )
        self.num_pages, self.page_size, self.dtype = layout.num_pages, layout.page_size, layout.dtype
        self.kv_lora_rank, self.qk_rope_head_dim = layout.kv_lora_rank, layout.qk_rope_head_dim
        self.device = layout.device
        self.max_seqs = shapes.check_count("max_seqs", max_seqs)
        self.max_seq_len = cache_checks.check_int32_count("max_seq_len", max_seq_len)
        if layout.device is not None:
            cache_checks.check_kernels_fit(layout)
        if layout.interleaved and layout.num_layers is None:
            raise ValueError("interleaved: got True, expected False with num_layers=None (there is one layer)")

        self._host = HostTables(layout.num_pages, layout.page_size, self.max_seqs, self.max_seq_len)
        self._lookups = self._lookup_hits = 0  # tokens asked for by prefix, and found
        self._last_asked: tuple[Any, ...] = ()
        self._last_rows = np.empty(0, np.int64)
        self._store: Any
        if layout.device is None:
            self._store = NumpyStore(layout, *self._host.table.shape)
        else:
            from mlacore.cache_cuda import CudaStore

            self._store = CudaStore(layout, *self._host.table.shape, self._stream(None))
        self.pool: Any = self._store.pool
        self.layers: tuple[Any, ...] = tuple(self._store.layers)
        self.block_table: Any = self._store.block_table
        self.cache_seqlens: Any = self._store.cache_seqlens

    # ---- what attention reads ----------------------------------------------------------------------------------------

    def batch(self, seqs: Integers, *, stream: Any = None) -> tuple[Any, Any]:
        """Block table and lengths of a batch, in the order of `seqs`.

        They are copies, as wide as the longest sequence needs: ask again after the sequences have grown. Where the
        batch is the first rows, nothing needs to be copied: ``block_table[:n]`` and ``cache_seqlens[:n]``.

        Returns
        -------
        block_table : array
            int32 ``[n, pages]``.
        cache_seqlens : array
            int32 ``[n]``.
        """
        stream = self._stream(stream)
        rows = self._live(seqs)
        width = max(1, int(self._host.pages_held[rows].max(initial=0)))
        with self._store.at(stream):
            return self._store.batch(rows, width, stream)

    def gather(self, seqs: Integers, *, layer: int = 0, stream: Any = None) -> Any:
        """Rows of sequences of one layer, one after the other, in new contiguous memory.

        Returns
        -------
        array
            dtype ``[sum(lengths), kv_lora_rank + qk_rope_head_dim]``, as long as ``seq_lens[seqs]`` says.
        """
        stream = self._stream(stream)
        rows = self._live(seqs)
        index = cache_checks.check_layer(layer, self.layout)
        with self._store.at(stream):
            return self._store.gather(index, rows, self._host.seq_lens[rows].astype(np.int64), stream)

    def stats(self) -> CacheStats:
        """Pages by state, bytes, fragmentation, sequences and hit rate, from the books."""
        return measure(self._host, self.nbytes, self._lookups, self._lookup_hits)

    @property
    def seq_lens(self) -> np.ndarray:
        """int32 ``[max_seqs]`` on the host: lengths in tokens, 0 without a sequence; a live view, read-only."""
        view = self._host.seq_lens.view()
        view.flags.writeable = False
        return view

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds, findable ones included."""
        return self._host.pool.num_free

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's rows in all layers: ``layers * (kv_lora_rank + qk_rope_head_dim) * itemsize``."""
        return (self.layout.num_layers or 1) * self.layout.row * self.layout.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return self.layout.num_pages * self.layout.page_size * self.bytes_per_token

    def check_integrity(self) -> None:
        """Prove that free, cached and held pages are all pages, that counts of holders equal the tables, that no page
        is in two sequences unless shared, and that block_table and cache_seqlens equal the books.

        A RuntimeError names the first that is wrong. Reads the tables back, so on a GPU it waits for the device.
        """
        with self._store.at(self._stream(None)):
            tables = self._store.tables()
        self._host.check_integrity(*tables)

    def to_numpy(self) -> dict[str, np.ndarray]:
        """All sequences, and the pages that can be found, as host arrays for `load`; see `mlacore.cache_files`."""
        from mlacore import cache_files

        return cache_files.to_numpy(self)

    def save(self, path: Any) -> None:
        """Write `to_numpy` to a file: a name, which gets the ending ``.npz`` if it has none, or a binary file."""
        content: dict[str, Any] = self.to_numpy()
        np.savez(path, **content)

    def __repr__(self) -> str:
        layout = self.layout
        layers = "" if layout.num_layers is None else f"{layout.num_layers} layers, "
        return (
            f"<PagedKVCache {layout.dtype.name} on {arrays.device_name(self.device)}: {layers}"
            f"{layout.num_pages - self.num_free_pages} of {layout.num_pages} pages of {layout.page_size} tokens, "
            f"{np.count_nonzero(self._host.alive)} of {self.max_seqs} sequences>"
        )

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _update(self, change: Change, stream: Any) -> NewTokens:
        with self._store.at(stream):
            return self._update_here(change, stream)

    def _update_here(self, change: Change, stream: Any) -> NewTokens:
        """Apply `change` everywhere and return where the tokens go that it asks for.

        The mirrors come first: a launch that fails leaves the books as they were. Pages are copied before the tables
        lead to the copies.
        """
        if len(change.copies):
            self._store.copy_pages(change.copies, stream)
        where = self._store.apply(change.tables, stream)
        self._host.commit(change)
        return NewTokens(where, change.tables)

    def _live(self, seqs: Integers) -> np.ndarray:
        """`seqs` as rows of the table, checked; step after step brings the same ones, which are not checked again."""
        if not isinstance(seqs, np.ndarray):
            return cache_checks.check_seqs(seqs, self._host.alive)
        asked = self._host.generation, seqs.dtype, seqs.shape, seqs.tobytes()
        if asked != self._last_asked:
            rows = cache_checks.check_seqs(seqs, self._host.alive).copy()
            rows.flags.writeable = False  # changes refer to it, and callers get to see those
            self._last_asked, self._last_rows = asked, rows
        return self._last_rows

    def _stream(self, stream: Any) -> Any:
        """The CuPy stream to work on; None in NumPy."""
        if self.layout.device is None:
            arrays.check_no_stream(stream)
            return None
        return arrays.as_stream(stream, self.layout.device)
