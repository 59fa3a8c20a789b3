"""Block table updates: what one step changes, as one record, applied by NumPy or on the device.

The host's books (`mlacore.host_tables`) write a record, `TableChanges`; the mirrors and then the books themselves are
brought up to date from it. It is a single int32 array, field by field, then the pages:

    SEQ of all records | LENGTH of all | … | new pages of record 0 | new pages of record 1 | …

A record sets a row's length and how far the device may advance it by itself, puts pages into the row, and asks for the
slots of its last tokens. Each may be empty, so that growing, reserving, truncating, forking and freeing a row are all
the same update. On a GPU a step of short records goes into a launch by value (`mlacore.cache_kernels.launch_update`);
prompts, whose records are long, go through `apply_changes`, a Numba-CUDA kernel. `advance_rows`, another one, makes a
step with no record at all.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

# Fields of a record. TOKENS > 0: the last TOKENS tokens are new, and their slots are asked for; TOKENS < 0: the device
# may add -TOKENS tokens by itself. The new pages are the row's last ones: they end where length and room end.
# `*_AT` are indices: into the slots of this step, and into the packed array itself.
SEQ, LENGTH, TOKENS, SLOTS_AT, NUM_PAGES, PAGES_AT = range(6)
NUM_FIELDS = 6

# One warp a block spreads a step of many one-token changes over the SMs. Numba warns about any grid below 128 blocks
# (CUDA_LOW_OCCUPANCY_WARNINGS), hence the minimum; blocks that find nothing to do leave at once.
THREADS_PER_BLOCK = 32
MIN_BLOCKS = 128
MAX_BLOCKS_Y = 65535

cuda: Any = None  # numba.cuda, from the first launch on: the kernels' bodies name it as a global


class TableChanges(NamedTuple):
    """What one step changes, packed for one upload.

    Attributes
    ----------
    packed : numpy.ndarray
        int32 ``[NUM_FIELDS * num_changes + new pages]``.
    rows : numpy.ndarray
        ``[num_changes]``: the records' rows once more, as what NumPy indexes with (it converts an int32 each time).
    num_tokens : int
        Tokens whose slots are asked for, over all records.
    longest : int
        Largest number of pages or asked tokens of one record.
    reserves : bool
        Whether the device may add tokens to a row.
    entries : pair of numpy.ndarray or None
        Rows and columns of the new pages, where that is known; the records say it too.
    """

    packed: np.ndarray
    rows: np.ndarray
    num_tokens: int
    longest: int
    reserves: bool
    entries: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def num_changes(self) -> int:
        """Rows of the table that change, each once."""
        return len(self.rows)

    @property
    def end(self) -> int:
        """One past the largest position of a token whose slot is asked for."""
        records = self.records
        return int(records[LENGTH].max(initial=0, where=records[TOKENS] > 0))

    @classmethod
    def pack(
        cls,
        seqs: np.ndarray,
        *,
        lengths: Any,
        tokens: Any = 0,
        num_pages: np.ndarray | None = None,
        pages: Any = (),
        some: np.ndarray | None = None,
        entries: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> TableChanges:
        """Pack `[n]` values per field, or one for all; `pages` are the new pages of all records, one after the other.
        With `some`, these records get a page each, at `entries`, and `num_pages` is not asked for.

        The tokens asked for must lie in pages that the row holds already or gets here.
        """
        n = len(seqs)
        begin = n * NUM_FIELDS
        packed = np.empty(begin + len(pages), np.int32)
        # By slices of the packed array, since a two-dimensional view of the records costs as much as three of these.
        packed[:n] = seqs
        packed[LENGTH * n : TOKENS * n] = lengths
        if isinstance(tokens, int):
            packed[TOKENS * n : begin] = _even_fields(n, tokens)
            longest, reserves = max(tokens, 0) if n else 0, tokens < 0
            total = longest * n
        else:
            packed[TOKENS * n : SLOTS_AT * n] = tokens
            asked = np.maximum(packed[TOKENS * n : SLOTS_AT * n], 0)
            ends = asked.cumsum()
            packed[SLOTS_AT * n : NUM_PAGES * n] = ends - asked
            packed[NUM_PAGES * n : begin] = 0
            total, longest = (int(ends[-1]), int(asked.max())) if n else (0, 0)
            reserves = bool(np.count_nonzero(packed[TOKENS * n : SLOTS_AT * n] < 0))
        if len(pages):
            packed[begin:] = pages
            if some is None:
                assert num_pages is not None
                some = num_pages.nonzero()[0]
                num_pages = num_pages.take(some)
            if len(some) == len(pages):  # one each, as in most decode steps
                packed[NUM_PAGES * n : PAGES_AT * n][some] = 1
                packed[PAGES_AT * n : begin][some] = np.arange(begin, len(packed), dtype=np.int32)
                longest = max(longest, 1)
            else:
                assert num_pages is not None
                packed[NUM_PAGES * n : PAGES_AT * n][some] = num_pages
                packed[PAGES_AT * n : begin][some] = num_pages.cumsum() - num_pages + begin
                longest = max(longest, int(num_pages.max()))
        return cls(packed, seqs.astype(np.intp, copy=False), total, longest, reserves, entries)

    @property
    def records(self) -> np.ndarray:
        """int32 ``[NUM_FIELDS, num_changes]``, a view."""
        return self.packed[: self.num_changes * NUM_FIELDS].reshape(NUM_FIELDS, self.num_changes)


@functools.lru_cache(maxsize=16)
def _even_fields(num_changes: int, tokens: int) -> np.ndarray:
    """The fields from TOKENS on where all records ask for as many and get no pages."""
    fields = np.zeros((NUM_FIELDS - TOKENS, num_changes), np.int32)
    fields[0] = tokens
    fields[SLOTS_AT - TOKENS] = np.arange(num_changes) * max(tokens, 0)
    fields.flags.writeable = False
    return fields.ravel()


def apply_changes_numpy(
    changes: TableChanges,
    block_table: np.ndarray,
    cache_seqlens: np.ndarray,
    limits: np.ndarray,
    where: np.ndarray | None,
    page_size: int,
) -> None:
    """Apply `changes` to host arrays.

    Parameters
    ----------
    changes : TableChanges
        What changes.
    block_table : numpy.ndarray
        int32 ``[max_seqs, max_pages]``, written.
    cache_seqlens, limits : numpy.ndarray
        int32 ``[max_seqs]``, written: lengths, and up to which length the device may advance a row; 0 for not at all.
    where : numpy.ndarray or None
        int64 ``[2, changes.num_tokens]``, written: slot ``page * page_size + offset``, and position in its sequence, of
        each token asked for, record by record; None where nobody needs them.
    page_size : int
        Tokens of a page.
    """
    packed, rows = changes.packed, changes.rows
    n = len(rows)
    lengths, tokens = packed[LENGTH * n : TOKENS * n], packed[TOKENS * n : SLOTS_AT * n]
    ends = lengths - np.minimum(tokens, 0) if changes.reserves else lengths
    cache_seqlens[rows] = lengths
    limits[rows] = np.where(tokens < 0, ends, 0) if changes.reserves else 0

    new_pages = packed[n * NUM_FIELDS :]  # in the order of their records
    if changes.entries is not None:
        block_table[changes.entries] = new_pages
    elif len(new_pages):
        num_pages = packed[NUM_PAGES * n : PAGES_AT * n]
        owner, nth = spread(num_pages)
        first_columns = -(-ends // page_size) - num_pages
        block_table[rows[owner], first_columns[owner] + nth] = new_pages

    if where is not None and changes.num_tokens:
        # Token by token only what must be: the tokens that a row puts into one page follow one another there.
        asked = np.maximum(tokens, 0) if changes.reserves else tokens
        starts = lengths - asked
        first_columns = starts // page_size
        owner, nth = spread((lengths - 1) // page_size - first_columns + 1)
        columns = first_columns[owner] + nth
        begins = columns * page_size
        in_page = np.minimum(begins + page_size, lengths[owner]) - np.maximum(begins, starts[owner])
        ahead = block_table[rows[owner], columns].astype(np.int64) * page_size - begins  # of the position
        shifts = starts - packed[SLOTS_AT * n : NUM_PAGES * n]
        np.add(np.arange(changes.num_tokens), shifts.repeat(asked), out=where[1])
        np.add(where[1], ahead.repeat(in_page), out=where[0])


def advance_rows_numpy(
    block_table: np.ndarray,
    cache_seqlens: np.ndarray,
    limits: np.ndarray,
    where: np.ndarray,
    num_tokens: int,
    page_size: int,
) -> None:
    """Add `num_tokens` tokens to each of the first rows whose limit admits them, and say where they go.

    Parameters
    ----------
    block_table, cache_seqlens, limits, page_size
        As in `apply_changes_numpy`; lengths are written.
    where : numpy.ndarray
        int64 ``[2, num_rows * num_tokens]``, written: slots and positions, row by row; -1 for rows that stay.
    num_tokens : int
        Tokens for each row.
    """
    num_rows = where.shape[1] // num_tokens
    lengths, limits = cache_seqlens[:num_rows], limits[:num_rows]
    goes = np.flatnonzero(lengths + num_tokens <= limits)
    positions = lengths[goes, None].astype(np.int64) + np.arange(num_tokens)
    columns, offsets = np.divmod(positions, page_size)
    where[...] = -1
    by_row = where.reshape(2, num_rows, num_tokens)
    by_row[0, goes] = block_table[goes[:, None], columns].astype(np.int64) * page_size + offsets
    by_row[1, goes] = positions
    lengths[goes] += num_tokens


def apply_changes_cuda(
    changes: TableChanges,
    packed: Any,
    block_table: Any,
    cache_seqlens: Any,
    limits: Any,
    where: Any,
    page_size: int,
    stream_ptr: int,
) -> None:
    """`apply_changes_numpy` on the device, in one launch of a Numba kernel.

    Parameters
    ----------
    changes : TableChanges
        What changes.
    packed : cupy.ndarray
        ``changes.packed`` on the device.
    block_table, cache_seqlens, limits, where : cupy.ndarray
        As in `apply_changes_numpy`; `where` must hold an element even if no token asks for one.
    page_size : int
        Tokens of a page.
    stream_ptr : int
        Handle of the stream to launch on. It must be CuPy's current one: for another, Numba makes the two wait.

    Raises
    ------
    ImportError
        If Numba-CUDA is not installed.
    """
    if changes.num_changes == 0:
        return
    kernel, _ = _compiled_kernels()
    blocks_y = max(-(-changes.longest // THREADS_PER_BLOCK), -(-MIN_BLOCKS // changes.num_changes))
    grid = (changes.num_changes, min(blocks_y, MAX_BLOCKS_Y))
    kernel[grid, THREADS_PER_BLOCK, _numba_stream(stream_ptr)](
        packed, changes.num_changes, block_table, cache_seqlens, limits, where, page_size
    )


def advance_rows_cuda(
    block_table: Any,
    cache_seqlens: Any,
    limits: Any,
    where: Any,
    num_tokens: int,
    page_size: int,
    stream_ptr: int,
) -> None:
    """`advance_rows_numpy` on the device, in one launch of a Numba kernel that reads nothing from the host: a CUDA
    graph can replay it. Arguments and errors as in `apply_changes_cuda`."""
    _, kernel = _compiled_kernels()
    num_rows = where.shape[1] // max(1, num_tokens)
    blocks = max(-(-num_rows // THREADS_PER_BLOCK), MIN_BLOCKS)
    kernel[blocks, THREADS_PER_BLOCK, _numba_stream(stream_ptr)](
        block_table, cache_seqlens, limits, where, num_rows, num_tokens, page_size
    )


def apply_changes(
    changes: Any, num_changes: int, block_table: Any, cache_seqlens: Any, limits: Any, where: Any, page_size: int
) -> None:
    """The kernel. Grid: x = record; y and threads stride over its pages, then over its tokens."""
    record = cuda.blockIdx.x
    first = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    stride = cuda.gridDim.y * cuda.blockDim.x
    seq = changes[SEQ * num_changes + record]
    length = changes[LENGTH * num_changes + record]
    tokens = changes[TOKENS * num_changes + record]
    num_pages = changes[NUM_PAGES * num_changes + record]
    pages_at = changes[PAGES_AT * num_changes + record]
    end = length - min(tokens, 0)
    first_column = (end + page_size - 1) // page_size - num_pages

    if first == 0:
        cache_seqlens[seq] = length
        limits[seq] = end if tokens < 0 else 0
    for nth in range(first, num_pages, stride):
        block_table[seq, first_column + nth] = changes[pages_at + nth]
    for nth in range(first, tokens, stride):
        position = length - tokens + nth
        column = position // page_size
        # A new page is read from the record: another thread may not have put it into the table yet.
        if column >= first_column:
            page = changes[pages_at + column - first_column]
        else:
            page = block_table[seq, column]
        at = changes[SLOTS_AT * num_changes + record] + nth
        where[0, at] = np.int64(page) * page_size + position % page_size
        where[1, at] = position


def advance_rows(
    block_table: Any, cache_seqlens: Any, limits: Any, where: Any, num_rows: int, num_tokens: int, page_size: int
) -> None:
    """The kernel. Grid: a row a thread."""
    row = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if row >= num_rows:
        return
    length = cache_seqlens[row]
    goes = length + num_tokens <= limits[row]
    for nth in range(num_tokens):
        at = row * num_tokens + nth
        if goes:
            position = length + nth
            page = block_table[row, position // page_size]
            where[0, at] = np.int64(page) * page_size + position % page_size
            where[1, at] = position
        else:
            where[0, at] = -1
            where[1, at] = -1
    if goes:
        cache_seqlens[row] = length + num_tokens


@functools.cache
def _compiled_kernels() -> tuple[Any, Any]:
    """`apply_changes` and `advance_rows` as Numba dispatchers. Numba is imported here and nowhere else: it takes most
    of a second."""
    try:
        from numba import cuda as numba_cuda
    except ImportError as error:
        raise ImportError(
            f"block tables on a GPU need Numba-CUDA, which cannot be imported ({error}): pip install numba-cuda[cu13]"
        ) from error
    globals()["cuda"] = numba_cuda
    return numba_cuda.jit(apply_changes), numba_cuda.jit(advance_rows)


def _numba_stream(stream_ptr: int) -> Any:
    # 1 is CUDA's handle of the legacy default stream; DLPack, by which Numba takes arrays, refuses CuPy's 0 for it.
    return cuda.external_stream(stream_ptr or 1)


def spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The owner of each of sum(counts) elements and its place there: [2, 0, 1] gives [0, 0, 2] and [0, 1, 0]."""
    owner = np.arange(len(counts)).repeat(counts)
    begin = counts.cumsum() - counts
    return owner, np.arange(len(owner)) - begin[owner]
