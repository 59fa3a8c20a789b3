"""Block table updates: what one step changes, as one record, applied by NumPy or by one Numba launch.

The host's books (`mlacore.host_tables`) write a record, `TableChanges`; the mirrors (`apply_changes_cuda` on a GPU) and
then the books themselves (`apply_changes_numpy`) are brought up to date from it. It is a single int32 array, so one
upload:

    record 0 | record 1 | … | record n-1 | new pages of record 0 | new pages of record 1 | …

A record may add pages to a row, set the row's length and ask for the slots of a run of tokens. Each of the three may be
empty, so that growing, freeing, truncating and copying a row are all the same update.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

# Fields of a record. `*_AT` are indices: into the slots of this step, and into the packed array itself.
SEQ, LENGTH, FIRST_TOKEN, NUM_TOKENS, SLOTS_AT, FIRST_COLUMN, NUM_PAGES, PAGES_AT = range(8)
NUM_FIELDS = 8

# One warp a block spreads a step of many one-token changes over the SMs. Numba warns about any grid below 128 blocks
# (CUDA_LOW_OCCUPANCY_WARNINGS), hence the minimum; blocks that find nothing to do leave at once.
THREADS_PER_BLOCK = 32
MIN_BLOCKS = 128
MAX_BLOCKS_Y = 65535

cuda: Any = None  # numba.cuda, from the first launch on: the kernel's body names it as a global


@dataclass(frozen=True, slots=True)
class TableChanges:
    """What one step changes, packed for one upload.

    Attributes
    ----------
    packed : numpy.ndarray
        int32 ``[num_changes * NUM_FIELDS + new pages]``.
    num_changes : int
        Rows of the table that change, each once.
    num_tokens : int
        Tokens whose slots are asked for, over all records.
    longest : int
        Largest number of pages or tokens of one record.
    """

    packed: np.ndarray
    num_changes: int
    num_tokens: int
    longest: int

    @classmethod
    def pack(
        cls,
        seqs: np.ndarray,
        *,
        lengths: Any,
        first_tokens: Any = 0,
        num_tokens: Any = 0,
        first_columns: Any = 0,
        num_pages: Any = 0,
        pages: Any = (),
    ) -> TableChanges:
        """Pack `[n]` values per field, or one for all; `pages` are the new pages of all records, one after the other.

        The tokens ``[first, first + num)`` of a row must lie in pages that it holds already or gets here, and the new
        pages fill the columns from ``first_columns`` on.
        """
        n = len(seqs)
        packed = np.empty(n * NUM_FIELDS + len(pages), np.int32)
        packed[n * NUM_FIELDS :] = pages
        records = packed[: n * NUM_FIELDS].reshape(n, NUM_FIELDS)
        records[:, SEQ] = seqs
        records[:, LENGTH] = lengths
        records[:, FIRST_TOKEN] = first_tokens
        records[:, NUM_TOKENS] = num_tokens
        records[:, FIRST_COLUMN] = first_columns
        records[:, NUM_PAGES] = num_pages
        records[:, SLOTS_AT] = np.cumsum(records[:, NUM_TOKENS]) - records[:, NUM_TOKENS]
        records[:, PAGES_AT] = np.cumsum(records[:, NUM_PAGES]) - records[:, NUM_PAGES] + n * NUM_FIELDS
        longest = int(records[:, [NUM_TOKENS, NUM_PAGES]].max(initial=0))
        return cls(packed, n, int(records[:, NUM_TOKENS].sum()), longest)

    @property
    def records(self) -> np.ndarray:
        """int32 ``[num_changes, NUM_FIELDS]``, a view."""
        return self.packed[: self.num_changes * NUM_FIELDS].reshape(self.num_changes, NUM_FIELDS)


def apply_changes_numpy(
    changes: TableChanges, block_table: np.ndarray, cache_seqlens: np.ndarray, slots: np.ndarray | None, page_size: int
) -> None:
    """Apply `changes` to host arrays.

    Parameters
    ----------
    changes : TableChanges
        What changes.
    block_table : numpy.ndarray
        int32 ``[max_seqs, max_pages]``, written.
    cache_seqlens : numpy.ndarray
        int32 ``[max_seqs]``, written.
    slots : numpy.ndarray or None
        int64 ``[changes.num_tokens]``, written: ``page * page_size + offset`` of each token asked for, record by
        record; None where nobody needs them.
    page_size : int
        Tokens of a page.
    """
    records = changes.records
    seqs = records[:, SEQ]
    cache_seqlens[seqs] = records[:, LENGTH]

    if len(changes.packed) > records.size:  # most decode steps claim no page
        record, nth = _spread(records[:, NUM_PAGES])
        new_pages = changes.packed[records[record, PAGES_AT] + nth]
        block_table[seqs[record], records[record, FIRST_COLUMN] + nth] = new_pages

    if slots is not None:
        record, nth = _spread(records[:, NUM_TOKENS])
        columns, offsets = np.divmod(records[record, FIRST_TOKEN] + nth, page_size)
        slots[:] = block_table[seqs[record], columns].astype(np.int64) * page_size + offsets


def apply_changes_cuda(
    changes: TableChanges,
    packed: Any,
    block_table: Any,
    cache_seqlens: Any,
    slots: Any,
    page_size: int,
    stream_ptr: int,
) -> None:
    """`apply_changes_numpy` on the device, in one kernel launch.

    Parameters
    ----------
    changes : TableChanges
        What changes.
    packed : cupy.ndarray
        ``changes.packed`` on the device.
    block_table, cache_seqlens, slots : cupy.ndarray
        As in `apply_changes_numpy`; slots must hold an element even if no token asks for one.
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
    kernel = _compiled_kernel()
    blocks_y = max(-(-changes.longest // THREADS_PER_BLOCK), -(-MIN_BLOCKS // changes.num_changes))
    grid = (changes.num_changes, min(blocks_y, MAX_BLOCKS_Y))
    # 1 is CUDA's handle of the legacy default stream; DLPack, by which Numba takes arrays, refuses CuPy's 0 for it.
    stream = cuda.external_stream(stream_ptr or 1)
    kernel[grid, THREADS_PER_BLOCK, stream](packed, block_table, cache_seqlens, slots, page_size)


def apply_changes(changes: Any, block_table: Any, cache_seqlens: Any, slots: Any, page_size: int) -> None:
    """The kernel. Grid: x = record; y and threads stride over its pages, then over its tokens."""
    record = cuda.blockIdx.x * NUM_FIELDS
    first = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    stride = cuda.gridDim.y * cuda.blockDim.x
    seq = changes[record + SEQ]
    first_column = changes[record + FIRST_COLUMN]
    pages_at = changes[record + PAGES_AT]

    if first == 0:
        cache_seqlens[seq] = changes[record + LENGTH]
    for nth in range(first, changes[record + NUM_PAGES], stride):
        block_table[seq, first_column + nth] = changes[pages_at + nth]
    for nth in range(first, changes[record + NUM_TOKENS], stride):
        position = changes[record + FIRST_TOKEN] + nth
        column = position // page_size
        # A new page is read from the record: another thread may not have put it into the table yet.
        if column >= first_column:
            page = changes[pages_at + column - first_column]
        else:
            page = block_table[seq, column]
        slots[changes[record + SLOTS_AT] + nth] = np.int64(page) * page_size + position % page_size


@functools.cache
def _compiled_kernel() -> Any:
    """`apply_changes` as a Numba dispatcher. Numba is imported here and nowhere else: it takes most of a second."""
    try:
        from numba import cuda as numba_cuda
    except ImportError as error:
        raise ImportError(
            f"block tables on a GPU need Numba-CUDA, which cannot be imported ({error}): pip install numba-cuda[cu13]"
        ) from error
    globals()["cuda"] = numba_cuda
    return numba_cuda.jit(apply_changes)


def _spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The owner of each of sum(counts) elements and its place there: [2, 0, 1] gives [0, 0, 2] and [0, 1, 0]."""
    owner = np.repeat(np.arange(len(counts)), counts)
    begin = np.cumsum(counts) - counts
    return owner, np.arange(len(owner)) - begin[owner]
