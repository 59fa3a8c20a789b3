"""Pages that are found again by the ids of their tokens: what is shared, for how long, what a key must tell apart."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from cache_model import contents, latents, make_cache, token_rows

from mlacore.cache import PagedKVCache
from mlacore.page_pool import DIGEST_BYTES, PagePool, prefix_keys


def written(cache: PagedKVCache, ids: list[int]) -> int:
    """A published sequence of these tokens, whose rows are numbered by id."""
    seqs, num_cached, tokens = cache.create(1, num_tokens=len(ids), prefix=[ids])
    cache.write(tokens, *latents(cache, ids[int(num_cached[0]) :]))
    cache.publish(int(seqs[0]), ids)
    return int(seqs[0])


def test_full_pages_are_shared_and_the_rest_is_not():
    cache = make_cache()
    first = written(cache, list(range(10)))
    seqs, num_cached, tokens = cache.create(2, num_tokens=[10, 6], prefix=[range(10), [0, 1, 2, 3, 9, 9]])
    assert num_cached.tolist() == [8, 4]
    assert tokens.positions.tolist() == [8, 9, 4, 5]
    assert cache.block_table[seqs, :2].tolist() == [[0, 1], [0, 4]]
    cache.write(tokens, *latents(cache, [8, 9, 9, 9]))
    np.testing.assert_array_equal(contents(cache, seqs[0]), contents(cache, first))
    np.testing.assert_array_equal(contents(cache, seqs[1]), token_rows([0, 1, 2, 3, 9, 9], 24, np.float32))
    cache.check_integrity()


def test_without_num_tokens_a_sequence_begins_with_what_was_found():
    cache = make_cache()
    written(cache, list(range(10)))
    seqs, num_cached, tokens = cache.create(1, prefix=[list(range(9))])
    assert (cache.seq_lens[seqs].tolist(), num_cached.tolist(), len(tokens)) == ([8], [8], 0)
    cache.append(seqs, *latents(cache, [8]), num_tokens=1)
    np.testing.assert_array_equal(contents(cache, seqs[0]), token_rows(range(9), 24, np.float32))


def test_nothing_is_found_before_it_is_published():
    cache = make_cache()
    cache.create(1, num_tokens=8, prefix=[range(8)])
    assert cache.create(1, prefix=[range(8)]).num_cached.tolist() == [0]
    assert cache.stats().hit_rate == 0


def test_the_same_page_after_other_tokens_is_another_page():
    cache = make_cache()
    written(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    assert cache.create(1, prefix=[[9, 9, 9, 9, 5, 6, 7, 8]]).num_cached.tolist() == [0]
    assert cache.create(1, prefix=[[5, 6, 7, 8]]).num_cached.tolist() == [0]


def test_freed_pages_stay_findable_until_reused_oldest_first():
    cache = make_cache(num_pages=6)
    old, new = written(cache, [1] * 8), written(cache, [2] * 8)
    cache.free([old])
    cache.free([new])
    stats = cache.stats()
    assert (stats.free, stats.cached, stats.held) == (2, 4, 0)
    (seq,) = cache.create(1, prefix=[[1] * 4]).seqs  # used again: now the most recent but for its tail
    cache.free([seq])
    (seq,) = cache.create(1, num_tokens=12).seqs  # two free pages, then the oldest: the end of the first sequence
    assert cache.create(1, prefix=[[2] * 8]).num_cached.tolist() == [8]
    assert cache.create(1, prefix=[[1] * 8]).num_cached.tolist() == [4]
    cache.check_integrity()


def test_what_is_found_is_not_claimed_for_the_same_prompt():
    cache = make_cache(num_pages=4)
    cache.free([written(cache, list(range(16)))])
    seqs, num_cached, _ = cache.create(1, num_tokens=16, prefix=[[0, 1, 2, 3, 4, 5, 6, 7, 9, 9]])
    assert num_cached.tolist() == [8]
    assert sorted(cache.block_table[seqs[0]].tolist()) == [0, 1, 2, 3]
    np.testing.assert_array_equal(contents(cache, seqs[0])[:8], token_rows(range(8), 24, np.float32))


def test_a_page_that_is_written_again_is_forgotten():
    cache = make_cache()
    seq = written(cache, list(range(8)))
    cache.truncate([seq], 6)
    assert cache.create(1, prefix=[range(8)]).num_cached.tolist() == [8]  # still as it was
    cache.free([1])
    cache.append([seq], *latents(cache, [77]), num_tokens=1)
    assert cache.create(1, prefix=[range(8)]).num_cached.tolist() == [4]
    cache.check_integrity()


def test_a_shared_page_is_copied_before_it_is_written_again():
    cache = make_cache()
    seq = written(cache, list(range(8)))
    (other,) = cache.create(1, prefix=[range(8)]).seqs
    cache.truncate([seq], 6)
    cache.append([seq], *latents(cache, [77]), num_tokens=1)
    np.testing.assert_array_equal(contents(cache, other), token_rows(range(8), 24, np.float32))
    np.testing.assert_array_equal(contents(cache, seq), token_rows([0, 1, 2, 3, 4, 5, 77], 24, np.float32))
    cache.reserve([other], 3)
    assert cache.create(1, prefix=[range(8)]).num_cached.tolist() == [8]


def test_generated_tokens_are_published_as_pages_fill():
    cache = make_cache()
    ids = list(range(6))
    seq = written(cache, ids)
    for token in range(6, 13):
        cache.append([seq], *latents(cache, [token]), num_tokens=1)
        ids.append(token)
        cache.publish(seq, ids)
        assert cache.create(1, prefix=[ids]).num_cached.tolist() == [len(ids) // 4 * 4]
        cache.free([1])


def test_two_sequences_of_the_same_tokens_share_from_the_third_on():
    cache = make_cache()
    first, second = cache.create(2, num_tokens=[8, 8]).seqs
    cache.publish(int(first), range(8))
    cache.publish(int(second), range(8))  # its pages are not needed
    (third,) = cache.create(1, prefix=[range(8)]).seqs
    assert cache.block_table[third, :2].tolist() == cache.block_table[first, :2].tolist()
    cache.free([second])
    assert cache.stats().cached == 0


def test_keys_tell_all_tokens_apart_and_stay_the_same_in_other_processes():
    ids = np.arange(64)
    keys = list(prefix_keys(ids, 16))
    assert [len(key) for key in keys] == [DIGEST_BYTES] * 4
    for changed in range(64):
        other = ids.copy()
        other[changed] += 1
        differs = [a != b for a, b in zip(keys, prefix_keys(other, 16), strict=True)]
        assert differs == [page >= changed // 16 for page in range(4)]
    assert list(prefix_keys(ids.astype(np.int32), 16)) == keys
    assert list(prefix_keys(ids[::-1][::-1], 16)) == keys
    assert next(prefix_keys(ids, 32)) not in keys
    assert list(prefix_keys(ids[:15], 16)) == []
    code = "import numpy, mlacore.page_pool as p; print(next(p.prefix_keys(numpy.arange(16), 16)).hex())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == keys[0].hex()


def test_pages_that_all_holders_release_at_once_are_free_once():
    pool = PagePool(4)
    pages = pool.next_pages(2).copy()
    pool.claim(pages)
    pool.share(pages)
    pool.release(np.concatenate([pages, pages]))
    assert pool.num_free == 4
    pool.check_integrity(np.zeros(4, np.int32))
