"""Caches of recognisable rows, and a plain-list model of what a cache should hold; for the cache's tests."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from mlacore import arrays
from mlacore.cache import PagedKVCache
from mlacore.host_tables import OutOfPagesError, OutOfSequencesError

RANK, ROPE = 16, 8  # rows of 24 values: enough to tell tokens apart
ALPHABET = 3  # token ids: so few that sequences often begin alike


def make_cache(num_pages: int = 12, page_size: int = 4, **options: Any) -> PagedKVCache:
    options = {"kv_lora_rank": RANK, "qk_rope_head_dim": ROPE, "dtype": "float32", "max_seqs": 5, **options}
    return PagedKVCache(num_pages, page_size, **{"device": "cpu", **options})


def token_rows(tokens: Sequence[int], width: int, dtype: Any) -> np.ndarray:
    """Rows that tell tokens and columns apart; integers up to 250 are exact in every dtype."""
    token, column = np.asarray(tokens, np.int64)[:, None], np.arange(width)
    return ((token * 31 + column * 7 + token * column % 13) % 251).astype(dtype)


def histories(token_ids: Sequence[int]) -> list[int]:
    """A number for each token that tells it from every other token and from itself after other tokens: as in a model,
    a row depends on all that came before."""
    numbers, state = [], 0
    for token in token_ids:
        state = (state * 1000003 + token + 1) % 999983
        numbers.append(state)
    return numbers


def latents(cache: PagedKVCache, tokens: Sequence[int], layer: int = 0) -> tuple[Any, Any]:
    """ckv and kpe of numbered tokens, where the cache is."""
    width = cache.kv_lora_rank + cache.qk_rope_head_dim
    rows = token_rows(np.asarray(tokens, np.int64) + 17 * layer, width, cache.dtype)
    if cache.device is not None:
        rows = arrays.import_cupy().asarray(rows)
    return rows[:, : cache.kv_lora_rank], rows[:, cache.kv_lora_rank :]


def on_host(array: Any) -> np.ndarray:
    if type(array) is np.ndarray:
        return array
    bits = array.view(np.uint16) if array.dtype.itemsize == 2 else array  # CuPy copies these whatever they stand for
    return arrays.import_cupy().asnumpy(bits).view(array.dtype)


def contents(cache: PagedKVCache, seq: int, layer: int = 0) -> np.ndarray:
    """A sequence's rows, read the way attention does: through the mirrors."""
    length = int(on_host(cache.cache_seqlens)[seq])
    pages = on_host(cache.block_table)[seq, : -(-length // cache.page_size)]
    rows = cache.layers[layer]
    if cache.device is not None:  # picked on the device, as bits
        index = arrays.import_cupy().asarray(pages)
        rows = on_host(rows.view(np.uint16)[index]).view(cache.dtype)
    else:
        rows = rows[pages]
    return rows.reshape(-1, cache.kv_lora_rank + cache.qk_rope_head_dim)[:length]


def snapshot(cache: PagedKVCache) -> list[Any]:
    """All that a failing call must leave alone."""
    host, pool = cache._host, cache._host.pool
    state = (host.table, host.seq_lens, host.limits, host.pages_held, host.alive, host.sealed, pool.refs)
    stack = pool._stack[: pool._num_stacked]
    keys = list(pool._cached), sorted(pool._key_of.items())
    mirrors = (cache.block_table, cache.cache_seqlens, cache._store.limits, cache.pool)
    return [*keys, *(array.tobytes() for array in (*state, stack, *map(on_host, mirrors)))]


class Model:
    """The cache next to what it should be: a dict of plain lists of token ids.

    Every sequence of operations is valid: picks are taken modulo what there is, and where the cache has to refuse, the
    model says so first.
    """

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self.tokens: dict[int, list[int]] = {}
        self.limits: dict[int, int] = {}  # of reserved sequences
        self.past: list[list[int]] = [[]]  # tokens of sequences that were published, alive or not
        self.num_operations = 0

    # ---- what the model knows --------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return len(self.cache.layers)

    def num_pages(self, length: int) -> int:
        return -(-length // self.cache.page_size)

    def pages(self, seq: int) -> list[int]:
        held = self.num_pages(max(len(self.tokens[seq]), self.limits.get(seq, 0)))
        return on_host(self.cache.block_table)[seq, :held].tolist()

    def holders(self) -> Counter[int]:
        return Counter(page for seq in self.tokens for page in self.pages(seq))

    def picked(self, picks: Sequence[int], *, distinct: bool = True) -> list[int]:
        """Live sequences in the order of the picks."""
        alive = sorted(self.tokens)
        seqs = [alive[pick % len(alive)] for pick in picks] if alive else []
        return list(dict.fromkeys(seqs)) if distinct else seqs

    def new_ids(self, count: int, salt: int) -> list[int]:
        return [(salt + i * i) % ALPHABET for i in range(count)]

    def refused(self, error: type[Exception], call: Any, *arguments: Any, **options: Any) -> Exception:
        before = snapshot(self.cache)
        with pytest.raises(error) as caught:
            call(*arguments, **options)
        assert snapshot(self.cache) == before
        return caught.value

    def needed_to_write(self, seqs: list[int], room: list[int]) -> int:
        """Pages to claim so that each sequence can grow to `room` tokens: new ones, and copies of shared last ones."""
        holders, needed = self.holders(), 0
        writers: Counter[int] = Counter()
        for seq, end in zip(seqs, room, strict=True):
            length = len(self.tokens[seq])
            needed += max(0, self.num_pages(end) - len(self.pages(seq)))
            if end > length and length % self.cache.page_size:
                writers[self.pages(seq)[self.num_pages(length) - 1]] += 1
        # All writers of a page but one that is its last holder take a copy.
        return needed + sum(min(count, holders[page] - 1) for page, count in writers.items())

    def must_refuse(self, seqs: list[int], room: list[int], call: Any, *arguments: Any, **options: Any) -> bool:
        if any(end > self.cache.max_seq_len for end in room):
            self.refused(ValueError, call, *arguments, **options)
            return True
        needed, free = self.needed_to_write(seqs, room), self.cache.num_pages - len(self.holders())
        if needed > free:
            caught: Any = self.refused(OutOfPagesError, call, *arguments, **options)
            assert (caught.needed, caught.free) == (needed, free)
            return True
        return False

    def write(self, tokens: Any, numbers: Sequence[int]) -> None:
        for layer in range(self.num_layers):
            self.cache.write(tokens, *latents(self.cache, numbers, layer), layer=layer)

    # ---- operations ------------------------------------------------------------------------------------------------

    def create(self, prompts: Sequence[tuple[int, int, int]], how: str) -> None:
        """Prompts of (a past sequence, how many of its tokens, how many other tokens)."""
        ids = [
            [*(past := self.past[which % len(self.past)])[: min(kept, len(past))], *self.new_ids(more, which)]
            for which, kept, more in prompts
        ]
        cache, page_size = self.cache, self.cache.page_size
        options: dict[str, Any] = {} if how == "new" else {"prefix": ids}
        if how != "found":
            options["num_tokens"] = [len(prompt) for prompt in ids]
        if how != "found" and any(len(prompt) > cache.max_seq_len for prompt in ids):
            self.refused(ValueError, cache.create, len(ids), **options)
            return
        if len(self.tokens) + len(ids) > cache.max_seqs:
            self.refused(OutOfSequencesError, cache.create, len(ids), **options)
            return
        free = cache.num_pages - len(self.holders())
        before = snapshot(cache)
        refusal = None
        try:
            seqs, num_cached, tokens = cache.create(len(ids), **options)
        except OutOfPagesError as error:
            refusal = error
        if refusal is not None:
            assert snapshot(cache) == before
            assert refusal.free < refusal.needed <= sum(self.num_pages(len(prompt)) for prompt in ids)
            return
        assert not set(seqs.tolist()) & set(self.tokens)
        new: list[int] = []
        for seq, prompt, found in zip(seqs.tolist(), ids, num_cached.tolist(), strict=True):
            assert found % page_size == 0
            assert found <= (len(prompt) if how != "new" else 0)
            self.tokens[seq] = prompt if how != "found" else prompt[:found]
            new += histories(prompt)[found:] if how != "found" else []
        assert len(tokens) == len(new)
        assert cache.num_pages - len(self.holders()) >= free - sum(self.num_pages(len(prompt)) for prompt in ids)
        self.write(tokens, new)

    def append(self, picks: Sequence[int], counts: Sequence[int], salt: int, how: str) -> None:
        seqs = self.picked(picks)
        counts = [counts[i % len(counts)] if how != "even" else counts[0] for i in range(len(seqs))]
        ids = [self.new_ids(count, salt + i) for i, count in enumerate(counts)]
        numbers = [
            number
            for seq, new in zip(seqs, ids, strict=True)
            for number in histories(self.tokens[seq] + new)[len(self.tokens[seq]) :]
        ]
        room = [len(self.tokens[seq]) + count for seq, count in zip(seqs, counts, strict=True)]
        cache = self.cache
        if how == "split" or self.num_layers > 1:
            if self.must_refuse(seqs, room, cache.extend, seqs, counts):
                return
            self.write(cache.extend(seqs, counts), numbers)
        else:
            ckv, kpe = latents(cache, numbers)
            arguments: dict[str, Any] = {"ckv": ckv, "kpe": kpe, "num_tokens": counts}
            if how == "even" and numbers:
                shape = (len(seqs), counts[0], -1)
                arguments = {"ckv": ckv.reshape(shape), "kpe": kpe.reshape(shape)}
            if self.must_refuse(seqs, room, cache.append, seqs, **arguments):
                return
            cache.append(seqs, **arguments)
        for seq, new in zip(seqs, ids, strict=True):
            self.tokens[seq] = self.tokens[seq] + new
            self.limits.pop(seq, None)

    def truncate(self, picks: Sequence[int], keep: Sequence[int]) -> None:
        seqs = self.picked(picks)
        lengths = [keep[i % len(keep)] % (len(self.tokens[seq]) + 1) for i, seq in enumerate(seqs)]
        self.cache.truncate(seqs, lengths)
        for seq, length in zip(seqs, lengths, strict=True):
            self.tokens[seq] = self.tokens[seq][:length]
            self.limits.pop(seq, None)

    def fork(self, picks: Sequence[int]) -> None:
        parents = self.picked(picks, distinct=False)
        if len(self.tokens) + len(parents) > self.cache.max_seqs:
            self.refused(OutOfSequencesError, self.cache.fork, parents)
            return
        children = self.cache.fork(parents).tolist()
        assert not set(children) & set(self.tokens)
        for parent, child in zip(parents, children, strict=True):
            self.tokens[child] = list(self.tokens[parent])
            self.limits.pop(parent, None)

    def free(self, picks: Sequence[int]) -> None:
        seqs = self.picked(picks)
        self.cache.free(seqs)
        for seq in seqs:
            del self.tokens[seq]
            self.limits.pop(seq, None)

    def publish(self, pick: int, part: int) -> None:
        for seq in self.picked([pick]):
            ids = self.tokens[seq]
            ids = ids[: len(ids) if part % 3 else len(ids) // 2]
            self.cache.publish(seq, ids)
            self.past.append(list(ids))
            # Held pages must be found. Another sequence's page may serve, so only the number of tokens counts.
            found = self.cache._host.pool.find(keys_of(ids, self.cache.page_size))
            assert len(found) == len(ids) // self.cache.page_size

    def reserve(self, picks: Sequence[int], counts: Sequence[int]) -> None:
        seqs = self.picked(picks)
        counts = [counts[i % len(counts)] for i in range(len(seqs))]
        room = [len(self.tokens[seq]) + count for seq, count in zip(seqs, counts, strict=True)]
        if self.must_refuse(seqs, room, self.cache.reserve, seqs, counts):
            return
        self.cache.reserve(seqs, counts)
        for seq, end, count in zip(seqs, room, counts, strict=True):
            self.limits.pop(seq, None)
            if count:
                self.limits[seq] = end

    def steps(self, num_seqs: int, num_tokens: int, num_steps: int, salt: int) -> None:
        """Steps that the device makes by itself, as many as every sequence that takes part has room for."""
        cache = self.cache
        num_seqs = 1 + num_seqs % cache.max_seqs
        tokens = cache.step_tokens(num_seqs, num_tokens)
        room = {
            seq: (limit - len(self.tokens[seq])) // num_tokens
            for seq, limit in self.limits.items()
            if seq < num_seqs and limit - len(self.tokens[seq]) >= num_tokens
        }
        num_steps = min([num_steps, *room.values()])
        if room:
            self.refused(ValueError, cache.advanced, tokens, min(room.values()) + 1)
        for step in range(num_steps):
            cache.advance(tokens)
            numbers = np.full((num_seqs, num_tokens), 7)  # what rows without a token would get must go nowhere
            for seq in room:
                new = self.new_ids(num_tokens, salt + step + seq)
                self.tokens[seq] = self.tokens[seq] + new
                numbers[seq] = histories(self.tokens[seq])[-num_tokens:]
            positions = on_host(tokens.positions).reshape(num_seqs, num_tokens)
            for seq in range(num_seqs):
                expected = range(len(self.tokens[seq]) - num_tokens, len(self.tokens[seq])) if seq in room else None
                assert positions[seq].tolist() == (list(expected) if expected else [-1] * num_tokens)
            self.write(tokens, numbers.reshape(-1).tolist())
        cache.advanced(tokens, num_steps)

    def compact(self) -> None:
        moved = self.cache.compact()
        assert self.cache.compact() == 0
        pool = self.cache._host.pool
        occupied = (pool.refs > 0) | pool.is_findable
        assert not occupied[np.count_nonzero(occupied) :].any()
        assert moved <= np.count_nonzero(occupied)

    def park(self) -> None:
        """Into a file and back; reservations end."""
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(Path(folder) / "cache.npz")
            before, device = self.cache.stats(), self.cache.device
            self.cache = PagedKVCache.load(Path(folder) / "cache.npz", device="cpu" if device is None else device)
        self.limits.clear()
        after = self.cache.stats()
        assert (after.sequences, after.tokens, after.cached) == (before.sequences, before.tokens, before.cached)

    # ---- what must hold after every one of them --------------------------------------------------------------------

    def check(self) -> None:
        cache = self.cache
        cache.check_integrity()
        holders = self.holders()
        assert cache.num_free_pages == cache.num_pages - len(holders)
        assert cache.seq_lens.tolist() == [len(self.tokens.get(seq, ())) for seq in range(cache.max_seqs)]
        stats = cache.stats()
        assert stats.free + stats.cached + stats.held == stats.num_pages
        assert (stats.held, stats.shared) == (len(holders), sum(count > 1 for count in holders.values()))
        seqs = list(self.tokens)
        for layer in range(self.num_layers):
            gathered = np.split(
                on_host(cache.gather(seqs, layer=layer)), np.cumsum([len(self.tokens[s]) for s in seqs])
            )
            for seq, rows in zip(seqs, gathered, strict=False):
                expected = np.concatenate(
                    [on_host(part) for part in latents(cache, histories(self.tokens[seq]), layer)], 1
                )
                np.testing.assert_array_equal(contents(cache, seq, layer), expected)
                np.testing.assert_array_equal(rows, expected)

    def run(self, operations: Sequence[tuple]) -> None:
        for name, *arguments in operations:
            getattr(self, name)(*arguments)
            self.num_operations += 1
            self.check()


def keys_of(ids: Sequence[int], page_size: int) -> Any:
    from mlacore.page_pool import prefix_keys

    return prefix_keys(np.asarray(ids, np.int64), page_size)


def operations(longest: int, max_size: int, min_size: int = 0) -> st.SearchStrategy:
    """Operations with up to `longest` tokens appended to a sequence at once."""
    small = st.integers(0, 9)
    picks = st.lists(st.integers(0, 7), max_size=4)
    counts = st.lists(st.integers(0, longest), min_size=1, max_size=3)
    prompt = st.tuples(small, st.integers(0, 4 * longest), st.integers(0, longest))
    prompts = st.lists(prompt, max_size=3)
    by_name = {
        "create": (prompts, st.sampled_from(["new", "found", "prefix"])),
        "append": (picks, counts, small, st.sampled_from(["even", "ragged", "split"])),
        "truncate": (picks, st.lists(st.integers(0, 3 * longest), min_size=1, max_size=3)),
        "fork": (st.lists(st.integers(0, 7), max_size=2),),
        "free": (picks,),
        "publish": (small, small),
        "reserve": (picks, counts),
        "steps": (st.integers(0, 7), st.integers(1, 3), st.integers(0, 6), small),
        "compact": (),
        "park": (),
    }
    often = ["append", "append", "create", "publish", "steps"]
    names = [*by_name, *often]
    step = st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), *by_name[name]))
    begin = ("create", [(0, 0, longest), (1, 0, longest // 2), (2, 0, 0)], "new")
    return st.lists(step, min_size=min_size, max_size=max_size).map(lambda ops: [begin, *ops])


def rows_of(n: int, *, rank: int = RANK, rope: int = ROPE, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((n, rank), dtype), np.zeros((n, rope), dtype)
