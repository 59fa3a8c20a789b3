"""Who holds which page: reference counts, pages that are free, and pages that can be found again by their content.

A page is *held* by one or more sequences, *cached* (nobody holds it, but its content can be found, so it is reused
last) or *free*. Free and cached pages can both be claimed: free ones first, then cached ones, the least recently used
first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

DIGEST_BYTES = 16

_NO_PAGES = np.empty(0, np.int32)


def prefix_keys(token_ids: np.ndarray, page_size: int) -> Iterator[bytes]:
    """Keys of the full pages of `token_ids`, in order: each a digest of all tokens up to the page's end.

    BLAKE2b over the ids as int64 and the page size, cut to 128 bits, so that two different prefixes share a key with a
    probability of 2**-64 even among 2**32 pages. It does not depend on the process: keys in a file stay good.
    """
    state = hashlib.blake2b(page_size.to_bytes(8, "little"), digest_size=DIGEST_BYTES)
    ids = np.ascontiguousarray(token_ids, "<i8")
    for end in range(page_size, len(ids) + 1, page_size):
        state.update(ids[end - page_size : end].data)
        yield state.digest()


class PagePool:
    """The pages of a pool, by number: `num_pages` of them, all free.

    Methods trust their arguments; `mlacore.host_tables` checks before it changes anything.

    Attributes
    ----------
    refs : int32 ``[num_pages]``
        Sequences that hold each page.
    is_findable : bool ``[num_pages]``
        Whether a key leads to it.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.refs = np.zeros(num_pages, np.int32)
        self.is_findable = np.zeros(num_pages, bool)
        self._stack = np.arange(num_pages, dtype=np.int32)[::-1].copy()  # free pages, page 0 on top
        self._num_stacked = num_pages
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be claimed: free and cached ones."""
        return self._num_stacked + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and a key leads to."""
        return len(self._cached)

    def next_pages(self, count: int, keep: np.ndarray = _NO_PAGES) -> np.ndarray:
        """The next `count` pages to claim, of which `num_free` less those in `keep` there must be; changes nothing."""
        top = self._num_stacked
        if count <= top:
            return self._stack[top - count : top][::-1]
        stacked = self._stack[:top][::-1]
        kept = set(keep.tolist())
        oldest = islice((page for page in self._cached if page not in kept), count - len(stacked))
        return np.concatenate([stacked, np.fromiter(oldest, np.int32)])

    def claim(self, pages: np.ndarray) -> None:
        """Give `pages`, from `next_pages`, their first holder; what was cached in them is forgotten."""
        num_stacked = self._num_stacked
        if len(pages) <= num_stacked:
            self._num_stacked -= len(pages)
        else:
            self._num_stacked = 0
            cached = pages[num_stacked:]
            _consume(map(self._cached.pop, cached.tolist()))
            self.forget(cached)
        self.refs[pages] = 1

    def share(self, pages: np.ndarray) -> None:
        """One more holder for each of `pages`, which may repeat; cached ones are held again."""
        for page in pages[self.refs[pages] == 0].tolist():
            self._cached.pop(page, None)
        np.add.at(self.refs, pages, 1)

    def release(self, pages: np.ndarray) -> None:
        """One holder less for each of `pages`, which may repeat. Those without one become free, or cached, in order."""
        if np.count_nonzero(self.refs[pages] > 1):
            np.subtract.at(self.refs, pages, 1)
            left = pages[self.refs[pages] == 0]
            # A page that all its holders give up at once is listed by each of them.
            left = left[np.sort(np.unique(left, return_index=True)[1])]
        else:
            self.refs[pages] = 0
            left = pages
        findable = self.is_findable[left]
        if np.count_nonzero(findable):
            self._cached.update(dict.fromkeys(left[findable].tolist()))
            left = left[~findable]
        self._stack[self._num_stacked : self._num_stacked + len(left)] = left
        self._num_stacked += len(left)

    # ---- content ---------------------------------------------------------------------------------------------------

    def find(self, keys: Iterable[bytes]) -> np.ndarray:
        """Pages of the longest run of keys that lead to one, from the first key on."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return np.array(pages, np.int32)

    def publish(self, pages: np.ndarray, keys: list[bytes]) -> None:
        """Let `keys` lead to `pages`, which are held. A key that leads to another page already stays with that one."""
        for page, key in zip(pages.tolist(), keys, strict=True):
            if self._page_of.setdefault(key, page) == page:
                self._key_of[page] = key
                self.is_findable[page] = True

    def forget(self, pages: np.ndarray) -> None:
        """No key leads to `pages` any more."""
        for page in pages[self.is_findable[pages]].tolist():
            del self._page_of[self._key_of.pop(page)]
        self.is_findable[pages] = False

    def key_of(self, page: int) -> bytes | None:
        """The key that leads to a page, if any."""
        return self._key_of.get(page)

    def findable_pages(self) -> tuple[np.ndarray, np.ndarray]:
        """Pages that a key leads to, int32 ``[n]``, those that are cached first and in the order in which they will be
        reused; and their keys, uint8 ``[n, DIGEST_BYTES]``."""
        held = self.is_findable & (self.refs > 0)
        pages = np.array([*self._cached, *np.flatnonzero(held).tolist()], np.int32)
        keys = b"".join(self._key_of[page] for page in pages.tolist())
        return pages, np.frombuffer(keys, np.uint8).reshape(-1, DIGEST_BYTES)

    def restore(self, listed: np.ndarray, found: np.ndarray, keys: list[bytes]) -> None:
        """Make an empty pool one whose pages `listed` are held, as often as they repeat, and `found` are findable by
        `keys`, in the order of `findable_pages`."""
        np.add.at(self.refs, listed, 1)
        self.publish(found, keys)
        self._cached.update(dict.fromkeys(found[self.refs[found] == 0].tolist()))
        self._restack()

    # ---- moving ----------------------------------------------------------------------------------------------------

    def moves_to_front(self) -> tuple[np.ndarray, np.ndarray]:
        """(from, to): moves after which pages with content are the lowest ones. No page is in both."""
        occupied = (self.refs > 0) | self.is_findable
        count = np.count_nonzero(occupied)
        source = count + np.flatnonzero(occupied[count:])
        return source.astype(np.int32), np.flatnonzero(~occupied[:count]).astype(np.int32)

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Move holders and keys from the pages `source` to the free pages `target`."""
        now_at = dict(zip(source.tolist(), target.tolist(), strict=True))
        for array in (self.refs, self.is_findable):
            array[target] = array[source]
            array[source] = 0
        self._cached = OrderedDict.fromkeys(now_at.get(page, page) for page in self._cached)
        self._key_of = {now_at.get(page, page): key for page, key in self._key_of.items()}
        self._page_of = {key: page for page, key in self._key_of.items()}
        self._restack()

    def _restack(self) -> None:
        free = np.flatnonzero((self.refs == 0) & ~self.is_findable)[::-1]  # the lowest on top
        self._num_stacked = len(free)
        self._stack[: len(free)] = free

    # ---- proof -----------------------------------------------------------------------------------------------------

    def check_integrity(self, refs: np.ndarray) -> None:
        """RuntimeError unless every page is held, cached or free, once, and its holders are `refs` as counted."""
        stacked = self._stack[: self._num_stacked]
        cached = np.fromiter(self._cached, np.int32)
        if np.any(self.refs != refs):
            page = int(np.argmax(self.refs != refs))
            raise RuntimeError(f"page {page}: got a count of {self.refs[page]}, but {refs[page]} sequences hold it")
        listed = np.concatenate([stacked, cached])
        if np.any((listed < 0) | (listed >= self.num_pages)):
            raise RuntimeError(f"page {listed.min()} to {listed.max()}: expected 0 to {self.num_pages - 1}")
        places = np.bincount(listed, minlength=self.num_pages) + (self.refs > 0)
        if np.any(places != 1):
            page = int(np.argmax(places != 1))
            raise RuntimeError(f"page {page}: got {places[page]} places, expected 1 (held, cached or free)")
        if not self.is_findable[cached].all() or self.is_findable[stacked].any():
            raise RuntimeError("cached pages must be findable, and free ones must not")
        if set(np.flatnonzero(self.is_findable).tolist()) != set(self._key_of) or self._page_of != {
            key: page for page, key in self._key_of.items()
        }:
            raise RuntimeError("keys and findable pages do not match")


def _consume(iterator: Iterator[object]) -> None:
    deque(iterator, maxlen=0)
