"""Rows on their way into the cache: RMSNorm and RoPE, against plain float64; in NumPy, in the CUDA kernel built for the
host, and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cache_model import latents, make_cache, on_host, snapshot
from pretended_gpu import pretend_gpu, pretend_numba

from mlacore import arrays
from mlacore.cache import PagedKVCache

LENGTHS = [5, 0, 7]
TOKENS = sum(LENGTHS)
POSITIONS = np.concatenate([np.arange(length) for length in LENGTHS])


def inputs(dtype: np.dtype, rank: int = 512, rope: int = 64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    angles = np.arange(20)[:, None] * 10.0 ** -np.linspace(0, 3, rope // 2)
    return {
        "fused": rng.standard_normal((TOKENS, rank + rope + 16), np.float32).astype(dtype),  # as a projection gives it
        "norm_weight": rng.standard_normal(rank, np.float32).astype(dtype),
        "rope_cos": (1.2 * np.cos(angles)).astype(np.float32),  # YaRN scales both
        "rope_sin": (1.2 * np.sin(angles)).astype(np.float32),
    }


def exact(given: dict[str, np.ndarray], rank: int, rope: int, norm: bool, pairs: str | None) -> np.ndarray:
    """The definition, in float64."""
    rows = given["fused"].astype(np.float64)
    ckv, kpe = rows[:, :rank], rows[:, rank : rank + rope]
    if norm:
        ckv = ckv / np.sqrt(np.mean(ckv**2, axis=1, keepdims=True) + 1e-5) * given["norm_weight"].astype(np.float64)
    if pairs:
        cos, sin = (given[name][POSITIONS].astype(np.float64) for name in ("rope_cos", "rope_sin"))
        rotation = cos + 1j * sin
        if pairs == "interleaved":
            turned = (kpe[:, 0::2] + 1j * kpe[:, 1::2]) * rotation
            kpe = np.stack([turned.real, turned.imag], axis=-1).reshape(kpe.shape)
        else:
            turned = (kpe[:, : rope // 2] + 1j * kpe[:, rope // 2 :]) * rotation
            kpe = np.concatenate([turned.real, turned.imag], axis=1)
    return np.concatenate([ckv, kpe], axis=1)


def written(cache: PagedKVCache, given: dict[str, Any], norm: bool, pairs: str | None) -> np.ndarray:
    """What the cache holds of them, in float64, gathered and read directly."""
    rank, rope = cache.kv_lora_rank, cache.qk_rope_head_dim
    options: dict[str, Any] = {}
    if norm:
        options |= {"norm_weight": given["norm_weight"], "norm_eps": 1e-5}
    if pairs:
        options |= {"rope_cos": given["rope_cos"], "rope_sin": given["rope_sin"]}
        options["rope_interleaved"] = pairs == "interleaved"
    seqs = cache.create(3).seqs
    tokens = cache.extend(seqs, LENGTHS)
    cache.write(tokens, given["fused"][:, :rank], given["fused"][:, rank : rank + rope], **options)
    return on_host(cache.gather(seqs)).astype(np.float64)


def assert_rounded_once(got: np.ndarray, expected: np.ndarray, dtype: np.dtype, exactly: bool) -> None:
    if exactly:
        np.testing.assert_array_equal(got, expected)
    else:
        import ml_dtypes

        # Half a unit in the last place, and float32's own error on top where values cancel.
        eps = float(ml_dtypes.finfo(dtype).eps)
        np.testing.assert_allclose(got, expected, rtol=0.5 * eps * 1.01, atol=2e-6)


CASES = pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
PAIRS = pytest.mark.parametrize("pairs", [None, "interleaved", "half-split"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@CASES
@PAIRS
def test_numpy(dtype, norm, pairs):
    cache = make_cache(dtype=dtype)
    given = inputs(cache.dtype, cache.kv_lora_rank, cache.qk_rope_head_dim)
    expected = exact(given, cache.kv_lora_rank, cache.qk_rope_head_dim, norm, pairs)
    got = written(cache, given, norm, pairs)
    assert_rounded_once(got[:, :16], expected[:, :16], cache.dtype, not norm)
    assert_rounded_once(got[:, 16:], expected[:, 16:], cache.dtype, not pairs)


@CASES
@PAIRS
def test_kernel_on_the_host(monkeypatch, norm, pairs):
    pretend_numba(monkeypatch)
    pretend_gpu(monkeypatch)
    cache = PagedKVCache(8, 16, max_seqs=4, dtype="bfloat16", num_layers=1, interleaved=True)
    given = inputs(cache.dtype)
    got = written(cache, {name: arrays.import_cupy().asarray(array) for name, array in given.items()}, norm, pairs)
    expected = exact(given, 512, 64, norm, pairs)
    assert_rounded_once(got[:, :512], expected[:, :512], cache.dtype, not norm)
    assert_rounded_once(got[:, 512:], expected[:, 512:], cache.dtype, not pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@CASES
@PAIRS
def test_gpu(dtype, page_size, norm, pairs):
    import cupy

    cache = PagedKVCache(8, page_size, max_seqs=4, dtype=dtype, num_layers=2, interleaved=True, device="cuda")
    given = inputs(cache.dtype)
    on_device = {
        name: cupy.asarray(array.view(np.uint16)).view(cache.dtype)
        if array.dtype == cache.dtype
        else cupy.asarray(array)
        for name, array in given.items()
    }
    got = written(cache, on_device, norm, pairs)
    expected = exact(given, 512, 64, norm, pairs)
    assert_rounded_once(got[:, :512], expected[:, :512], cache.dtype, not norm)
    assert_rounded_once(got[:, 512:], expected[:, 512:], cache.dtype, not pairs)


def check_past_the_tables(cache: PagedKVCache, module: Any) -> None:
    """Where only the device knows a position, one past the tables is loud, and stays within its row."""
    seqs = cache.create(1, num_tokens=3).seqs
    cache.reserve(seqs, 3)
    step = cache.step_tokens(1)
    ones = [module.asarray(np.ones((1, width), np.uint16)).view(cache.dtype) for width in (512, 64)]
    table = module.asarray(np.ones((4, 32), np.float32))
    for _ in range(3):
        cache.advance(step)
        cache.write(step, *ones, rope_cos=table, rope_sin=table)
    cache.advanced(step, 3)
    rows = on_host(cache.gather(seqs)).astype(np.float32)
    assert np.isfinite(rows[3]).all()
    assert np.isnan(rows[4:, 512:]).all()
    assert np.isfinite(rows[3:, :512]).all()


def test_positions_past_the_tables(monkeypatch):
    check_past_the_tables(PagedKVCache(2, 16, max_seqs=2, device="cpu"), np)
    pretend_numba(monkeypatch)
    pretend_gpu(monkeypatch)
    check_past_the_tables(PagedKVCache(2, 16, max_seqs=2, device="cuda"), arrays.import_cupy())


@pytest.mark.gpu
def test_positions_past_the_tables_on_gpu():
    import cupy

    check_past_the_tables(PagedKVCache(2, 64, max_seqs=2, device="cuda"), cupy)


def test_tables_need_reach_no_further_than_the_new_tokens():
    cache = PagedKVCache(8, page_size=16, max_seqs=2, dtype="float32", device="cpu")
    seqs = cache.create(2, num_tokens=[40, 0]).seqs
    ckv, kpe = latents(cache, range(1))
    cos = np.ones((8, cache.qk_rope_head_dim // 2), np.float32)  # fewer positions than the longest sequence has
    cache.append(seqs, ckv, kpe, num_tokens=[0, 1], rope_cos=cos, rope_sin=0 * cos)
    assert cache.seq_lens[seqs].tolist() == [40, 1]
    np.testing.assert_array_equal(cache.gather(seqs[1:])[:, cache.kv_lora_rank :], kpe)


def test_rows_that_cannot_be_laid_out_change_nothing(monkeypatch):
    cache = PagedKVCache(8, page_size=16, max_seqs=2, dtype="float32", device="cpu")
    seqs = cache.create(1, num_tokens=3).seqs
    before = snapshot(cache)

    def fail(ckv, kpe):
        raise MemoryError("no room for a copy")

    monkeypatch.setattr(cache._store, "as_rows", fail)
    with pytest.raises(MemoryError):
        cache.append(seqs, *latents(cache, range(1)), num_tokens=1)
    assert snapshot(cache) == before
