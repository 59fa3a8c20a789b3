"""The paged cache against plain lists of tokens: contents, page accounts, errors that change nothing, launches."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlacore import arrays, driver
from mlacore import cache as cache_module
from mlacore.block_tables import apply_changes_numpy
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


@settings(max_examples=400)
@given(
    operations(longest=14, max_size=20),
    st.integers(1, 30),
    st.integers(1, 9),
    st.integers(1, 60),
    st.sampled_from(["bfloat16", "float16", "float32"]),
)
def test_random_operations_match_plain_lists(ops, num_pages, page_size, max_seq_len, dtype):
    Model(make_cache(num_pages, page_size, max_seq_len=max_seq_len, dtype=dtype)).run(ops)


@pytest.mark.gpu
@settings(max_examples=40)
@given(operations(longest=150, max_size=20), st.integers(1, 24), st.sampled_from(["bfloat16", "float16"]))
def test_random_operations_match_plain_lists_on_gpu(ops, num_pages, dtype):
    Model(PagedKVCache(num_pages, max_seqs=5, max_seq_len=700, dtype=dtype, device="cuda")).run(ops)


# ---- appending -----------------------------------------------------------------------------------------------------


def test_slots_are_page_times_page_size_plus_offset():
    cache = make_cache()
    seqs = cache.allocate(2)
    assert cache.extend(seqs, [3, 5]).tolist() == [0, 1, 2, 4, 5, 6, 7, 8]  # page 0; pages 1 and 2
    assert cache.extend(seqs[::-1], 2).tolist() == [9, 10, 3, 12]
    assert cache.extend(seqs, 0).tolist() == []
    assert cache.block_table[:2, :3].tolist() == [[0, 3, -1], [1, 2, -1]]
    assert cache.seq_lens[seqs].tolist() == [5, 7]


def test_append_returns_the_slots_of_extend():
    cache, twin = make_cache(), make_cache()
    ckv, kpe = latents(cache, range(9))
    slots = cache.append(cache.allocate(2), ckv, kpe, num_tokens=[6, 3])
    np.testing.assert_array_equal(slots, twin.extend(twin.allocate(2), [6, 3]))
    assert slots.dtype == np.int64


def test_nothing_to_append():
    cache = make_cache()
    ckv, kpe = latents(cache, [])
    before = snapshot(cache)
    assert cache.append([], ckv.reshape(0, 1, RANK), kpe.reshape(0, 1, ROPE)).shape == (0,)
    assert cache.append([], ckv, kpe, num_tokens=[]).shape == (0,)
    cache.write(cache.extend([], 3), ckv, kpe)
    seqs = cache.allocate(2)
    assert cache.append(seqs, ckv.reshape(2, 0, RANK), kpe.reshape(2, 0, ROPE)).shape == (0,)
    assert cache.append(seqs, ckv, kpe, num_tokens=0).shape == (0,)
    assert cache.append([], ckv.reshape(0, 3, RANK), kpe.reshape(0, 3, ROPE)).shape == (0,)
    assert cache.append(seqs, np.zeros((0, 2 * RANK), np.float32)[:, ::2], kpe, num_tokens=[0, 0]).shape == (0,)
    cache.free(seqs)
    cache.free([])
    table, lengths = cache.batch([])
    assert table.shape == (0, 1)
    assert lengths.shape == (0,)
    assert snapshot(cache) == before


def test_strided_inputs_as_projections_produce_them():
    cache = make_cache()
    seqs = cache.allocate(3)
    fused = np.zeros((3, 2, RANK + ROPE + 16), np.float32)  # latent, rope key, and something else beside
    fused[:, :, : RANK + ROPE] = token_rows(range(6), RANK + ROPE, np.float32).reshape(3, 2, -1)
    cache.append(seqs, fused[:, :, :RANK], fused[:, :, RANK : RANK + ROPE])
    for i, seq in enumerate(seqs):
        np.testing.assert_array_equal(contents(cache, seq), fused[i, :, : RANK + ROPE])


def test_write_skips_slots_outside_the_pool():
    cache = make_cache()
    cache.pool[:] = -1
    before = cache.pool.copy()
    ckv, kpe = latents(cache, range(4))
    cache.write(np.array([-1, 5, -5, 12 * 4], np.int64), ckv, kpe)
    np.testing.assert_array_equal(cache.pool[1, 1, 0], np.concatenate([ckv[1], kpe[1]]))
    cache.pool[1, 1] = -1
    np.testing.assert_array_equal(cache.pool, before)


def test_pages_are_reused_and_rows_too():
    cache = make_cache(num_pages=4, max_seqs=2)
    for round_ in range(5):
        seqs = cache.allocate(2)
        assert seqs.tolist() == [0, 1]
        tokens = range(100 * round_, 100 * round_ + 15)
        cache.append(seqs, *latents(cache, tokens), num_tokens=[8, 7])
        assert cache.num_free_pages == 0
        cache.check_integrity()
        cache.free(seqs[::-1])
        assert cache.num_free_pages == 4


def test_batch_keeps_the_order_and_is_as_wide_as_needed():
    cache = make_cache()
    seqs = cache.allocate(4)
    cache.extend(seqs, [1, 9, 0, 4])
    table, lengths = cache.batch([3, 1])
    assert lengths.tolist() == [4, 9]
    assert (table.dtype, lengths.dtype) == (np.int32, np.int32)
    assert table.shape == (2, 3)
    np.testing.assert_array_equal(table, cache.block_table[[3, 1], :3])
    cache.extend([3], 1)
    assert lengths.tolist() == [4, 9]  # a copy
    assert cache.batch([2])[0].shape == (1, 1)  # a sequence without pages still has a column


def test_facts():
    cache = PagedKVCache(3, device="cpu")
    assert cache.pool.shape == (3, 64, 1, 576)
    assert cache.pool.dtype == arrays.bfloat16
    assert cache.bytes_per_token == 1152
    assert cache.nbytes == cache.pool.nbytes == 3 * 64 * 1152
    assert cache.block_table.shape == (256, 3)
    assert PagedKVCache(10, max_seqs=7, max_seq_len=65, device="cpu").block_table.shape == (7, 2)
    assert "0 of 3 pages of 64 tokens" in repr(cache)
    with pytest.raises(ValueError, match="read-only"):
        cache.seq_lens[0] = 1


def test_attention_over_the_cache():
    """Two histories that end with the same tokens attend alike, whichever pages and rows they live in."""
    from mlacore import mla_decode

    rng = np.random.default_rng(0)
    rows = rng.standard_normal((150, 576), np.float32).astype(np.float16)
    ckv, kpe = rows[:, :512], rows[:, 512:]
    plain, shuffled = (PagedKVCache(8, max_seqs=4, dtype="float16", device="cpu") for _ in range(2))
    a = plain.allocate(2)
    plain.append(a, ckv, kpe, num_tokens=[100, 50])
    first, *b = shuffled.allocate(3)
    shuffled.append([first, *b], ckv[:140], kpe[:140], num_tokens=[60, 40, 40])
    shuffled.free([first])
    shuffled.free(b)
    b = shuffled.allocate(3)[[2, 0]]
    for begin in range(0, 100, 25):
        mine = np.r_[begin : begin + 25, 100 + begin // 2 : 100 + begin // 2 + (13 if begin % 50 else 12)]
        shuffled.append(b, ckv[mine], kpe[mine], num_tokens=[25, len(mine) - 25])
    q = rng.standard_normal((2, 1, 16, 576), np.float32).astype(np.float16)
    assert shuffled.seq_lens[b].tolist() == [100, 50]
    expected, actual = mla_decode(q, plain.pool, *plain.batch(a)), mla_decode(q, shuffled.pool, *shuffled.batch(b))
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_array_equal(actual[1], expected[1])


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy() -> PagedKVCache:
    """12 pages of 4 tokens: sequence 0 holds 9 tokens, 1 holds 17, 2 none, 3 was freed. 4 pages are free."""
    cache = make_cache(max_seq_len=40)
    seqs = cache.allocate(4)
    cache.append(seqs, *latents(cache, range(36)), num_tokens=[9, 17, 0, 10])
    cache.free([3])
    return cache


def rows_of(n: int, *, rank: int = RANK, rope: int = ROPE, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((n, rank), dtype), np.zeros((n, rope), dtype)


BAD_CALLS = {
    "more pages than free": (
        lambda c: c.append([0, 1], *rows_of(23), num_tokens=[12, 11]),
        OutOfPagesError,
        r"23 tokens for 2 sequences need 5 more pages, but 4 of 12 are free",
    ),
    "more rows than free": (
        lambda c: c.allocate(3),
        OutOfSequencesError,
        r"num_seqs: got 3, expected at most 2 \(rows free of max_seqs=5\)",
    ),
    "longer than max_seq_len": (
        lambda c: c.extend([2, 0], [1, 32]),
        ValueError,
        r"num_tokens: got 32 for sequence 0, expected at most 31 \(it holds 9 of max_seq_len=40 tokens\)",
    ),
    "longer than an int64": (lambda c: c.extend([0], 2**63 - 1), ValueError, "expected at most 31"),
    "negative tokens": (
        lambda c: c.extend([0, 1], [1, -1]),
        ValueError,
        "num_tokens: got -1 for sequence 1, expected at least 0",
    ),
    "fractional tokens": (lambda c: c.extend([0], 1.5), TypeError, "num_tokens: got dtype float64, expected integers"),
    "numbers of other sequences": (
        lambda c: c.extend([0, 1], [1, 1, 1]),
        ValueError,
        r"num_tokens: got shape \(3,\), expected \(num_seqs,\) with num_seqs=2 \(from seqs\)",
    ),
    "freed sequence": (lambda c: c.extend([0, 3], 1), ValueError, "seqs: got 3 at 1, expected a live sequence"),
    "sequence freed twice": (lambda c: c.free([3]), ValueError, "seqs: got 3 at 0, expected a live sequence"),
    "unknown sequence": (lambda c: c.batch([0, 5]), ValueError, "seqs: got 5 at 1, expected a live sequence"),
    "negative sequence": (lambda c: c.free([-1]), ValueError, "seqs: got -1 at 0, expected a live sequence"),
    "one sequence twice": (
        lambda c: c.append([1, 0, 1], *rows_of(3), num_tokens=1),
        ValueError,
        "seqs: got 1 2 times, expected distinct sequences",
    ),
    "free one sequence twice": (lambda c: c.free([0, 0]), ValueError, "seqs: got 0 2 times"),
    "sequence alone": (lambda c: c.free(1), ValueError, r"seqs: got shape \(\), expected \(num_seqs,\)"),
    "sequences in unequal lists": (
        lambda c: c.free([[0], [1, 2]]),
        ValueError,
        r"seqs: got \[\[0\], \[1, 2\]\], expected integers along one axis",
    ),
    "sequence beyond an int64": (
        lambda c: c.free(np.uint64(2**64 - 1)),
        ValueError,
        r"seqs: got 18446744073709551615, expected at most 9223372036854775807 \(an int64\)",
    ),
    "sequences beyond an int64": (
        lambda c: c.free(np.array([0, 2**63], np.uint64)),
        ValueError,
        "seqs: got 9223372036854775808, expected at most",
    ),
    "tokens beyond an int64": (
        lambda c: c.extend([0], np.uint64(2**63)),
        ValueError,
        "num_tokens: got 9223372036854775808, expected at most 9223372036854775807",
    ),
    "sequence by name": (lambda c: c.free(["a"]), TypeError, "seqs: got dtype <U1, expected integers"),
    "mask for sequences": (lambda c: c.free([True, False]), TypeError, "seqs: got dtype bool, expected integers"),
    "negative allocation": (lambda c: c.allocate(-1), ValueError, "num_seqs: got -1, expected at least 0"),
    "two axes, no num_tokens": (
        lambda c: c.append([0, 1], *rows_of(2)),
        ValueError,
        r"ckv: got shape \(2, 16\), expected \(num_seqs, num_tokens, kv_lora_rank\) with num_seqs=2 \(from seqs\)",
    ),
    "latents of other sequences": (
        lambda c: c.append([0, 1], *(a[:, None] for a in rows_of(3))),
        ValueError,
        r"ckv: got shape \(3, 1, 16\), .* with num_seqs=2 \(from seqs\)",
    ),
    "latents of other tokens": (
        lambda c: c.append([0, 1], *rows_of(4), num_tokens=[1, 2]),
        ValueError,
        r"ckv: got shape \(4, 16\), expected \(total_tokens, .*total_tokens=3 \(the sum of num_tokens\)",
    ),
    "other rank": (
        lambda c: c.append([0], *rows_of(2, rank=32), num_tokens=2),
        ValueError,
        r"ckv: got shape \(2, 32\), .* kv_lora_rank=16 \(from the cache\)",
    ),
    "other rope": (
        lambda c: c.append([0], *rows_of(2, rope=16), num_tokens=2),
        ValueError,
        r"kpe: got shape \(2, 16\), .* qk_rope_head_dim=8 \(from the cache\)",
    ),
    "ckv and kpe disagree": (
        lambda c: c.append([0, 1], rows_of(4)[0].reshape(2, 2, RANK), rows_of(2)[1].reshape(2, 1, ROPE)),
        ValueError,
        r"kpe: got shape \(2, 1, 8\), .* num_tokens=2 \(from ckv\)",
    ),
    "other dtype": (
        lambda c: c.append([0], *rows_of(1, dtype=np.float16), num_tokens=1),
        TypeError,
        r"ckv: got dtype float16, expected float32 \(from the cache\)",
    ),
    "list for an array": (
        lambda c: c.append([0], [[[0.0] * RANK]], rows_of(1)[1][None]),
        TypeError,
        r"ckv: got builtins.list, expected a NumPy array \(the cache is on NumPy\)",
    ),
    "strided rows": (
        lambda c: c.append([0], rows_of(1, rank=2 * RANK)[0][:, ::2], rows_of(1)[1], num_tokens=1),
        ValueError,
        "ckv: got strides .* expected the last axis contiguous",
    ),
    "stream for NumPy": (lambda c: c.extend([0], 1, stream=7), TypeError, "stream: got int, expected None"),
    "slots of another dtype": (
        lambda c: c.write(np.zeros(1, np.int32), *rows_of(1)),
        TypeError,
        r"slots: got dtype int32, expected int64 \(from extend\)",
    ),
    "slots of other tokens": (
        lambda c: c.write(np.zeros(2, np.int64), *rows_of(1)),
        ValueError,
        r"ckv: got shape \(1, 16\), .* num_tokens=2 \(from slots\)",
    ),
    "no tokens, other dtype": (
        lambda c: c.append([0], *rows_of(0, dtype=np.float16), num_tokens=0),
        TypeError,
        r"ckv: got dtype float16, expected float32 \(from the cache\)",
    ),
    "no tokens, other dtype of kpe": (
        lambda c: c.append([], rows_of(0)[0], rows_of(0, dtype=np.float16)[1], num_tokens=[]),
        TypeError,
        r"kpe: got dtype float16, expected float32 \(from the cache\)",
    ),
    "no tokens, text for kpe": (
        lambda c: c.append([0], rows_of(0)[0], "x", num_tokens=0),
        TypeError,
        "kpe: got builtins.str, expected a NumPy array",
    ),
    "no tokens, text for kpe, no num_tokens": (
        lambda c: c.append([0], rows_of(0)[0][None], "x"),
        TypeError,
        "kpe: got builtins.str, expected a NumPy array",
    ),
    "no tokens, None": (
        lambda c: c.append([0], None, None, num_tokens=[0]),
        TypeError,
        "ckv: got builtins.NoneType, expected a NumPy array",
    ),
    "no sequences, None": (lambda c: c.append([], None, None), TypeError, "ckv: got builtins.NoneType"),
    "no tokens, but latents": (
        lambda c: c.append([0], *rows_of(2), num_tokens=0),
        ValueError,
        r"ckv: got shape \(2, 16\), expected \(total_tokens, kv_lora_rank\) with total_tokens=0 "
        r"\(the sum of num_tokens\), kv_lora_rank=16 \(from the cache\)$",
    ),
    "no tokens, other rope": (
        lambda c: c.append([0], *rows_of(0, rope=16), num_tokens=0),
        ValueError,
        r"kpe: got shape \(0, 16\), .* qk_rope_head_dim=8 \(from the cache\)$",
    ),
    "no tokens, of other sequences": (
        lambda c: c.append([0, 1], rows_of(0)[0].reshape(1, 0, RANK), rows_of(0)[1].reshape(1, 0, ROPE)),
        ValueError,
        r"ckv: got shape \(1, 0, 16\), .* with num_seqs=2 \(from seqs\)",
    ),
    "no tokens, but RoPE keys": (
        lambda c: c.append([0], rows_of(0)[0][None], rows_of(3)[1][None]),
        ValueError,
        r"kpe: got shape \(1, 3, 8\), .* num_tokens=0 \(from ckv\)",
    ),
    "no sequences, two axes": (
        lambda c: c.append([], *rows_of(0)),
        ValueError,
        r"ckv: got shape \(0, 16\), expected \(num_seqs, num_tokens, kv_lora_rank\) with num_seqs=0 \(from seqs\), kv",
    ),
    "no slots, other dtype": (
        lambda c: c.write(np.zeros(0, np.int64), *rows_of(0, dtype=np.float16)),
        TypeError,
        "ckv: got dtype float16",
    ),
    "no slots, but RoPE keys": (
        lambda c: c.write(np.zeros(0, np.int64), rows_of(0)[0], rows_of(1)[1]),
        ValueError,
        r"kpe: got shape \(1, 8\), expected \(num_tokens, qk_rope_head_dim\) with num_tokens=0 \(from slots\)",
    ),
    "slots with two axes": (
        lambda c: c.write(np.zeros((0, 2), np.int64), *rows_of(0)),
        ValueError,
        r"slots: got shape \(0, 2\), expected \(num_tokens,\)",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_say_what_is_wrong_and_change_nothing(busy, name):
    call, error, message = BAD_CALLS[name]
    before = snapshot(busy)
    with pytest.raises(error, match=message):
        call(busy)
    assert snapshot(busy) == before
    busy.check_integrity()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_pages": 0}, ValueError, "num_pages: got 0, expected at least 1"),
        ({"num_pages": 2.0}, TypeError, "num_pages: got float 2.0, expected an integer"),
        ({"num_pages": 2**31}, ValueError, "num_pages: got 2147483648, expected at most 2147483647"),
        ({"page_size": 0}, ValueError, "page_size: got 0"),
        ({"max_seqs": 0}, ValueError, "max_seqs: got 0"),
        ({"max_seq_len": 2**31}, ValueError, "max_seq_len: got 2147483648"),
        ({"dtype": "int8"}, TypeError, "dtype: got 'int8', expected"),
        ({"device": "tpu"}, ValueError, "device: got 'tpu', expected 'cpu', 'cuda'"),
        ({"device": -1}, ValueError, "device: got -1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_constructor_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        make_cache(**arguments)


def test_integrity_check_sees_every_kind_of_damage(busy):
    host = busy._host
    damages = [
        (busy.block_table, (0, 1), 8, "sequence 0: block_table differs"),
        (busy.cache_seqlens, 2, 5, "sequence 2: cache_seqlens differs"),
        (host.seq_lens, 1, 30, "sequence 1: pages held do not match"),
        (host._free_pages, 0, host._free_pages[1], "page .*: got [02] owners"),
        (host.table, (1, 0), host.table[0, 0], "page .*: got [02] owners"),
        (host.table, (1, 0), 12, "page 0 to 12: expected 0 to 11"),
    ]
    for array, index, value, message in damages:
        busy.check_integrity()
        kept, array[index] = array[index], value
        with pytest.raises(RuntimeError, match=message):
            busy.check_integrity()
        array[index] = kept
    host.alive[0] = False
    with pytest.raises(RuntimeError, match="sequence 0: holds tokens, but is not alive"):
        busy.check_integrity()


def test_no_gpu_library_is_imported_in_numpy():
    code = """if True:
        import sys
        import numpy as np
        from mlacore import PagedKVCache
        cache = PagedKVCache(2, dtype="float16", device="cpu")
        cache.append(cache.allocate(1), np.zeros((1, 3, 512), np.float16), np.zeros((1, 3, 64), np.float16))
        cache.check_integrity()
        assert {"cupy", "numba", "torch", "cuda"}.isdisjoint(sys.modules), sorted(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the GPU's side of the cache, on a pretended GPU ---------------------------------------------------------------


class FakeGPUArray(np.ndarray):
    """Stands for cupy.ndarray: what a fake CuPy makes."""


class FakeStream:
    ptr = 0

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


def fake_cupy() -> types.ModuleType:
    """As much of CuPy as the cache uses, in NumPy."""

    class Device(contextlib.nullcontext):
        id = 0

        def synchronize(self) -> None:
            pass

    module: Any = types.ModuleType("cupy")
    stream = FakeStream()
    module.ndarray = FakeGPUArray
    module.cuda = types.SimpleNamespace(
        Device=Device, Stream=FakeStream, ExternalStream=FakeStream, get_current_stream=lambda device=-1: stream
    )
    module.empty = lambda shape, dtype: np.empty(shape, dtype).view(FakeGPUArray)
    module.asarray = lambda array: np.array(array).view(FakeGPUArray)
    module.asnumpy = lambda array: np.array(array).view(np.ndarray)
    return module


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Make device 0 a Hopper GPU whose arrays are NumPy's; returns the log of data-writing launches."""
    launches: list[tuple] = []

    def launch_append(pool, ckv, kpe, slots, stream):
        launches.append((ckv.shape, kpe.shape, slots.shape, stream))
        rows = pool.reshape(-1, pool.shape[-1])
        rows[slots] = np.concatenate([ckv, kpe], axis=1)

    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    monkeypatch.setattr(arrays, "device_of", lambda array: 0 if isinstance(array, FakeGPUArray) else None)
    monkeypatch.setattr(driver, "hopper_devices", lambda: [0])
    monkeypatch.setattr(driver, "require_hopper", lambda device: None)
    monkeypatch.setattr(driver, "launch_append", launch_append)
    return launches


@pytest.fixture
def fake_gpu(monkeypatch):
    """Logs of launches that update tables, and of launches that write rows."""
    updates: list[int] = []

    def apply_changes_cuda(changes, packed, block_table, cache_seqlens, slots, page_size, stream_ptr):
        np.testing.assert_array_equal(packed, changes.packed)
        updates.append(changes.num_changes)
        apply_changes_numpy(changes, block_table, cache_seqlens, slots[: changes.num_tokens], page_size)

    monkeypatch.setattr(cache_module, "apply_changes_cuda", apply_changes_cuda)
    return updates, pretend_gpu(monkeypatch)


def test_one_launch_updates_and_one_writes(fake_gpu):
    updates, writes = fake_gpu
    cache = PagedKVCache(8, max_seqs=4, dtype="float16")
    assert cache.device == 0
    updates.clear()  # the one that compiles the kernel
    seqs = cache.allocate(3)
    assert (updates, writes) == ([], [])
    stream = FakeStream()
    cache.append(seqs, *latents(cache, range(200)), num_tokens=[120, 70, 10], stream=stream)
    assert updates == [3]
    assert writes == [((200, 512), (200, 64), (200,), stream)]
    cache.append(seqs[:2], *(a.reshape(2, 2, -1) for a in latents(cache, range(4))), stream=stream)
    assert updates == [3, 2]
    assert writes[1:] == [((4, 512), (4, 64), (4,), stream)]
    slots = cache.extend(seqs, 1)
    assert (len(updates), len(writes)) == (3, 2)
    cache.write(slots, *latents(cache, range(3)))
    assert (len(updates), len(writes)) == (3, 3)
    cache.free(seqs)
    cache.check_integrity()
    assert (len(updates), len(writes)) == (4, 3)


def test_books_survive_a_failed_launch(fake_gpu, monkeypatch):
    cache = PagedKVCache(8, max_seqs=4, dtype="float16", device="cuda")
    seqs = cache.allocate(2)
    cache.append(seqs, *latents(cache, range(100)), num_tokens=[70, 30])
    before = snapshot(cache)

    def fail(*_: object) -> None:
        raise RuntimeError("launch failed")

    monkeypatch.setattr(cache_module, "apply_changes_cuda", fail)
    for call in (lambda: cache.extend(seqs, 100), lambda: cache.free(seqs)):
        with pytest.raises(RuntimeError, match="launch failed"):
            call()
        assert snapshot(cache) == before
        cache.check_integrity()


@settings(max_examples=20)
@given(operations(longest=150, max_size=8), st.integers(1, 12))
def test_random_operations_on_a_pretended_gpu(ops, num_pages):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cache_module,
            "apply_changes_cuda",
            lambda changes, packed, table, lengths, slots, page_size, ptr: apply_changes_numpy(
                changes, table, lengths, slots[: changes.num_tokens], page_size
            ),
        )
        pretend_gpu(patch)
        Model(PagedKVCache(num_pages, max_seqs=5, max_seq_len=700, dtype="float16", device="cuda:0")).run(ops)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "float32"}, TypeError, "dtype: got float32, expected bfloat16 or float16"),
        ({"page_size": 16}, ValueError, r"page_size: got 16, expected 64 \(what the GPU kernels take\)"),
        ({"kv_lora_rank": 256}, ValueError, "kv_lora_rank: got 256, expected 512"),
        ({"qk_rope_head_dim": 128}, ValueError, "qk_rope_head_dim: got 128, expected 64"),
    ],
)
def test_what_the_gpu_does_not_take(fake_gpu, arguments, error, message):
    with pytest.raises(error, match=message):
        PagedKVCache(4, **arguments)


def test_host_arrays_are_refused_on_the_gpu(fake_gpu):
    cache = PagedKVCache(4, dtype="float16")
    seqs = cache.allocate(1)
    ckv, kpe = latents(cache, range(3))
    before = snapshot(cache)
    for bad in ((np.array(ckv), kpe), (ckv, np.array(kpe))):
        with pytest.raises(TypeError, match=r"got numpy.ndarray, expected a GPU array \(the cache is on cuda:0\)"):
            cache.append(seqs, *bad, num_tokens=3)
        with pytest.raises(TypeError, match=r"got numpy.ndarray, expected a GPU array \(the cache is on cuda:0\)"):
            cache.append(seqs, *(array[:0] for array in bad), num_tokens=0)
    with pytest.raises(TypeError, match="num_tokens: got a GPU array, expected integers on the host"):
        cache.append(seqs, ckv, kpe, num_tokens=arrays.import_cupy().asarray([3]))
    assert snapshot(cache) == before


def test_a_gpu_that_is_not_there_is_an_error():
    if driver.hopper_devices():
        pytest.skip("needs a machine without a Hopper GPU")
    assert PagedKVCache(1, max_seqs=1).device is None
    for device in ("cuda", "cuda:0", 0):
        with pytest.raises(RuntimeError) as caught:
            PagedKVCache(1, device=device)
        assert str(caught.value) == (
            f"device: got {device!r} and found no CUDA device 0, expected a Hopper GPU (H100, H200, H800, H20); "
            'device="cpu" works without one, and `python -m mlacore info` tells more'
        )


def test_a_gpu_of_another_kind_is_named(monkeypatch):
    monkeypatch.setattr(driver, "hopper_devices", list)
    monkeypatch.setattr(driver, "compute_capability", lambda device: (8, 0))
    monkeypatch.setattr(driver, "device_name", lambda device: "NVIDIA A100")
    message = r"device: got 'cuda:1' and found NVIDIA A100 \(device 1, compute capability 8.0\), expected a Hopper GPU"
    with pytest.raises(RuntimeError, match=message):
        PagedKVCache(1, device="cuda:1")
    assert PagedKVCache(1, max_seqs=1).device is None


# ---- on a real GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_steps_on_a_stream_of_their_own():
    import cupy

    cache = PagedKVCache(64, max_seqs=16, device="cuda")
    model, stream = Model(cache), cupy.cuda.Stream(non_blocking=True)
    seqs = cache.allocate(16)
    model.tokens = {int(seq): [] for seq in seqs}
    for step in range(100):
        tokens = list(range(16 * step, 16 * step + 16))
        with stream:
            ckv, kpe = latents(cache, tokens)
        cache.append(seqs, ckv[:, None], kpe[:, None], stream=stream)
        for seq, token in zip(seqs, tokens, strict=True):
            model.tokens[int(seq)].append(token)
    table, lengths = cache.batch(seqs[::-1], stream=stream)
    stream.synchronize()
    assert cupy.asnumpy(lengths).tolist() == [100] * 16
    np.testing.assert_array_equal(cupy.asnumpy(table), cupy.asnumpy(cache.block_table)[seqs[::-1], :2])
    model.check()


@pytest.mark.gpu
def test_long_prompts_fill_many_blocks():
    cache = PagedKVCache(700, max_seqs=3, device="cuda")
    model = Model(cache)
    model.run([("allocate", 3), ("append", [0, 1, 2], [33_000, 1, 9_999], "ragged"), ("free", [0])])


@pytest.mark.gpu
def test_strided_inputs_on_gpu():
    import cupy

    cache = PagedKVCache(4, max_seqs=2, device="cuda")
    seqs = cache.allocate(2)
    rows = token_rows(range(6), 640, cache.dtype).reshape(2, 3, 640)
    fused = cupy.asarray(rows)
    cache.append(seqs, fused[:, :, :512], fused[:, :, 512:576])
    for i, seq in enumerate(seqs):
        np.testing.assert_array_equal(contents(cache, seq), rows[i, :, :576])


@pytest.mark.gpu
def test_host_arrays_are_refused_on_a_real_gpu():
    cache = PagedKVCache(4, max_seqs=2, dtype="float16", device="cuda")
    seqs = cache.allocate(1)
    with pytest.raises(TypeError, match="expected a GPU array"):
        cache.append(seqs, *rows_of(1, rank=512, rope=64, dtype=np.float16), num_tokens=1)
    cache.check_integrity()
    assert cache.num_free_pages == 4
