"""What a cache's books say about its use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlacore.block_tables import spread
from mlacore.host_tables import HostTables


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Use of a cache; from `PagedKVCache.stats`.

    Attributes
    ----------
    num_pages : int
        Pages of the pool: ``free + cached + held``.
    free, cached, held : int
        Pages that hold nothing; that no sequence holds, but a prefix finds; that sequences hold.
    shared : int
        Held pages that more than one sequence holds.
    nbytes, held_bytes : int
        Of the pool in all layers, and of the pages held.
    sequences, tokens : int
        Alive, and the tokens in them; shared ones count once for each.
    fragmentation : float
        Share of the slots in held pages that hold no token, reserved ones included; 0 without any.
    lookups, hits : int
        Tokens that `create` was asked to find, and found.
    """

    num_pages: int
    free: int
    cached: int
    held: int
    shared: int
    nbytes: int
    held_bytes: int
    sequences: int
    tokens: int
    fragmentation: float
    lookups: int
    hits: int

    @property
    def hit_rate(self) -> float:
        """``hits / lookups``; 0 without any."""
        return self.hits / self.lookups if self.lookups else 0.0


def measure(books: HostTables, nbytes: int, lookups: int, hits: int) -> CacheStats:
    """`CacheStats` of `books`, for a pool of `nbytes`."""
    pool, page_size = books.pool, books.page_size
    held = int(np.count_nonzero(pool.refs))
    # Tokens of every page in every row; where rows share a page, the fullest row counts.
    row, column = spread(books.pages_held)
    filled = np.clip(books.seq_lens[row] - column * page_size, 0, page_size)
    tokens_in = np.zeros(pool.num_pages, np.int64)
    np.maximum.at(tokens_in, books.table[row, column], filled)
    return CacheStats(
        num_pages=pool.num_pages,
        free=pool.num_free - pool.num_cached,
        cached=pool.num_cached,
        held=held,
        shared=int(np.count_nonzero(pool.refs > 1)),
        nbytes=nbytes,
        held_bytes=nbytes // pool.num_pages * held,
        sequences=int(np.count_nonzero(books.alive)),
        tokens=int(books.seq_lens.sum(dtype=np.int64)),
        fragmentation=1 - int(tokens_in.sum()) / (held * page_size) if held else 0.0,
        lookups=lookups,
        hits=hits,
    )
