"""Calls that a cache refuses, which change nothing, and damage that its integrity check sees."""

from __future__ import annotations

import numpy as np
import pytest
from cache_model import RANK, ROPE, latents, make_cache, rows_of, snapshot

from mlacore.cache import PagedKVCache
from mlacore.cache_layout import NewTokens
from mlacore.host_tables import OutOfPagesError, OutOfSequencesError


@pytest.fixture
def busy() -> PagedKVCache:
    """12 pages of 4 tokens: sequence 0 holds 9 tokens, 1 holds 17, 2 none, 3 was freed. 4 pages are free."""
    cache = make_cache(max_seq_len=40)
    seqs = cache.create(4).seqs
    cache.append(seqs, *latents(cache, range(36)), num_tokens=[9, 17, 0, 10])
    cache.free([3])
    cache.publish(1, range(17))
    return cache


def rope_table(positions: int, pairs: int) -> np.ndarray:
    return np.ones((positions, pairs), np.float32)


BAD_CALLS = {
    "more pages than free": (
        lambda c: c.append([0, 1], *rows_of(23), num_tokens=[12, 11]),
        OutOfPagesError,
        r"23 tokens for 2 sequences need 5 more pages, but 4 of 12 are free",
    ),
    "more rows than free": (
        lambda c: c.create(3),
        OutOfSequencesError,
        r"out of sequences: 3 more are asked for, expected at most 2 \(rows free of max_seqs=5\)",
    ),
    "more rows than free to fork into": (lambda c: c.fork([0, 0, 1]), OutOfSequencesError, "3 more are asked for"),
    "fork of what is freed": (lambda c: c.fork([0, 3]), ValueError, "seqs: got 3 at 1, expected a live sequence"),
    "more pages than free for prompts": (
        lambda c: c.create(2, num_tokens=[9, 8]),
        OutOfPagesError,
        r"17 tokens for 2 sequences need 5 more pages, but 4 of 12 are free",
    ),
    "more pages than free for a prompt that is partly there": (
        lambda c: c.create(1, num_tokens=33, prefix=[list(range(8))]),
        OutOfPagesError,
        r"33 tokens for 1 sequences need 7 more pages, but 4 of 12 are free",
    ),
    "prompt longer than max_seq_len": (
        lambda c: c.create(2, num_tokens=[1, 41]),
        ValueError,
        "num_tokens: got 41 for prompt 1, expected at most max_seq_len=40",
    ),
    "prompt shorter than its prefix": (
        lambda c: c.create(1, num_tokens=4, prefix=[[1, 2, 3, 4, 5]]),
        ValueError,
        r"num_tokens: got 4 for prompt 0, expected at least 5 \(the ids in prefix\[0\]\)",
    ),
    "prefixes of other sequences": (
        lambda c: c.create(2, prefix=[[1]]),
        ValueError,
        r"prefix: got token ids of 1 sequences, expected 2 \(from num_seqs\)",
    ),
    "prefix alone": (
        lambda c: c.create(1, prefix=7),
        TypeError,
        "prefix: got int, expected token ids for each sequence",
    ),
    "prefix of text": (
        lambda c: c.create(1, prefix=["ab"]),
        TypeError,
        r"prefix\[0\]: got dtype <U2, expected integers",
    ),
    "ids of tokens that are not there": (
        lambda c: c.publish(0, range(10)),
        ValueError,
        r"token_ids: got 10, expected at most 9 \(tokens of sequence 0\)",
    ),
    "other ids than published": (
        lambda c: c.publish(1, [0, 1, 2, 3, 4, 5, 6, 8]),
        ValueError,
        r"token_ids: got other ids in \[0, 8\) than those that sequence 1 has published",
    ),
    "publish what is freed": (lambda c: c.publish(3, [1]), ValueError, "seqs: got 3 at 0, expected a live sequence"),
    "truncate to more": (
        lambda c: c.truncate([1, 0], [17, 10]),
        ValueError,
        r"lengths: got 10 for sequence 0, expected 0 to 9 \(the tokens it holds\)",
    ),
    "truncate below 0": (lambda c: c.truncate([0], -1), ValueError, "lengths: got -1 for sequence 0, expected 0 to 9"),
    "lengths of other sequences": (lambda c: c.truncate([0], [1, 2]), ValueError, r"lengths: got shape \(2,\)"),
    "reserve more pages than free": (lambda c: c.reserve([0, 2], [8, 9]), OutOfPagesError, "need 5 more pages"),
    "reserve past max_seq_len": (lambda c: c.reserve([0], 32), ValueError, "num_tokens: got 32 for sequence 0"),
    "reserve fewer than none": (lambda c: c.reserve([0], -1), ValueError, "num_tokens: got -1 for sequence 0"),
    "a step of more rows than there are": (
        lambda c: c.step_tokens(6),
        ValueError,
        r"num_seqs: got 6, expected at most 5 \(max_seqs of the cache\)",
    ),
    "a step of no tokens": (lambda c: c.step_tokens(2, 0), ValueError, "num_tokens: got 0, expected at least 1"),
    "advance into what is no step": (
        lambda c: c.advance(c.extend([], 1)),
        TypeError,
        r"tokens: got NewTokens, expected StepTokens \(from step_tokens\)",
    ),
    "write to what is no tokens": (
        lambda c: c.write(np.zeros(1, np.int64), *rows_of(1)),
        TypeError,
        r"tokens: got ndarray, expected NewTokens \(from create, extend, append or step_tokens\)",
    ),
    "layer that is not there": (
        lambda c: c.gather([0], layer=1),
        ValueError,
        r"layer: got 1, expected below 1 \(num_layers of the cache\)",
    ),
    "norm weight of another width": (
        lambda c: c.append([0], *rows_of(1), num_tokens=1, norm_weight=np.ones(8, np.float32)),
        ValueError,
        r"norm_weight: got shape \(8,\), expected \(kv_lora_rank,\) with kv_lora_rank=16",
    ),
    "norm weight of another dtype": (
        lambda c: c.append([0], *rows_of(1), num_tokens=1, norm_weight=np.ones(16, np.float16)),
        TypeError,
        r"norm_weight: got dtype float16, expected float32 \(from the cache\)",
    ),
    "negative eps": (
        lambda c: c.append([0], *rows_of(1), num_tokens=1, norm_weight=np.ones(16, np.float32), norm_eps=-1.0),
        ValueError,
        "norm_eps: got -1.0, expected a finite number of at least 0",
    ),
    "cos without sin": (
        lambda c: c.append([0], *rows_of(1), num_tokens=1, rope_cos=np.ones((40, 4), np.float32)),
        ValueError,
        r"rope_sin: got None, expected a table \(as rope_cos is given\)",
    ),
    "rope tables of another width": (
        lambda c: c.append([0], *rows_of(1), num_tokens=1, rope_cos=rope_table(40, 8), rope_sin=rope_table(40, 8)),
        ValueError,
        r"rope_cos: got shape \(40, 8\), .* pairs=4 \(qk_rope_head_dim / 2 of the cache\)",
    ),
    "rope tables that end too early": (
        lambda c: c.append([2, 1], *rows_of(2), num_tokens=1, rope_cos=rope_table(17, 4), rope_sin=rope_table(17, 4)),
        ValueError,
        r"rope_cos: got 17 positions, expected at least 18 \(one past the last new token's\)",
    ),
    "interleaved by a word": (
        lambda c: c.append(
            [0],
            *rows_of(1),
            num_tokens=1,
            rope_cos=rope_table(40, 4),
            rope_sin=rope_table(40, 4),
            rope_interleaved="yes",
        ),
        TypeError,
        "rope_interleaved: got str, expected a bool",
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
    "negative number": (lambda c: c.create(-1), ValueError, "num_seqs: got -1, expected at least 0"),
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
    "rows of other tokens": (
        lambda c: c.write(NewTokens(np.zeros((2, 2), np.int64), None), *rows_of(1)),
        ValueError,
        r"ckv: got shape \(1, 16\), .* num_tokens=2 \(from tokens\)",
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
    "no tokens to write, other dtype": (
        lambda c: c.write(c.extend([], 0), *rows_of(0, dtype=np.float16)),
        TypeError,
        "ckv: got dtype float16",
    ),
    "no tokens to write, but RoPE keys": (
        lambda c: c.write(c.extend([], 0), rows_of(0)[0], rows_of(1)[1]),
        ValueError,
        r"kpe: got shape \(1, 8\), expected \(num_tokens, qk_rope_head_dim\) with num_tokens=0 \(from tokens\)",
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
        ({"num_layers": 0}, ValueError, "num_layers: got 0, expected at least 1"),
        ({"interleaved": 1}, TypeError, "interleaved: got int, expected a bool"),
        ({"interleaved": True}, ValueError, "interleaved: got True, expected False with num_layers=None"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_constructor_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        make_cache(**arguments)


def test_append_to_several_layers_says_how_to():
    cache = make_cache(num_layers=2)
    seqs = cache.create(1).seqs
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"got a cache of 2 layers, expected one layer \(extend, then write each\)"):
        cache.append(seqs, *rows_of(1), num_tokens=1)
    assert snapshot(cache) == before


def test_replays_past_the_reservation_are_told(busy):
    step = busy.step_tokens()
    busy.reserve([0, 2], [3, 5])
    before = snapshot(busy)
    message = (
        r"num_steps: got 4, expected at most 3 \(from reserve: sequence 0 holds 9 tokens and may grow to 12, 1 a step\)"
    )
    with pytest.raises(ValueError, match=message):
        busy.advanced(step, 4)
    assert snapshot(busy) == before


def test_integrity_check_sees_every_kind_of_damage(busy):
    host, pool = busy._host, busy._host.pool
    busy.reserve([0], 2)
    busy.fork([0])  # row 3: pages 0 to 2 have two holders
    damages = [
        (busy.block_table, (0, 1), 8, "sequence 0: block_table differs"),
        (busy.cache_seqlens, 2, 5, "sequence 2: cache_seqlens differs"),
        (busy._store.limits, 1, 18, "sequence 1: the device's limit differs"),
        (host.seq_lens, 1, 30, "sequence 1: pages held do not match"),
        (host.table, (1, 0), host.table[0, 0], "page 0: got a count of 2, but 3 sequences hold it"),
        (host.table, (1, 0), 12, "page 0 to 12: expected 0 to 11"),
        (host.table, (3, 1), host.table[3, 0], "page .: got a count of 2, but 3 sequences hold it"),
        (host.sealed, 0, False, "sequence 0: may write into a page of others"),
        (host.clear_until, 2, 9, "sequence 2: is not clear as far as its pages go"),
        (pool._stack, 0, pool._stack[1], "page .*: got [02] places, expected 1"),
        (pool._stack, 0, 12, "page .* to 12: expected 0 to 11"),
        (pool.refs, 0, 1, "page 0: got a count of 1, but 2 sequences hold it"),
        (pool.is_findable, 0, True, "keys and findable pages do not match"),
        (host.alive, 0, False, "sequence 0: holds tokens, but is not alive"),
    ]
    for array, index, value, message in damages:
        busy.check_integrity()
        kept, array[index] = array[index], value
        with pytest.raises(RuntimeError, match=message):
            busy.check_integrity()
        array[index] = kept
    pool._key_of[5] = pool._key_of.pop(4)
    with pytest.raises(RuntimeError, match="keys and findable pages do not match"):
        busy.check_integrity()
