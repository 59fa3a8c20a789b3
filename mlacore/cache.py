"""The paged MLA cache: a pool of pages, a block table that maps sequences onto it, and the rows written into it.

The host's books (`mlacore.host_tables.HostTables`) are the authority. The arrays that attention reads,
`PagedKVCache.block_table` and `PagedKVCache.cache_seqlens`, mirror them and are updated once a step, by one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlacore import arrays, cache_checks, shapes
from mlacore.block_tables import TableChanges, apply_changes_cuda, apply_changes_numpy
from mlacore.host_tables import HostTables
from mlacore.params import KV_LORA_RANK, PAGE_SIZE, QK_ROPE_HEAD_DIM

__all__ = ["PagedKVCache"]

Integers = Sequence[int] | np.ndarray


class PagedKVCache:
    """Latent and RoPE rows of many sequences in one pool of fixed-size pages: the cache of one layer.

    A sequence is a row of the block table. Tokens are appended to it, pages are claimed from the pool as it grows and
    return when it is freed. A call that raises an error has changed nothing.

    Everywhere below, `seqs` are ``[n]`` sequences, on the host: a ValueError names one that is not alive or comes
    twice. `stream` is the stream to work on; CuPy's current one if None. Calls on one cache belong on one stream, or on
    streams that the caller orders, and in one thread at a time.

    Parameters
    ----------
    num_pages : int
        Pages of the pool.
    page_size : int
        Tokens of a page. The GPU kernels and `mla_decode` serve pages of 64 tokens with rows of 512 + 64 values, and no
        others: a cache of other sizes, which NumPy alone takes, is for storing.
    kv_lora_rank : int
        Values of a token's latent, the first part of its row.
    qk_rope_head_dim : int
        Values of a token's shared RoPE key, the rest of its row.
    dtype : str or dtype
        ``bfloat16``, ``float16`` or, in NumPy, ``float32``.
    max_seqs : int
        Rows of the block table: the most sequences alive at once.
    max_seq_len : int
        Longest sequence in tokens; the block table has ``ceil(max_seq_len / page_size)`` columns, `num_pages` at most.
    device : int or str, optional
        ``"cpu"`` for NumPy; ``"cuda"`` for CuPy's current device; ``"cuda:1"`` or ``1`` for that one. None takes a
        Hopper GPU if there is one, else NumPy.

    Attributes
    ----------
    pool : array
        dtype ``[num_pages, page_size, 1, kv_lora_rank + qk_rope_head_dim]``. Slots without a token hold anything.
    block_table : array
        int32 ``[max_seqs, max_pages]``; entries past a sequence's pages hold anything.
    cache_seqlens : array
        int32 ``[max_seqs]`` in tokens; 0 for rows without a sequence.
    device : int or None
        CUDA ordinal; None for NumPy.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of its range.
    RuntimeError
        If the device asked for is not a Hopper GPU.

    Examples
    --------
    >>> import numpy as np
    >>> from mlacore.cache import PagedKVCache
    >>> cache = PagedKVCache(num_pages=8, max_seqs=4, dtype="float16", device="cpu")
    >>> seqs = cache.allocate(2)
    >>> ckv, kpe = np.zeros((100, 512), np.float16), np.zeros((100, 64), np.float16)
    >>> slots = cache.append(seqs, ckv, kpe, num_tokens=[70, 30])  # two prompts
    >>> slots = cache.append(seqs, ckv[:2, None], kpe[:2, None])  # then a token each
    >>> cache.seq_lens[seqs].tolist(), cache.num_free_pages
    ([71, 31], 5)
    >>> block_table, cache_seqlens = cache.batch(seqs)  # for mla_decode
    >>> cache.free(seqs)
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        *,
        kv_lora_rank: int = KV_LORA_RANK,
        qk_rope_head_dim: int = QK_ROPE_HEAD_DIM,
        dtype: Any = "bfloat16",
        max_seqs: int = 256,
        max_seq_len: int = 2**20,
        device: int | str | None = None,
    ) -> None:
        self.num_pages = cache_checks.check_int32_count("num_pages", num_pages)
        self.page_size = shapes.check_count("page_size", page_size)
        self.kv_lora_rank = shapes.check_count("kv_lora_rank", kv_lora_rank)
        self.qk_rope_head_dim = shapes.check_count("qk_rope_head_dim", qk_rope_head_dim)
        self.dtype = arrays.as_dtype(dtype)
        self.max_seqs = shapes.check_count("max_seqs", max_seqs)
        self.max_seq_len = cache_checks.check_int32_count("max_seq_len", max_seq_len)
        self.device = cache_checks.resolve_device(device)
        self._row_format = cache_checks.RowFormat(self.kv_lora_rank, self.qk_rope_head_dim, self.dtype, self.device)
        if self.device is not None:
            cache_checks.check_kernels_fit(self.page_size, self._row_format)

        self._host = HostTables(self.num_pages, self.page_size, self.max_seqs, self.max_seq_len)
        pool_shape = (self.num_pages, self.page_size, 1, self.kv_lora_rank + self.qk_rope_head_dim)
        self.pool: Any
        self.block_table: Any
        self.cache_seqlens: Any
        if self.device is None:
            self.pool = np.empty(pool_shape, self.dtype)
            self.block_table = self._host.table.copy()
            self.cache_seqlens = self._host.seq_lens.copy()
        else:
            stream = self._stream(None)
            with arrays.on_device(self.device, stream) as cupy:
                self.pool = cupy.empty(pool_shape, self.dtype)
                self.block_table = cupy.asarray(self._host.table)
                self.cache_seqlens = cupy.asarray(self._host.seq_lens)
            # An update that changes nothing: Numba compiles its kernel now and not in the first step.
            self._update(self._host.changes_to_clear(np.zeros(1, np.int32)), stream)
            stream.synchronize()  # the first step may come on another stream

    # ---- sequences -------------------------------------------------------------------------------------------------

    def allocate(self, num_seqs: int) -> np.ndarray:
        """Start empty sequences.

        Parameters
        ----------
        num_seqs : int
            How many, at least 0.

        Returns
        -------
        numpy.ndarray
            int32 ``[num_seqs]``: their rows of the block table, the lowest free ones.

        Raises
        ------
        OutOfSequencesError
            If fewer rows are free.
        """
        return self._host.allocate(shapes.check_count("num_seqs", num_seqs, minimum=0))

    def append(
        self, seqs: Integers, ckv: Any, kpe: Any, *, num_tokens: int | Integers | None = None, stream: Any = None
    ) -> Any:
        """Append tokens to sequences: `extend` and `write` in one call, with their errors.

        Parameters
        ----------
        seqs, stream
            See `PagedKVCache`.
        ckv : array
            Latents in the cache's dtype, on its device: ``[n, t, kv_lora_rank]``, t tokens each. With `num_tokens`:
            ``[sum(num_tokens), kv_lora_rank]``, the tokens of the first sequence, then those of the second, and so on.
        kpe : array
            RoPE keys: as `ckv`, with ``qk_rope_head_dim`` values.
        num_tokens : int or sequence of int, optional
            ``[n]`` tokens of each sequence, at least 0; one number stands for all.

        Returns
        -------
        array
            int64 slots of the tokens, as from `extend`.
        """
        stream = self._stream(stream)
        rows = cache_checks.check_seqs(seqs, self._host.alive)
        dims = self._row_format.dims()
        counts, leading = cache_checks.bind_tokens(dims, rows, ckv, num_tokens)
        empty = not counts.any()
        ckv, kpe = cache_checks.check_values(ckv, kpe, self._row_format, dims, leading, stream, empty=empty)
        slots = self._update(self._host.changes_to_grow(rows, counts), stream)
        self._write(slots, ckv, kpe, stream)
        return slots

    def extend(self, seqs: Integers, num_tokens: int | Integers, *, stream: Any = None) -> Any:
        """Make room for new tokens: claim pages, bring block table and lengths up to date.

        The new slots hold anything until `write` fills them. Apart from it, this can be done before the layer's rows
        are computed.

        Parameters
        ----------
        seqs, stream
            See `PagedKVCache`.
        num_tokens : int or sequence of int
            ``[n]`` tokens of each sequence, at least 0; one number stands for all.

        Returns
        -------
        array
            int64 ``[sum(num_tokens)]`` on the cache's device: slot ``page * page_size + offset`` of each token, the
            tokens of the first sequence, then those of the second, and so on.

        Raises
        ------
        TypeError, ValueError
            If a sequence would grow past `max_seq_len`, or a number is negative.
        OutOfPagesError
            If fewer pages are free than needed.
        """
        stream = self._stream(stream)
        rows = cache_checks.check_seqs(seqs, self._host.alive)
        return self._update(self._host.changes_to_grow(rows, cache_checks.check_counts(rows, num_tokens)), stream)

    def write(self, slots: Any, ckv: Any, kpe: Any, *, stream: Any = None) -> None:
        """Write the rows of tokens into their slots, in one kernel launch.

        Parameters
        ----------
        slots : array
            int64 ``[num_tokens]``, from `extend`. A token whose slot lies outside the pool is skipped.
        ckv, kpe : array
            Latents ``[num_tokens, kv_lora_rank]`` and RoPE keys ``[num_tokens, qk_rope_head_dim]`` in the cache's
            dtype, on its device.
        stream
            See `PagedKVCache`.

        Raises
        ------
        TypeError, ValueError
            If an array has another shape, dtype or device, or rows that are not contiguous or not at multiples of 16
            bytes.
        """
        stream = self._stream(stream)
        dims = self._row_format.dims()
        slots = cache_checks.check_slots(slots, self._row_format, dims, stream)
        empty = slots.size == 0
        ckv, kpe = cache_checks.check_values(ckv, kpe, self._row_format, dims, ("num_tokens",), stream, empty=empty)
        self._write(slots, ckv, kpe, stream)

    def free(self, seqs: Integers, *, stream: Any = None) -> None:
        """End sequences. Their rows and pages are free for the next call."""
        stream = self._stream(stream)
        rows = cache_checks.check_seqs(seqs, self._host.alive)
        self._update(self._host.changes_to_clear(rows), stream)
        self._host.alive[rows] = False

    # ---- what attention and callers read ---------------------------------------------------------------------------

    def batch(self, seqs: Integers, *, stream: Any = None) -> tuple[Any, Any]:
        """Block table and lengths of a batch, in the order of `seqs`.

        They are copies, as wide as the longest sequence needs: ask again after the sequences have grown.

        Returns
        -------
        block_table : array
            int32 ``[n, pages]``.
        cache_seqlens : array
            int32 ``[n]``.
        """
        stream = self._stream(stream)
        rows = cache_checks.check_seqs(seqs, self._host.alive)
        width = max(1, int(self._host.pages_held[rows].max(initial=0)))
        if self.device is None:
            return self.block_table[rows, :width], self.cache_seqlens[rows]
        with arrays.on_device(self.device, stream) as cupy:
            index = cupy.asarray(rows)
            return self.block_table[:, :width].take(index, axis=0), self.cache_seqlens.take(index)

    @property
    def seq_lens(self) -> np.ndarray:
        """int32 ``[max_seqs]`` on the host: lengths in tokens, 0 without a sequence; a live view, read-only."""
        view = self._host.seq_lens.view()
        view.flags.writeable = False
        return view

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return self._host.num_free_pages

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's row: ``(kv_lora_rank + qk_rope_head_dim) * itemsize``."""
        return (self.kv_lora_rank + self.qk_rope_head_dim) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return self.num_pages * self.page_size * self.bytes_per_token

    def check_integrity(self) -> None:
        """Prove that each page is free or held by one sequence, and that block_table and cache_seqlens equal the books.

        A RuntimeError names the first that is wrong. Reads both arrays back, so on a GPU it waits for the device.
        """
        block_table, cache_seqlens = self.block_table, self.cache_seqlens
        if self.device is not None:
            with arrays.on_device(self.device, self._stream(None)) as cupy:
                cupy.cuda.Device(self.device).synchronize()
                block_table, cache_seqlens = cupy.asnumpy(block_table), cupy.asnumpy(cache_seqlens)
        self._host.check_integrity(block_table, cache_seqlens)

    def __repr__(self) -> str:
        return (
            f"<PagedKVCache {self.dtype.name} on {arrays.device_name(self.device)}: "
            f"{self.num_pages - self.num_free_pages} of {self.num_pages} pages of {self.page_size} tokens, "
            f"{np.count_nonzero(self._host.alive)} of {self.max_seqs} sequences>"
        )

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _update(self, changes: TableChanges, stream: Any) -> Any:
        """Apply `changes` everywhere and return the slots they ask for.

        The mirrors come first: a launch that fails leaves the books as they were.
        """
        if self.device is None:
            slots = np.empty(changes.num_tokens, np.int64)
            apply_changes_numpy(changes, self.block_table, self.cache_seqlens, slots, self.page_size)
        else:
            with arrays.on_device(self.device, stream) as cupy:
                slots = cupy.empty(max(1, changes.num_tokens), np.int64)
                packed = cupy.asarray(changes.packed)
                apply_changes_cuda(
                    changes, packed, self.block_table, self.cache_seqlens, slots, self.page_size, stream.ptr
                )
                slots = slots[: changes.num_tokens]
        self._host.commit(changes)
        return slots

    def _write(self, slots: Any, ckv: Any, kpe: Any, stream: Any) -> None:
        if slots.size == 0:
            return
        if self.device is None:
            inside = (slots >= 0) & (slots < self.num_pages * self.page_size)
            rows = self.pool.reshape(-1, self.kv_lora_rank + self.qk_rope_head_dim)
            rows[slots[inside], : self.kv_lora_rank] = ckv.reshape(-1, self.kv_lora_rank)[inside]
            rows[slots[inside], self.kv_lora_rank :] = kpe.reshape(-1, self.qk_rope_head_dim)[inside]
        else:
            from mlacore import driver

            with arrays.on_device(self.device, stream):
                # A view of whatever has evenly spaced rows, such as a slice of a projection's output; else one copy.
                ckv, kpe = ckv.reshape(-1, self.kv_lora_rank), kpe.reshape(-1, self.qk_rope_head_dim)
                driver.launch_append(self.pool, ckv, kpe, slots, stream)

    def _stream(self, stream: Any) -> Any:
        """The CuPy stream to work on; None in NumPy."""
        if self.device is None:
            arrays.check_no_stream(stream)
            return None
        with arrays.import_cupy().cuda.Device(self.device):
            return arrays.as_stream(stream)
