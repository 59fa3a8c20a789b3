"""The oracle against a computation that shares nothing with it: one row, one token at a time, in Python numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cases import CORNERS, GRID, Case, Inputs, cost, make_inputs, thin
from compare import Rule, assert_close

from mlacore import mla_decode_reference

EXACT = Rule(abs_tol=1e-12, rel_tol=1e-12, cos_tol=1e-12)


def naive_row(inputs: Inputs, b: int, i: int, h: int, causal: bool, scale: float) -> tuple[list[float], float]:
    """Output and lse of one query row."""
    _, page_size, num_kv_heads, _ = inputs.kv_cache.shape
    _, seq_len_q, num_heads, _ = inputs.q.shape
    kv_head = h * num_kv_heads // num_heads
    visible = int(inputs.cache_seqlens[b]) - (seq_len_q - 1 - i if causal else 0)
    row = [float(x) for x in inputs.q[b, i, h]]
    tokens, weights = [], []
    for t in range(visible):
        page = inputs.block_table[b, t // page_size]
        token = [float(x) for x in inputs.kv_cache[page, t % page_size, kv_head]]
        tokens.append(token)
        weights.append(math.exp(scale * math.fsum(x * y for x, y in zip(row, token, strict=True))))
    total = math.fsum(weights)
    if total == 0:
        return [0.0] * 512, -math.inf
    columns = zip(*tokens, strict=True)
    mean = [
        math.fsum(w * v for w, v in zip(weights, c, strict=True)) / total
        for c, _ in zip(columns, range(512), strict=False)
    ]
    return mean, math.log(total)


@pytest.mark.parametrize(
    "case",
    [
        *(c for c in thin(GRID, 2e-3) if c.seq_len_k == 20 and c.num_heads <= 9),
        *(c for c in CORNERS if cost(c) < 3e-3),
        Case(1, 2, 150, 3, 3, causal=True, dtype="float32"),
        Case(2, 1, 80, 2, dtype="float16", varlen=True),
    ],
    ids=lambda case: case.id,
)
def test_against_single_rows(case: Case) -> None:
    inputs = make_inputs(case)
    out, lse = mla_decode_reference(*inputs, causal=case.causal)
    assert out.shape == (case.batch, case.seq_len_q, case.num_heads, 512)
    assert lse.shape == (case.batch, case.num_heads, case.seq_len_q)
    assert out.dtype == lse.dtype == np.float64
    rng = np.random.default_rng(case.num_heads)
    for b in {0, case.batch - 1}:
        for i in {0, case.seq_len_q - 1}:
            for h in {0, case.num_heads - 1, int(rng.integers(case.num_heads))}:
                row, row_lse = naive_row(inputs, b, i, h, case.causal, 576**-0.5)
                assert_close(out[b, i, h], row, EXACT, f"out[{b}, {i}, {h}]")
                assert_close(lse[b, h, i], row_lse, EXACT, f"lse[{b}, {h}, {i}]")


def test_scale_and_head_dim_v() -> None:
    inputs = make_inputs(Case(1, 1, 70, 2, dtype="float32"))
    out, lse = mla_decode_reference(*inputs, head_dim_v=3, softmax_scale=2.5)
    row, row_lse = naive_row(inputs, 0, 0, 1, False, 2.5)
    assert out.shape == (1, 1, 2, 3)
    assert_close(out[0, 0, 1], row[:3], EXACT)
    assert_close(lse[0, 1, 0], row_lse, EXACT)


def test_other_page_sizes_and_widths() -> None:
    """The definition is not tied to what the kernels support: three ways to page the same tokens agree."""
    rng = np.random.default_rng(0)
    tokens, q = rng.standard_normal((48, 2, 24)), rng.standard_normal((1, 2, 4, 24))
    results = []
    for page_size in (1, 16, 48):
        pages = rng.permutation(48 // page_size)
        pool = np.empty((48 // page_size, page_size, 2, 24))
        pool[pages] = tokens.reshape(pool.shape)
        table = pages[None].astype(np.int32)
        results.append(mla_decode_reference(q, pool, table, np.array([45], np.int32), head_dim_v=8, causal=True))
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


def test_large_scores_do_not_overflow() -> None:
    inputs = make_inputs(Case(1, 1, 5, 1, dtype="float32"))
    out, lse = mla_decode_reference(*inputs, softmax_scale=1e6)
    keys = inputs.kv_cache[inputs.block_table[0, 0], :5, 0].astype(np.float64)
    scores = 1e6 * (keys @ inputs.q[0, 0, 0].astype(np.float64))
    np.testing.assert_allclose(out[0, 0, 0], keys[scores.argmax(), :512])
    assert lse[0, 0, 0] == pytest.approx(scores.max())


def test_negative_length_counts_as_zero() -> None:
    inputs = make_inputs(Case(2, 1, 5, 1, lengths=(0, 5)))
    out, lse = mla_decode_reference(*inputs._replace(cache_seqlens=np.array([-3, 5], np.int32)))
    assert not out[0].any()
    assert lse[0, 0, 0] == -np.inf
    assert np.isfinite(lse[1]).all()
