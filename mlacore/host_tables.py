"""The host's books: which sequence holds which pages, and the errors for when there are no more.

`HostTables` is the authority. Whatever it changes, it first writes down as `TableChanges`; once the mirrors have been
brought up to date from that record, `HostTables.commit` does the same for the books.
"""

from __future__ import annotations

import numpy as np

from mlacore.block_tables import FIRST_COLUMN, NUM_PAGES, SEQ, TableChanges, apply_changes_numpy

_NO_PAGE = -1  # fills unused entries: no kernel reads them, and one that did would find no page


class _Exhausted(RuntimeError):
    """A call needs more of something than is free."""

    def __init__(self, message: str, *, needed: int, free: int) -> None:
        super().__init__(message)
        self.needed, self.free = needed, free


class OutOfPagesError(_Exhausted):
    """The pool has fewer free pages than a call needs. Nothing was changed.

    Attributes
    ----------
    needed, free : int
        Pages.
    """


class OutOfSequencesError(_Exhausted):
    """The block table has fewer free rows than a call needs. Nothing was changed.

    Attributes
    ----------
    needed, free : int
        Rows.
    """


class HostTables:
    """The books: a stack of free pages, and for each row of the table its pages and its length in tokens.

    Methods named `changes_to_…` check and write down a change; nothing is changed before `commit`.

    Parameters
    ----------
    num_pages : int
        Pages of the pool, of `page_size` tokens.
    max_seqs : int
        Rows of the table.
    max_seq_len : int
        Longest sequence in tokens.
    """

    def __init__(self, num_pages: int, page_size: int, max_seqs: int, max_seq_len: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.max_seqs, self.max_seq_len = max_seqs, max_seq_len
        max_pages = min(-(-max_seq_len // page_size), num_pages)
        self.table = np.full((max_seqs, max_pages), _NO_PAGE, np.int32)
        self.seq_lens = np.zeros(max_seqs, np.int32)
        self.pages_held = np.zeros(max_seqs, np.int32)
        self.alive = np.zeros(max_seqs, bool)
        self.num_free_pages = num_pages
        self._free_pages = np.arange(num_pages, dtype=np.int32)[::-1].copy()  # page 0 on top

    def allocate(self, num_seqs: int) -> np.ndarray:
        """The lowest free rows, now alive: int32 ``[num_seqs]``."""
        rows = np.flatnonzero(~self.alive).astype(np.int32)
        if num_seqs > len(rows):
            raise OutOfSequencesError(
                f"num_seqs: got {num_seqs}, expected at most {len(rows)} (rows free of max_seqs={self.max_seqs})",
                needed=num_seqs,
                free=len(rows),
            )
        self.alive[rows[:num_seqs]] = True
        return rows[:num_seqs]

    def changes_to_grow(self, rows: np.ndarray, counts: np.ndarray) -> TableChanges:
        """Append ``counts[i]`` tokens to ``rows[i]``, whose slots are asked for."""
        lengths, held = self.seq_lens[rows], self.pages_held[rows]
        room = self.max_seq_len - lengths
        if np.any(counts > room):
            i = int(np.argmax(counts > room))
            raise ValueError(
                f"num_tokens: got {counts[i]} for sequence {rows[i]}, expected at most {room[i]} "
                f"(it holds {lengths[i]} of max_seq_len={self.max_seq_len} tokens)"
            )
        claimed = -(-(lengths + counts) // self.page_size) - held
        total = int(claimed.sum())
        if total > self.num_free_pages:
            raise OutOfPagesError(
                f"out of pages: {counts.sum()} tokens for {len(rows)} sequences need {total} more pages, "
                f"but {self.num_free_pages} of {self.num_pages} are free",
                needed=total,
                free=self.num_free_pages,
            )
        return TableChanges.pack(
            rows,
            lengths=lengths + counts,
            first_tokens=lengths,
            num_tokens=counts,
            first_columns=held,
            num_pages=claimed,
            pages=self._free_pages[self.num_free_pages - total : self.num_free_pages][::-1],
        )

    def changes_to_clear(self, rows: np.ndarray) -> TableChanges:
        """Take all pages and tokens from `rows`."""
        return TableChanges.pack(rows, lengths=0)

    def commit(self, changes: TableChanges) -> None:
        """Bring the books up to date: new pages leave the stack, and what a row holds no longer goes back to it."""
        records = changes.records
        rows = records[:, SEQ]
        held = records[:, FIRST_COLUMN] + records[:, NUM_PAGES]
        self.num_free_pages -= int(records[:, NUM_PAGES].sum())
        before = self.pages_held[rows]
        if np.any(before > held):
            columns = np.arange(before.max())
            released = self.table[rows, : len(columns)][(columns >= held[:, None]) & (columns < before[:, None])]
            # Reversed, so that they leave the stack in the order in which they stood in the table.
            self._free_pages[self.num_free_pages : self.num_free_pages + len(released)] = released[::-1]
            self.num_free_pages += len(released)
        self.pages_held[rows] = held
        apply_changes_numpy(changes, self.table, self.seq_lens, None, self.page_size)

    def check_integrity(self, block_table: np.ndarray, cache_seqlens: np.ndarray) -> None:
        """RuntimeError unless each page is free or held by one row, and the mirrors equal the books."""
        held = np.arange(self.table.shape[1]) < self.pages_held[:, None]
        listed = np.concatenate([self._free_pages[: self.num_free_pages], self.table[held]])
        if np.any((listed < 0) | (listed >= self.num_pages)):
            raise RuntimeError(f"page {listed.min()} to {listed.max()}: expected 0 to {self.num_pages - 1}")
        owners = np.bincount(listed, minlength=self.num_pages)
        if np.any(owners != 1):
            page = int(np.argmax(owners != 1))
            raise RuntimeError(f"page {page}: got {owners[page]} owners, expected 1 (the free pages, or one sequence)")
        checks = {
            "pages held do not match its length": self.pages_held != -(-self.seq_lens // self.page_size),
            "holds tokens, but is not alive": ~self.alive & (self.seq_lens != 0),
            "cache_seqlens differs from the host's length": cache_seqlens != self.seq_lens,
            "block_table differs from the host's pages": ((block_table != self.table) & held).any(axis=1),
        }
        for what, wrong in checks.items():
            if np.any(wrong):
                raise RuntimeError(f"sequence {np.argmax(wrong)}: {what}")
