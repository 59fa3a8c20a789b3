"""The host's books: which sequence holds which pages, and the errors for when there are no more.

`HostTables` is the authority. Whatever it changes, it first writes down as a `Change`; once the mirrors have been
brought up to date from that record, `HostTables.commit` does the same for the books.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlacore.block_tables import TableChanges, apply_changes_numpy, spread
from mlacore.page_pool import PagePool

_NO_PAGE = -1  # fills unused entries: no kernel reads them, and one that did would find no page
_INT32_MAX = 2**31 - 1
_NOT_CLEAR = -(2**31)  # far enough from any length that another page makes no difference
_NO_PAGES = np.empty(0, np.int32)
_NO_COPIES = np.empty((0, 2), np.int32)


class _Exhausted(RuntimeError):
    """A call needs more of something than is free."""

    def __init__(self, message: str, *, needed: int, free: int) -> None:
        super().__init__(message)
        self.needed, self.free = needed, free


class OutOfPagesError(_Exhausted):
    """The pool has fewer pages without a holder than a call needs. Nothing was changed.

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


class Change(NamedTuple):
    """What one call changes: the tables, as the mirrors learn it, and what becomes of pages.

    Attributes
    ----------
    tables : TableChanges
        Of rows.
    held : pair or None
        Rows, and how many pages each of them holds from now on, or all of them.
    claimed, shared, released, forgotten : numpy.ndarray
        int32 pages that get their first holder, get one more, lose one, and lose their key.
    copies : numpy.ndarray
        int32 ``[n, 2]``: pages whose content goes into another one first (from, to).
    sealed : numpy.ndarray, bool or None
        A value for each row of `tables`, or one for all; None leaves them as they are.
    alive : bool or None
        Whether the rows live from now on; None leaves that as it is.
    is_move : bool
        Whether `copies` take holders and keys along.
    clear_until : numpy.ndarray or None
        How far the rows in `held` are clear, where no other row of `tables` becomes so or ceases to be; None where that
        is to be worked out.
    """

    tables: TableChanges
    held: tuple[np.ndarray, np.ndarray | int] | None = None
    claimed: np.ndarray = _NO_PAGES
    shared: np.ndarray = _NO_PAGES
    released: np.ndarray = _NO_PAGES
    forgotten: np.ndarray = _NO_PAGES
    copies: np.ndarray = _NO_COPIES
    sealed: np.ndarray | bool | None = None
    alive: bool | None = None
    is_move: bool = False
    clear_until: np.ndarray | None = None


class HostTables:
    """The books: for each row of the table its pages and its length in tokens, and the pages nobody holds.

    Methods named `changes_to_…` check and write down a change; nothing is changed before `commit`.

    A row is *reserved* while its limit is set: it then holds pages up to that length, and the device may advance it by
    itself. Any other change of the row ends that. A row is *sealed* where its last, partly filled page may have other
    holders or a key: the page is then looked at, and copied if need be, before a token is written into it. Reserved
    rows are never sealed. A row is *clear* up to the end of its pages, or `max_seq_len`, while it is neither: so far it
    grows with nothing else to look at.

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
        self.page_size, self.max_seqs, self.max_seq_len = page_size, max_seqs, max_seq_len
        max_pages = min(-(-max_seq_len // page_size), num_pages)
        # A decode step begins one page a row at most, and its lengths are int32 even where they are too long.
        self._longest_step = min(page_size, _INT32_MAX - max_seq_len)
        # As arrays: for the few rows that begin a page, converting an int takes NumPy longer than the sum.
        page = min(page_size, max_seq_len)
        self._page, self._last_begin = np.array(page, np.int32), np.array(max_seq_len - page, np.int32)
        self.pool = PagePool(num_pages)
        self.table = np.full((max_seqs, max_pages), _NO_PAGE, np.int32)
        self.seq_lens = np.zeros(max_seqs, np.int32)
        self.limits = np.zeros(max_seqs, np.int32)
        self.pages_held = np.zeros(max_seqs, np.int64)
        self.sealed = np.zeros(max_seqs, bool)
        self.alive = np.zeros(max_seqs, bool)
        self.clear_until = np.zeros(max_seqs, np.int32)
        self.generation = 0  # counts changes of `alive`

    # ---- changes ---------------------------------------------------------------------------------------------------

    def changes_to_create(self, hits: Sequence[np.ndarray], lengths: np.ndarray) -> tuple[np.ndarray, Change]:
        """Start a row for each of `lengths` tokens, with room for them; `hits` are the pages that each begins with, and
        may be left empty where none does."""
        rows = self._free_rows(len(lengths))
        held = self._pages(lengths)
        if not any(map(len, hits)):
            claimed = self._claim(int(held.sum()), len(rows), lengths)
            tables = TableChanges.pack(rows, lengths=lengths, tokens=lengths, num_pages=held, pages=claimed)
            return rows, Change(tables, held=(tables.rows, held), claimed=claimed, alive=True)
        shared = np.concatenate(hits)
        num_hits = np.array([len(pages) for pages in hits], np.int64)
        num_new = held - num_hits
        revived = shared[self.pool.refs[shared] == 0]
        revived = np.unique(revived) if len(revived) else revived
        claimed = self._claim(int(num_new.sum()), len(rows), lengths, revived)
        parts = np.split(claimed, np.cumsum(num_new)[:-1])
        pages = np.concatenate([part for both in zip(hits, parts, strict=True) for part in both])
        asked = lengths - num_hits * self.page_size
        tables = TableChanges.pack(rows, lengths=lengths, tokens=asked, num_pages=held, pages=pages)
        return rows, Change(tables, held=(tables.rows, held), claimed=claimed, shared=shared, alive=True)

    def changes_to_grow(self, rows: np.ndarray, counts: np.ndarray | int) -> Change:
        """Append ``counts[i]`` tokens to ``rows[i]``, whose slots are asked for."""
        if isinstance(counts, int) and (change := self._decode_step(rows, counts)) is not None:
            return change
        lengths = self.seq_lens.take(rows)
        self._check_room(rows, counts, lengths)
        grown = lengths + counts
        return self._resize(rows, lengths, grown, grown, counts, counts > 0)

    def changes_to_reserve(self, rows: np.ndarray, counts: np.ndarray | int) -> Change:
        """Let the device append up to ``counts[i]`` tokens to ``rows[i]``."""
        lengths = self.seq_lens.take(rows)
        self._check_room(rows, counts, lengths)
        return self._resize(rows, lengths, lengths, lengths + counts, -counts, counts > 0)

    def changes_to_truncate(self, rows: np.ndarray, lengths: np.ndarray) -> Change:
        """Keep the first ``lengths[i]`` tokens of ``rows[i]``."""
        change = self._resize(rows, lengths, lengths, lengths, 0, False)
        return change._replace(sealed=lengths % self.page_size != 0)

    def changes_to_clear(self, rows: np.ndarray) -> Change:
        """Take all pages and tokens from `rows`, and let them go."""
        held = self.pages_held.take(rows)
        tables = TableChanges.pack(rows, lengths=0)
        released = self._last_pages(rows, held, held)
        return Change(tables, held=(tables.rows, 0), released=released, sealed=False, alive=False)

    def changes_to_fork(self, rows: np.ndarray) -> tuple[np.ndarray, Change]:
        """Start a row beside each of `rows`, which may repeat, with the same tokens in the same pages."""
        new_rows = self._free_rows(len(rows))
        lengths = self.seq_lens.take(rows)
        used = self._pages(lengths)
        owner, nth = spread(used)
        shared = self.table[rows[owner], nth]
        # The device must not write into a page that is shared from now on: no parent stays reserved.
        parents, first = np.unique(rows, return_index=True)
        kept = lengths[first]
        parents_held = self.pages_held.take(parents)
        released = self._last_pages(parents, parents_held, parents_held - used[first])
        all_lengths = np.concatenate([kept, lengths])
        all_rows = np.concatenate([parents, new_rows])
        tables = TableChanges.pack(
            all_rows,
            lengths=all_lengths,
            num_pages=np.concatenate([np.zeros(len(parents), np.int64), used]),
            pages=shared,
        )
        sealed = all_lengths % self.page_size != 0
        held = all_rows, np.concatenate([used[first], used])
        return new_rows, Change(tables, held=held, shared=shared, released=released, sealed=sealed, alive=True)

    def changes_to_compact(self) -> Change | None:
        """Move pages with content to the front of the pool; None where they are there."""
        source, target = self.pool.moves_to_front()
        if not len(source):
            return None
        now_at = np.arange(self.pool.num_pages, dtype=np.int32)
        now_at[source] = target
        in_use = np.arange(self.table.shape[1]) < self.pages_held[:, None]
        rows = np.flatnonzero((in_use & (now_at[self.table] != self.table)).any(axis=1))
        held, lengths = self.pages_held[rows], self.seq_lens[rows]
        pages = now_at[self.table[rows][in_use[rows]]]
        ahead = np.maximum(self.limits[rows] - lengths, 0)
        tables = TableChanges.pack(rows, lengths=lengths, tokens=-ahead, num_pages=held, pages=pages)
        return Change(tables, copies=np.column_stack([source, target]), is_move=True)

    def commit(self, change: Change) -> None:
        """Bring the books up to date."""
        tables, pool = change.tables, self.pool
        if change.is_move:
            pool.move(change.copies[:, 0], change.copies[:, 1])
        if len(change.shared):
            pool.share(change.shared)
        if len(change.claimed):
            pool.claim(change.claimed)
        apply_changes_numpy(tables, self.table, self.seq_lens, self.limits, None, self.page_size)
        rows = tables.rows
        if change.alive is not None:
            self.alive[rows] = change.alive
            self.generation += 1
        if change.sealed is not None:
            self.sealed[rows] = change.sealed
        if change.held is not None:
            self.pages_held[change.held[0]] = change.held[1]
        if change.clear_until is None:
            self.clear_until[rows] = self._clear_until(rows)
        elif change.held is not None:
            self.clear_until[change.held[0]] = change.clear_until
        if len(change.released):
            pool.release(change.released)
        if len(change.forgotten):
            pool.forget(change.forgotten)

    def restore(self, rows: np.ndarray, lengths: np.ndarray, num_pages: np.ndarray, pages: np.ndarray) -> None:
        """Fill empty books: `rows` of `lengths` tokens, with `pages` row by row. Holders are the pool's to restore."""
        owner, nth = spread(num_pages)
        self.table[rows[owner], nth] = pages
        self.alive[rows], self.seq_lens[rows], self.pages_held[rows] = True, lengths, num_pages
        self.sealed[rows] = lengths % self.page_size != 0
        self.clear_until[rows] = self._clear_until(rows)

    def advance(self, num_rows: int, num_tokens: int, num_steps: int) -> None:
        """Follow the device, which has made `num_steps` steps of `num_tokens` tokens with the first `num_rows` rows."""
        lengths, limits = self.seq_lens[:num_rows].astype(np.int64), self.limits[:num_rows]
        rows = np.flatnonzero(lengths + num_tokens <= limits)
        room = (limits - lengths)[rows] // num_tokens
        if np.any(room < num_steps):
            i = int(np.argmin(room))
            raise ValueError(
                f"num_steps: got {num_steps}, expected at most {room[i]} (from reserve: sequence {rows[i]} holds "
                f"{lengths[rows[i]]} tokens and may grow to {limits[rows[i]]}, {num_tokens} a step)"
            )
        self.seq_lens[rows] += num_tokens * num_steps

    # ---- proof -----------------------------------------------------------------------------------------------------

    def check_integrity(self, block_table: np.ndarray, cache_seqlens: np.ndarray, limits: np.ndarray) -> None:
        """RuntimeError unless free + cached + held pages are all pages, their holders are the rows that list them, and
        the mirrors equal the books."""
        in_use = np.arange(self.table.shape[1]) < self.pages_held[:, None]
        listed = self.table[in_use]
        num_pages = self.pool.num_pages
        if np.any((listed < 0) | (listed >= num_pages)):
            raise RuntimeError(f"page {listed.min()} to {listed.max()}: expected 0 to {num_pages - 1}")
        self.pool.check_integrity(np.bincount(listed, minlength=num_pages))
        rows = np.repeat(np.arange(self.max_seqs), self.pages_held)
        if len(np.unique(rows * num_pages + listed)) != len(listed):
            raise RuntimeError("a page stands twice in one sequence")
        last = self.table[np.arange(self.max_seqs), np.maximum(self.seq_lens - 1, 0) // self.page_size]
        is_partial = self.seq_lens % self.page_size != 0
        has_others = is_partial & ((self.pool.refs[last] > 1) | self.pool.is_findable[last])
        checks = {
            "pages held do not match its length": self.pages_held
            != self._pages(np.maximum(self.seq_lens, self.limits)),
            "holds tokens, but is not alive": ~self.alive & (self.pages_held != 0),
            "may write into a page of others": has_others & (~self.sealed | (self.limits > self.seq_lens)),
            "cache_seqlens differs from the host's length": cache_seqlens != self.seq_lens,
            "the device's limit differs from the host's": limits != self.limits,
            "block_table differs from the host's pages": ((block_table != self.table) & in_use).any(axis=1),
            "is not clear as far as its pages go": self.clear_until != self._clear_until(np.arange(self.max_seqs)),
        }
        for what, wrong in checks.items():
            if np.any(wrong):
                raise RuntimeError(f"sequence {np.argmax(wrong)}: {what}")

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _pages(self, lengths: np.ndarray) -> np.ndarray:
        return -(-lengths // self.page_size)

    def _clear_until(self, rows: np.ndarray) -> np.ndarray:
        """What `clear_until` must be for `rows`, from what the books say about them otherwise."""
        ends = np.minimum(self.pages_held.take(rows) * self.page_size, self.max_seq_len)
        ends[self.sealed.take(rows) | (self.limits.take(rows) > 0)] = _NOT_CLEAR
        return ends

    def _free_rows(self, count: int) -> np.ndarray:
        rows = (~self.alive).nonzero()[0]
        if count > len(rows):
            raise OutOfSequencesError(
                f"out of sequences: {count} more are asked for, expected at most {len(rows)} (rows free of "
                f"max_seqs={self.max_seqs})",
                needed=count,
                free=len(rows),
            )
        return rows[:count].astype(np.int32)

    def _check_room(self, rows: np.ndarray, counts: np.ndarray | int, lengths: np.ndarray) -> None:
        room = self.max_seq_len - lengths
        too_many = counts > room
        if too_many.any():
            i = int(np.argmax(too_many))
            count = np.broadcast_to(counts, rows.shape)[i]
            raise ValueError(
                f"num_tokens: got {count} for sequence {rows[i]}, expected at most {room[i]} "
                f"(it holds {lengths[i]} of max_seq_len={self.max_seq_len} tokens)"
            )

    def _claim(
        self, count: int, num_seqs: int, num_tokens: np.ndarray | int, keep: np.ndarray = _NO_PAGES
    ) -> np.ndarray:
        """The next `count` pages, without those in `keep`, for `num_tokens` of each of `num_seqs` sequences."""
        free = self.pool.num_free - len(keep)
        if count > free:
            total = num_tokens * num_seqs if isinstance(num_tokens, int) else num_tokens.sum()
            raise OutOfPagesError(
                f"out of pages: {total} tokens for {num_seqs} sequences need {count} more pages, "
                f"but {free} of {self.pool.num_pages} are free",
                needed=count,
                free=free,
            )
        return self.pool.next_pages(count, keep)

    def _resize(
        self,
        rows: np.ndarray,
        before: np.ndarray,
        lengths: np.ndarray,
        room: np.ndarray,
        tokens: np.ndarray | int,
        writes: np.ndarray | bool,
    ) -> Change:
        """`rows` of `before` tokens hold `lengths` from now on and pages for `room`; where `writes`, what follows
        `before` is going to be written."""
        held = self._pages(room)
        before_held = self.pages_held.take(rows)
        grown = held - before_held
        sealed = self.sealed.take(rows) & writes
        unseals = sealed.any()
        if not (unseals or grown.any()):
            return Change(TableChanges.pack(rows, lengths=lengths, tokens=tokens))
        released = self._last_pages(rows, before_held, np.maximum(-grown, 0)) if grown.min() < 0 else _NO_PAGES
        num_new = np.maximum(grown, 0)
        if not unseals:
            claimed = self._claim(int(num_new.sum()), len(rows), room - before)
            tables = TableChanges.pack(rows, lengths=lengths, tokens=tokens, num_pages=num_new, pages=claimed)
            return Change(tables, held=(rows, held), claimed=claimed, released=released)
        at = np.flatnonzero(sealed)
        owners, copied, forgotten = self._unseal(rows[at], before[at])
        num_new[at[owners]] += 1
        claimed = self._claim(int(num_new.sum()), len(rows), room - before)
        begins = (np.cumsum(num_new) - num_new)[at[owners]]
        return Change(
            TableChanges.pack(rows, lengths=lengths, tokens=tokens, num_pages=num_new, pages=claimed),
            held=(rows, held),
            claimed=claimed,
            released=np.concatenate([released, copied]),
            forgotten=forgotten,
            copies=np.column_stack([copied, claimed[begins]]),
            sealed=self.sealed.take(rows) & np.logical_not(writes),
        )

    def _decode_step(self, rows: np.ndarray, count: int) -> Change | None:
        """`changes_to_grow` for what decoding asks for step after step: a token or a few for each row, some of which
        begin a page; None where there is more to look at. Most of what it looks at is one number a row."""
        if not 0 < count <= self._longest_step:
            return None
        rows = rows.astype(np.intp, copy=False)
        lengths = self.seq_lens.take(rows) + count
        begin = (lengths > self.clear_until.take(rows)).nonzero()[0]
        if not len(begin):
            return Change(TableChanges.pack(rows, lengths=lengths, tokens=count), clear_until=_NO_PAGES)
        beginners = rows[begin]
        # One page further, at most to max_seq_len: in this order, since it may be the largest int32.
        clear_until = np.minimum(self.clear_until[beginners], self._last_begin) + self._page
        if np.count_nonzero(lengths[begin] > clear_until):  # sealed or reserved, or at max_seq_len
            return None
        claimed, held = self._claim(len(begin), len(rows), count), self.pages_held[beginners]
        tables = TableChanges.pack(
            rows, lengths=lengths, tokens=count, pages=claimed, some=begin, entries=(beginners, held)
        )
        return Change(tables, held=(beginners, held + 1), claimed=claimed, clear_until=clear_until)

    def _last_pages(self, rows: np.ndarray, held: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The last ``counts[i]`` pages of ``rows[i]``, which holds ``held[i]``. Reversed, so that the deepest is reused
        before those it follows, and pages leave the stack in the order in which they stood in the table."""
        owner, nth = spread(counts)
        return self.table[rows[owner], (held - counts)[owner] + nth][::-1]

    def _unseal(self, rows: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What to do about the last pages of sealed `rows`: which of them need a copy, of which page, and which pages
        to forget instead."""
        partial = np.flatnonzero(lengths % self.page_size)
        pages = self.table[rows[partial], lengths[partial] // self.page_size]
        needs_copy = self.pool.refs[pages] > 1
        # Where all holders of a page write, the first of them keeps it.
        unique, first, count = np.unique(pages, return_index=True, return_counts=True)
        needs_copy[first[count == self.pool.refs[unique]]] = False
        kept = pages[~needs_copy]
        return partial[needs_copy], pages[needs_copy], kept[self.pool.is_findable[kept]]
