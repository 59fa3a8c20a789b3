"""The paged cache against plain lists of tokens: contents, page accounts, what attention reads."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from cache_model import RANK, ROPE, Model, contents, latents, make_cache, operations, snapshot, token_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from mlacore import arrays
from mlacore.cache import PagedKVCache


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
