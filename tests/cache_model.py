"""Caches of recognisable rows, and a plain-list model of what a cache should hold; for the cache's tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from mlacore import arrays
from mlacore.cache import PagedKVCache
from mlacore.host_tables import OutOfPagesError, OutOfSequencesError

RANK, ROPE = 16, 8  # rows of 24 values: enough to tell tokens apart


def make_cache(num_pages: int = 12, page_size: int = 4, **options: Any) -> PagedKVCache:
    options = {"kv_lora_rank": RANK, "qk_rope_head_dim": ROPE, "dtype": "float32", "max_seqs": 5, **options}
    return PagedKVCache(num_pages, page_size, **{"device": "cpu", **options})


def token_rows(tokens: Sequence[int], width: int, dtype: Any) -> np.ndarray:
    """Rows that tell tokens and columns apart; integers up to 250 are exact in every dtype."""
    token, column = np.asarray(tokens, np.int64)[:, None], np.arange(width)
    return ((token * 31 + column * 7 + token * column % 13) % 251).astype(dtype)


def latents(cache: PagedKVCache, tokens: Sequence[int]) -> tuple[Any, Any]:
    """ckv and kpe of numbered tokens, where the cache is."""
    rows = token_rows(tokens, cache.kv_lora_rank + cache.qk_rope_head_dim, cache.dtype)
    if cache.device is not None:
        rows = arrays.import_cupy().asarray(rows)
    return rows[:, : cache.kv_lora_rank], rows[:, cache.kv_lora_rank :]


def on_host(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else arrays.import_cupy().asnumpy(array)


def contents(cache: PagedKVCache, seq: int) -> np.ndarray:
    """A sequence's rows, read the way attention does: through the mirrors."""
    length = int(on_host(cache.cache_seqlens)[seq])
    pages = on_host(cache.block_table)[seq, : -(-length // cache.page_size)]
    return on_host(cache.pool)[pages].reshape(-1, cache.kv_lora_rank + cache.qk_rope_head_dim)[:length]


def snapshot(cache: PagedKVCache) -> list[bytes]:
    """All that a failing call must leave alone."""
    host = cache._host
    state = (host.table, host.seq_lens, host.pages_held, host.alive, host._free_pages[: host.num_free_pages])
    mirrors = (cache.block_table, cache.cache_seqlens, cache.pool)
    return [array.tobytes() for array in (*state, *map(on_host, mirrors))]


class Model:
    """The cache next to what it should be: a dict of plain lists of token numbers."""

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self.tokens: dict[int, list[int]] = {}
        self.next_token = 0

    def pages(self, length: int) -> int:
        return -(-length // self.cache.page_size)

    def picked(self, picks: Sequence[int]) -> list[int]:
        """Distinct live sequences, in the order of the picks."""
        alive = sorted(self.tokens)
        return list(dict.fromkeys(alive[pick % len(alive)] for pick in picks)) if alive else []

    def allocate(self, count: int) -> None:
        if len(self.tokens) + count > self.cache.max_seqs:
            with pytest.raises(OutOfSequencesError):
                self.cache.allocate(count)
            return
        seqs = self.cache.allocate(count).tolist()
        assert not set(seqs) & set(self.tokens)
        self.tokens.update({seq: [] for seq in seqs})

    def append(self, picks: Sequence[int], counts: Sequence[int], how: str) -> None:
        seqs = self.picked(picks)
        counts = [counts[i % len(counts)] if how != "even" else counts[0] for i in range(len(seqs))]
        tokens = list(range(self.next_token, self.next_token + sum(counts)))
        ckv, kpe = latents(self.cache, tokens)
        arguments: dict[str, Any] = {"ckv": ckv, "kpe": kpe, "num_tokens": counts}
        if how == "even" and tokens:
            shape = (len(seqs), counts[0], -1)
            arguments = {"ckv": ckv.reshape(shape), "kpe": kpe.reshape(shape)}

        needed = sum(
            self.pages(len(self.tokens[seq]) + count) - self.pages(len(self.tokens[seq]))
            for seq, count in zip(seqs, counts, strict=True)
        )
        free = self.cache.num_pages - sum(self.pages(len(held)) for held in self.tokens.values())
        too_long = any(len(self.tokens[s]) + c > self.cache.max_seq_len for s, c in zip(seqs, counts, strict=True))
        if too_long or needed > free:
            before = snapshot(self.cache)
            with pytest.raises(ValueError if too_long else OutOfPagesError) as caught:
                self.cache.append(seqs, **arguments)
            if isinstance(caught.value, OutOfPagesError):
                assert (caught.value.needed, caught.value.free) == (needed, free)
            assert snapshot(self.cache) == before
            return
        if how == "split":
            slots = self.cache.extend(seqs, counts)
            self.cache.write(slots, ckv, kpe)
        else:
            self.cache.append(seqs, **arguments)
        self.next_token += len(tokens)
        for seq, count in zip(seqs, counts, strict=True):
            self.tokens[seq] += tokens[:count]
            tokens = tokens[count:]

    def free(self, picks: Sequence[int]) -> None:
        seqs = self.picked(picks)
        self.cache.free(seqs)
        for seq in seqs:
            del self.tokens[seq]

    def check(self) -> None:
        cache = self.cache
        cache.check_integrity()
        assert cache.num_free_pages == cache.num_pages - sum(self.pages(len(held)) for held in self.tokens.values())
        lengths = [len(self.tokens.get(seq, ())) for seq in range(cache.max_seqs)]
        assert cache.seq_lens.tolist() == lengths
        for seq, tokens in self.tokens.items():
            expected = token_rows(tokens, cache.kv_lora_rank + cache.qk_rope_head_dim, cache.dtype)
            np.testing.assert_array_equal(contents(cache, seq), expected)

    def run(self, operations: Sequence[tuple]) -> None:
        for name, *arguments in operations:
            getattr(self, name)(*arguments)
            self.check()


def operations(longest: int, max_size: int) -> st.SearchStrategy:
    """Operations with up to `longest` tokens appended to a sequence at once."""
    picks = st.lists(st.integers(0, 7), max_size=5)
    counts = st.lists(st.integers(0, longest), min_size=1, max_size=5)
    append = st.tuples(st.just("append"), picks, counts, st.sampled_from(["even", "ragged", "split"]))
    allocate = st.tuples(st.just("allocate"), st.integers(0, 3))
    free = st.tuples(st.just("free"), picks)
    return st.lists(st.one_of(append, append, allocate, free), max_size=max_size).map(
        lambda ops: [("allocate", 3), *ops]
    )


def rows_of(n: int, *, rank: int = RANK, rope: int = ROPE, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((n, rank), dtype), np.zeros((n, rope), dtype)
