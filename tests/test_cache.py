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
from mlacore.cache_layout import NewTokens


def test_ten_thousand_random_operations_match_plain_lists():
    count = 0

    @settings(max_examples=500)
    @given(
        operations(longest=14, max_size=30, min_size=15),
        st.integers(1, 30),
        st.integers(1, 9),
        st.integers(1, 60),
        st.sampled_from(["bfloat16", "float16", "float32"]),
        st.sampled_from([(None, False), (None, False), (1, True), (2, False), (3, True)]),
    )
    def run(ops, num_pages, page_size, max_seq_len, dtype, layers):
        nonlocal count
        options = {"max_seq_len": max_seq_len, "dtype": dtype, "num_layers": layers[0], "interleaved": layers[1]}
        model = Model(make_cache(num_pages, page_size, **options))
        model.run(ops)
        count += model.num_operations

    run()
    assert count >= 10_000


def test_slots_are_page_times_page_size_plus_offset():
    cache = make_cache()
    seqs = cache.create(2).seqs
    tokens = cache.extend(seqs, [3, 5])
    assert tokens.slots.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]  # page 0; pages 1 and 2
    assert tokens.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    tokens = cache.extend(seqs[::-1], 2)
    assert tokens.slots.tolist() == [9, 10, 3, 12]
    assert tokens.positions.tolist() == [5, 6, 3, 4]
    assert tokens.end == 7
    assert len(cache.extend(seqs, 0)) == 0
    assert cache.block_table[:2, :3].tolist() == [[0, 3, -1], [1, 2, -1]]
    assert cache.seq_lens[seqs].tolist() == [5, 7]


def test_create_makes_room_for_prompts():
    cache, twin = make_cache(), make_cache()
    seqs, num_cached, tokens = cache.create(2, num_tokens=[6, 3])
    twin_seqs = twin.create(2).seqs
    np.testing.assert_array_equal(tokens.where, twin.extend(twin_seqs, [6, 3]).where)
    assert (seqs.tolist(), num_cached.tolist()) == ([0, 1], [0, 0])
    cache.write(tokens, *latents(cache, range(9)))
    np.testing.assert_array_equal(contents(cache, 1), token_rows(range(6, 9), RANK + ROPE, np.float32))


def test_append_returns_the_slots_of_extend():
    cache, twin = make_cache(), make_cache()
    ckv, kpe = latents(cache, range(9))
    tokens = cache.append(cache.create(2).seqs, ckv, kpe, num_tokens=[6, 3])
    np.testing.assert_array_equal(tokens.where, twin.extend(twin.create(2).seqs, [6, 3]).where)
    assert tokens.where.dtype == np.int64


def test_layers_are_views_that_attention_takes():
    for interleaved in (False, True):
        cache = make_cache(num_pages=5, num_layers=3, interleaved=interleaved)
        assert cache.pool.shape == ((5, 3, 4, 1, 24) if interleaved else (3, 5, 4, 1, 24))
        assert len(cache.layers) == 3
        tokens = cache.create(1, num_tokens=6).tokens
        for layer, view in enumerate(cache.layers):
            assert view.shape == (5, 4, 1, 24)
            assert np.shares_memory(view, cache.pool)
            cache.write(tokens, *latents(cache, range(6), layer), layer=layer)
        for layer in range(3):
            np.testing.assert_array_equal(contents(cache, 0, layer), np.hstack(latents(cache, range(6), layer)))
        assert cache.bytes_per_token == 3 * 24 * 4
        assert cache.nbytes == cache.pool.nbytes


def test_a_fork_copies_its_last_page_when_one_side_writes():
    cache = make_cache()
    parent = cache.create(1, num_tokens=6).seqs
    child, grandchild = int(cache.fork(parent)[0]), int(cache.fork(cache.fork(parent))[0])
    assert cache.num_free_pages == 10  # all share two pages
    cache.extend([child], 1)
    table = cache.block_table
    assert table[child, :2].tolist() == [0, 2]
    assert table[grandchild, :2].tolist() == table[0, :2].tolist() == [0, 1]
    cache.truncate([grandchild], 4)
    cache.extend([grandchild], 1)  # begins a page of its own: nothing to copy
    assert table[grandchild, :2].tolist() == [0, 3]
    cache.free([2])
    cache.extend(parent, 2)  # the last holder of page 1 writes into it
    assert table[0, :2].tolist() == [0, 1]
    cache.check_integrity()
    stats = cache.stats()
    assert (stats.held, stats.shared, stats.free) == (4, 1, 8)


def test_forks_that_all_write_leave_the_page_to_one_of_them():
    cache = make_cache(num_pages=3)
    cache.create(1, num_tokens=2)
    cache.fork([0, 0])
    cache.extend([0, 1, 2], 1)  # three pages for three writers, not four
    assert sorted(cache.block_table[:3, 0].tolist()) == [0, 1, 2]
    cache.check_integrity()


def test_truncating_gives_pages_back():
    cache = make_cache()
    seqs = cache.create(2, num_tokens=[9, 4]).seqs
    cache.truncate(seqs, [4, 0])
    assert cache.seq_lens[seqs].tolist() == [4, 0]
    assert cache.num_free_pages == 11
    cache.truncate(seqs, [4, 0])
    assert cache.num_free_pages == 11


def test_compact_moves_pages_to_the_front_and_keeps_reservations():
    cache = make_cache()
    seqs = cache.create(4, num_tokens=[8, 8, 8, 8]).seqs
    model = [contents(cache, seq).copy() for seq in seqs]
    cache.write(cache.extend(seqs, 1), *latents(cache, range(4)))
    model = [contents(cache, seq).copy() for seq in seqs]
    cache.free(seqs[[0, 2]])
    cache.reserve(seqs[[3]], 5)
    assert cache.compact() == 3
    assert cache.block_table[seqs[[1, 3]]].max() == 6
    for seq in seqs[[1, 3]]:
        np.testing.assert_array_equal(contents(cache, seq), model[seq])
    step = cache.step_tokens()
    for _ in range(5):
        cache.advance(step)
    cache.advanced(step, 5)
    assert cache.seq_lens.tolist() == [0, 9, 0, 14, 0]
    cache.check_integrity()


def test_stats():
    cache = make_cache()
    empty = cache.stats()
    assert (empty.free, empty.held, empty.sequences, empty.fragmentation, empty.hit_rate) == (12, 0, 0, 0.0, 0.0)
    seqs = cache.create(2, num_tokens=[8, 6]).seqs
    cache.fork(seqs[1:])
    cache.publish(0, range(8))
    cache.free([0])
    cache.create(1, prefix=[[0, 1, 2, 3, 9, 9]])
    stats = cache.stats()
    assert (stats.num_pages, stats.free, stats.cached, stats.held, stats.shared) == (12, 8, 1, 3, 2)
    assert (stats.sequences, stats.tokens) == (3, 16)
    assert stats.fragmentation == pytest.approx(2 / 12)
    assert (stats.lookups, stats.hits, stats.hit_rate) == (6, 4, pytest.approx(4 / 6))
    assert stats.nbytes == cache.pool.nbytes == 4 * stats.held_bytes


def test_gather_is_what_was_written():
    cache = make_cache()
    cache.append(cache.create(2).seqs, *latents(cache, range(9)), num_tokens=[6, 3])
    rows = cache.gather([1, 0])
    np.testing.assert_array_equal(rows, token_rows([6, 7, 8, 0, 1, 2, 3, 4, 5], RANK + ROPE, np.float32))
    assert rows.flags.c_contiguous
    assert cache.gather([]).shape == (0, 24)


def test_nothing_to_append():
    cache = make_cache()
    ckv, kpe = latents(cache, [])
    before = snapshot(cache)
    assert cache.append([], ckv.reshape(0, 1, RANK), kpe.reshape(0, 1, ROPE)).where.shape == (2, 0)
    assert cache.append([], ckv, kpe, num_tokens=[]).where.shape == (2, 0)
    cache.write(cache.extend([], 3), ckv, kpe)
    seqs = cache.create(2).seqs
    assert cache.append(seqs, ckv.reshape(2, 0, RANK), kpe.reshape(2, 0, ROPE)).where.shape == (2, 0)
    assert cache.append(seqs, ckv, kpe, num_tokens=0).where.shape == (2, 0)
    assert cache.append([], ckv.reshape(0, 3, RANK), kpe.reshape(0, 3, ROPE)).where.shape == (2, 0)
    assert cache.append(seqs, np.zeros((0, 2 * RANK), np.float32)[:, ::2], kpe, num_tokens=[0, 0]).where.shape == (2, 0)
    cache.free(seqs)
    cache.free([])
    table, lengths = cache.batch([])
    assert table.shape == (0, 1)
    assert lengths.shape == (0,)
    assert snapshot(cache) == before


def test_strided_inputs_as_projections_produce_them():
    cache = make_cache()
    seqs = cache.create(3).seqs
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
    cache.write(NewTokens(np.array([[-1, 5, -5, 12 * 4], [0] * 4]), None), ckv, kpe)
    np.testing.assert_array_equal(cache.pool[1, 1, 0], np.concatenate([ckv[1], kpe[1]]))
    cache.pool[1, 1] = -1
    np.testing.assert_array_equal(cache.pool, before)


def test_pages_are_reused_and_rows_too():
    cache = make_cache(num_pages=4, max_seqs=2)
    for round_ in range(5):
        seqs = cache.create(2).seqs
        assert seqs.tolist() == [0, 1]
        tokens = range(100 * round_, 100 * round_ + 15)
        cache.append(seqs, *latents(cache, tokens), num_tokens=[8, 7])
        assert cache.num_free_pages == 0
        cache.check_integrity()
        cache.free(seqs[::-1])
        assert cache.num_free_pages == 4


def test_batch_keeps_the_order_and_is_as_wide_as_needed():
    cache = make_cache()
    seqs = cache.create(4).seqs
    cache.extend(seqs, [1, 9, 0, 4])
    table, lengths = cache.batch([3, 1])
    assert lengths.tolist() == [4, 9]
    assert (table.dtype, lengths.dtype) == (np.int32, np.int32)
    assert table.shape == (2, 3)
    np.testing.assert_array_equal(table, cache.block_table[[3, 1], :3])
    cache.extend([3], 1)
    assert lengths.tolist() == [4, 9]  # a copy
    assert cache.batch([2])[0].shape == (1, 1)  # a sequence without pages still has a column


def test_the_same_sequences_are_checked_again_once_some_have_gone():
    cache = make_cache()
    seqs = cache.create(2, num_tokens=3).seqs
    cache.extend(seqs, 1)
    cache.extend(seqs, 1)
    cache.free([1])
    with pytest.raises(ValueError, match="seqs: got 1 at 1, expected a live sequence"):
        cache.extend(seqs, 1)
    cache.create(1)
    cache.extend(seqs, 1)
    assert cache.seq_lens[:2].tolist() == [6, 1]
    seqs[1] = 0
    with pytest.raises(ValueError, match="seqs: got 0 2 times"):
        cache.extend(seqs, 1)
    with pytest.raises(ValueError, match=r"seqs: got shape \(1, 2\)"):
        cache.extend(seqs[None], 1)


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
    a = plain.create(2).seqs
    plain.append(a, ckv, kpe, num_tokens=[100, 50])
    first, *b = shuffled.create(3).seqs
    shuffled.append([first, *b], ckv[:140], kpe[:140], num_tokens=[60, 40, 40])
    shuffled.free([first])
    shuffled.free(b)
    b = shuffled.create(3).seqs[[2, 0]]
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
        cache.append(cache.create(1).seqs, np.zeros((1, 3, 512), np.float16), np.zeros((1, 3, 64), np.float16))
        cache.check_integrity()
        assert {"cupy", "numba", "torch", "cuda"}.isdisjoint(sys.modules), sorted(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
