"""A cache parked in a file and resumed elsewhere."""

from __future__ import annotations

import io

import numpy as np
import pytest
from cache_model import contents, latents, make_cache
from pretended_gpu import pretend_gpu, pretend_numba

from mlacore import arrays
from mlacore.cache import PagedKVCache


@pytest.fixture
def busy() -> PagedKVCache:
    """Two layers; sequence 1 has a fork, sequence 0 is gone but findable, pages lie in no order."""
    cache = make_cache(num_layers=2, dtype="bfloat16")
    tokens = cache.create(3, num_tokens=[8, 6, 5]).tokens
    for layer in range(2):
        cache.write(tokens, *latents(cache, range(19), layer), layer=layer)
    cache.publish(0, range(8))
    cache.publish(1, range(10, 16))
    cache.fork([1])
    cache.free([0])
    cache.reserve([2], 3)
    return cache


def assert_same_contents(got: PagedKVCache, expected: PagedKVCache) -> None:
    np.testing.assert_array_equal(got.seq_lens, expected.seq_lens)
    for seq in np.flatnonzero(expected.seq_lens).tolist():
        for layer in range(len(expected.layers)):
            np.testing.assert_array_equal(contents(got, seq, layer), contents(expected, seq, layer))


def test_a_file_holds_all_that_counts(busy, tmp_path):
    busy.save(tmp_path / "cache")
    loaded = PagedKVCache.load(tmp_path / "cache.npz", device="cpu")
    assert_same_contents(loaded, busy)
    loaded.check_integrity()
    assert loaded.pool.shape == busy.pool.shape
    assert loaded.dtype == arrays.bfloat16
    before, after = busy.stats(), loaded.stats()
    assert (after.cached, after.shared, after.tokens) == (before.cached, before.shared, before.tokens) == (2, 2, 17)
    assert after.held == before.held  # sequence 2's reserved page is not kept, and its last page had room
    assert loaded.create(1, prefix=[range(8)]).num_cached.tolist() == [8]
    loaded.extend([1], 1)  # the page that is shared with the fork is copied
    np.testing.assert_array_equal(contents(loaded, 3), contents(busy, 3))
    assert not np.load(tmp_path / "cache.npz", allow_pickle=False)["pages"].dtype.hasobject


def test_a_smaller_pool_and_another_order(busy):
    file = io.BytesIO()
    busy.save(file)
    file.seek(0)
    loaded = PagedKVCache.load(file, device="cpu", num_pages=6, interleaved=True)
    assert loaded.pool.shape == (6, 2, 4, 1, 24)
    assert_same_contents(loaded, busy)
    loaded.check_integrity()
    file.seek(0)
    with pytest.raises(ValueError, match=r"num_pages: got 5, expected at least 6 \(with content\)"):
        PagedKVCache.load(file, device="cpu", num_pages=5)


def test_host_memory_instead_of_a_file(busy):
    arrays_ = busy.to_numpy()
    assert all(type(array) is np.ndarray for array in arrays_.values())
    loaded = PagedKVCache.load(arrays_, device="cpu")
    assert_same_contents(loaded, busy)
    busy.extend([1], 1)
    busy.pool[...] = 0  # nothing is shared with the cache it came from
    assert_same_contents(PagedKVCache.load(arrays_, device="cpu"), loaded)


def test_an_empty_cache():
    file = io.BytesIO()
    make_cache().save(file)
    file.seek(0)
    loaded = PagedKVCache.load(file, device="cpu")
    assert loaded.stats().free == 12
    loaded.check_integrity()


def test_another_file_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"source: got a without a config, expected what PagedKVCache\.save wrote"):
        PagedKVCache.load(tmp_path / "other.npz")
    np.savez(tmp_path / "later.npz", config=np.array('{"format": 2}'))
    with pytest.raises(ValueError, match="got another format, expected format 1"):
        PagedKVCache.load(tmp_path / "later.npz")


def check_moving_between_devices() -> None:
    cache = PagedKVCache(8, max_seqs=3, num_layers=2, interleaved=True, device="cuda")
    _, _, tokens = cache.create(2, num_tokens=[100, 64])
    for layer in range(2):
        cache.write(tokens, *latents(cache, range(164), layer), layer=layer)
    file = io.BytesIO()
    cache.save(file)
    file.seek(0)
    on_cpu = PagedKVCache.load(file, device="cpu")
    assert on_cpu.device is None
    assert_same_contents(on_cpu, cache)
    file.seek(0)
    back = PagedKVCache.load(file, device="cuda", num_pages=3)
    assert_same_contents(back, cache)
    back.check_integrity()


def test_between_a_pretended_gpu_and_the_cpu(monkeypatch):
    pretend_numba(monkeypatch)
    pretend_gpu(monkeypatch)
    check_moving_between_devices()


@pytest.mark.gpu
def test_between_gpu_and_cpu():
    check_moving_between_devices()


def test_a_file_that_contradicts_itself_is_refused():
    cache = PagedKVCache(6, page_size=16, max_seqs=3, dtype="float16", device="cpu")
    seqs = cache.create(2, num_tokens=[20, 5]).seqs
    assert len(seqs) == 2
    good = cache.to_numpy()
    for name, change in {"block_table": [0, 0, 1], "seqs": [0, 7], "num_pages": [2, 2]}.items():
        bad = good | {name: np.array(change, good[name].dtype)}
        with pytest.raises(ValueError, match="source: got tables that contradict themselves"):
            PagedKVCache.load(bad)
    assert PagedKVCache.load(good).seq_lens[seqs].tolist() == [20, 5]
