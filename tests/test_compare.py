"""The comparator must be able to fail, and the case lists must be what they claim."""

from __future__ import annotations

import numpy as np
import pytest
from cases import CORNERS, GRID, HEAD_DIM, PERF, POISON_PAGE, TINY, Case, interleave, make_inputs, permute_pages, thin
from compare import LSE_RULE, OUT_RULE, OUT_RULES, Rule, assert_close, compare

from mlacore.arrays import bfloat16

RULE = Rule(abs_tol=1e-3, rel_tol=1e-2, cos_tol=1e-4)


def reference() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 5, 6))


def check(out: np.ndarray, ref: np.ndarray):
    return compare(out, ref, RULE.abs_tol, RULE.rel_tol, RULE.cos_tol)


def test_equal_is_close() -> None:
    report = check(reference(), reference())
    assert report.is_close
    assert (report.max_abs, report.max_rel, report.cosine, report.num_bad) == (0, 0, pytest.approx(0), 0)


def test_either_bound_is_enough() -> None:
    assert check(np.array([1e-4, 100.5, 0.0]), np.array([5e-4, 100.0, 0.0])).is_close


def test_worst_element_is_named() -> None:
    out = reference()
    out[1, 2, 3] += 0.5
    out[0, 0, 0] += 0.02
    report = check(out, reference())
    assert not report.is_close
    assert report.worst_index == (1, 2, 3)
    assert report.max_abs == pytest.approx(0.5)
    assert report.worst_got == out[1, 2, 3]
    assert "(1, 2, 3)" in str(report)
    with pytest.raises(AssertionError, match=r"^lse: elements differ: .*worst at \(1, 2, 3\)"):
        assert_close(out, reference(), RULE, "lse")


def test_bias_within_every_bound_still_fails() -> None:
    """Each element passes by its absolute error, but nothing of the signal is left."""
    ref = reference() * 1e-4
    report = check(-ref, ref)
    assert (report.num_bad, report.reason) == (0, "direction differs")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_must_agree(value: float) -> None:
    ref, out = reference(), reference()
    ref[3, 1, 2] = value
    assert check(out, ref).reason == "non-finite values differ"
    assert check(ref, out).reason == "non-finite values differ"
    assert check(out, ref).worst_index == (3, 1, 2)
    assert check(ref, ref).is_close
    out[3, 1, 2] = np.inf if value != np.inf else -np.inf
    assert not check(out, ref).is_close


def test_all_empty_rows() -> None:
    empty = np.full((2, 3), -np.inf)
    assert check(empty, empty).is_close
    assert check(np.zeros(3), np.zeros(3)).is_close


def test_beyond_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors, sums and indices carry over from chunk to chunk."""
    out = reference()
    out[3, 4, 5] += 0.5
    out[0, 0, 1] *= 1.02
    whole = check(out, reference())
    monkeypatch.setattr("compare.CHUNK_ELEMS", 7)
    parts = check(out, reference())
    assert (parts.worst_index, parts.num_bad, parts.max_abs) == ((3, 4, 5), 2, whole.max_abs)
    assert parts.cosine == pytest.approx(whole.cosine)
    assert parts.relative_l2 == pytest.approx(whole.relative_l2)
    out[2, 0, 0] = np.nan
    assert (check(out, reference()).worst_index, check(out, reference()).num_bad) == ((2, 0, 0), 1)


def test_shapes_must_agree() -> None:
    assert "shape" in check(np.zeros((2, 3)), np.zeros((3, 2))).reason


def test_bfloat16_rounding_passes_and_one_bit_more_does_not() -> None:
    ref = np.random.default_rng(0).standard_normal(4096)
    assert_close(ref.astype(bfloat16), ref, OUT_RULE)
    assert_close(ref.astype(np.float16), ref, OUT_RULES["float16"])
    assert_close(ref.astype(np.float32), ref, OUT_RULES["float32"])
    with pytest.raises(AssertionError):
        assert_close(ref * (1 + 2**-5), ref, OUT_RULE)
    with pytest.raises(AssertionError):
        assert_close(ref.astype(bfloat16), ref, OUT_RULES["float16"])
    with pytest.raises(AssertionError):
        assert_close(ref * (1 + 2**-11), ref, LSE_RULE)


def test_case_lists() -> None:
    assert len(GRID) == 2304
    everything = [*TINY, *GRID, *CORNERS, *PERF]
    assert len({case.id for case in everything}) == len(everything)
    assert {case.kind for case in PERF} == {"compute", "tp", "few", "latency", "long", "mtp", "sweep"}
    assert thin(GRID, 0.1) == thin(GRID, 0.1)
    assert thin(GRID, 1e9) == GRID


def test_varlen_is_pythons_generator() -> None:
    """Lengths are part of what published timings mean: they must never change."""
    assert Case(4, 2, 4096, 128, varlen=True).draw_lengths() == [3719, 4162, 5527, 3898]
    assert (
        Case(2, 1, 4096, 128, varlen=True, seed=1).draw_lengths() != Case(2, 1, 4096, 128, varlen=True).draw_lengths()
    )
    mixed = Case(200, 1, 100_000, 16, shortest=100).draw_lengths()
    assert mixed[:4] == Case(4, 1, 100_000, 128, shortest=100).draw_lengths()
    assert 100 <= min(mixed) < 200
    assert 50_000 < max(mixed) <= 100_000
    assert 80 < sum(length > 3162 for length in mixed) < 120  # half of them on either side of the geometric mean
    zeros = Case(128, 2, 4096, 16, zero_fraction=0.5).draw_lengths()
    assert 40 < zeros.count(0) < 88


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_inputs_are_poisoned(dtype: str) -> None:
    case = Case(4, 2, 200, 3, 3, lengths=(200, 64, 0, 1), dtype=dtype)
    q, kv_cache, block_table, cache_seqlens = make_inputs(case)
    assert (q.shape, q.dtype.name, kv_cache.dtype.name) == ((4, 2, 3, HEAD_DIM), dtype, dtype)
    assert cache_seqlens.tolist() == [200, 64, 0, 1]
    holds_token = np.zeros(kv_cache.shape[:2], bool)
    for row, length in zip(block_table, case.lengths, strict=True):
        assert (row[-(-length // 64) :] == POISON_PAGE).all()
        for t in range(length):
            assert not holds_token[row[t // 64], t % 64], "a slot with two tokens"
            holds_token[row[t // 64], t % 64] = True
    is_nan = np.isnan(kv_cache.astype(np.float32))
    assert is_nan[~holds_token].all()
    assert not is_nan[holds_token].any()
    tokens = kv_cache[holds_token].astype(np.float32)
    assert 0.09 < tokens.std() < 0.11
    assert len(np.unique(tokens[:, :, 0])) > 0.3 * tokens[:, :, 0].size, "tokens must tell positions apart"
    assert not np.isnan(q.astype(np.float32)).any()


def test_views_hold_the_same_tokens() -> None:
    inputs = make_inputs(Case(3, 1, 150, 4))
    moved = permute_pages(inputs)
    assert (moved.block_table[:, :3] != inputs.block_table[:, :3]).any()
    for a, b in zip(moved.block_table[:, :2].ravel(), inputs.block_table[:, :2].ravel(), strict=True):
        assert moved.kv_cache[a].tobytes() == inputs.kv_cache[b].tobytes()
    layer = interleave(inputs.kv_cache)
    assert layer.strides[0] == 3 * inputs.kv_cache.strides[0]
    assert layer.tobytes() == inputs.kv_cache.tobytes()
