"""The NumPy backend of `mla_decode` against the oracle, and the properties that hold bit by bit."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cases import CORNERS, GRID, TINY, Case, Inputs, cost, interleave, make_inputs, permute_pages, repaged, thin
from compare import LSE_RULE, OUT_RULES, assert_close

from mlacore import cpu, merge_states, mla_decode, mla_decode_reference, plan_decode
from mlacore.arrays import as_dtype

CORNERS_CPU = thin(CORNERS, 2.5)
CHEAP_CORNERS = [case for case in CORNERS if cost(case) < 0.05]
DTYPES = ["bfloat16", "float16", "float32"]


def by_id(case: Case) -> str:
    return case.id


def run(case: Case, inputs: Inputs | None = None, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """`mla_decode` with a plan and poisoned output buffers."""
    inputs = make_inputs(case) if inputs is None else inputs
    plan = plan_decode(
        inputs.cache_seqlens,
        num_heads=case.num_heads,
        seq_len_q=case.seq_len_q,
        num_kv_heads=case.num_kv_heads,
        causal=case.causal,
        num_workers=case.num_workers,
    )
    out = np.full((case.batch, case.seq_len_q, case.num_heads, 512), np.nan, inputs.q.dtype)
    lse = np.full((case.batch, case.num_heads, case.seq_len_q), np.nan, np.float32)
    mla_decode(*inputs, plan=plan, causal=case.causal, out=out, lse=lse, **options)
    return out, lse


def check(case: Case, inputs: Inputs | None = None, **options: Any) -> None:
    """Run and compare with the oracle under the rule of the case's dtype."""
    inputs = make_inputs(case) if inputs is None else inputs
    out, lse = run(case, inputs, **options)
    expected_out, expected_lse = mla_decode_reference(*inputs, causal=case.causal, **options)
    assert_close(out, expected_out, OUT_RULES[case.dtype], "out")
    assert_close(lse, expected_lse, LSE_RULE, "lse")


def assert_same_bits(got: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    for name, a, b in zip(("out", "lse"), got, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert a.tobytes() == b.tobytes(), name


@pytest.mark.parametrize("case", thin(GRID, 0.06), ids=by_id)
def test_grid(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("page_size", [16, 32, 128, 256])
@pytest.mark.parametrize("case", TINY, ids=by_id)
def test_page_sizes_give_the_same_bits(case: Case, page_size: int) -> None:
    inputs = make_inputs(case)
    in_pages = repaged(inputs, page_size)
    assert_same_bits(run(case, in_pages), run(case, inputs))
    check(case, in_pages)


@pytest.mark.parametrize("case", [dataclasses.replace(c, dtype=dtype) for dtype in DTYPES for c in TINY], ids=by_id)
def test_tiny(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [*CORNERS_CPU, *(dataclasses.replace(c, dtype=dtype) for dtype in DTYPES[1:] for c in CHEAP_CORNERS)],
    ids=by_id,
)
def test_corners(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 0.135, 3.0, 10.0])
def test_softmax_scale(scale: float) -> None:
    """From uniform weights to one-hot ones; float32, as the scale magnifies the rounding of the scores."""
    check(Case(2, 2, 200, 16, varlen=True, causal=True, dtype="float32"), softmax_scale=scale)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 8, 40])
def test_any_number_of_splits(num_workers: int) -> None:
    check(Case(3, 2, 700, 16, causal=True, lengths=(700, 3, 65), num_workers=num_workers))


def test_workers_cover_more_than_one_chunk() -> None:
    """Item ranges that neither begin nor end on a chunk of `cpu.CHUNK_TOKENS`."""
    assert cpu.CHUNK_TOKENS < 1000
    check(Case(2, 1, 2100, 16, lengths=(2100, 1999), num_workers=3))


@pytest.mark.parametrize("case", CHEAP_CORNERS + TINY, ids=by_id)
def test_same_bits_twice(case: Case) -> None:
    assert_same_bits(run(case), run(case))


def test_same_bits_whatever_the_threads_do() -> None:
    """Many workers on few threads finish in any order; the merge must not notice."""
    case = Case(3, 1, 3000, 16, num_workers=13)
    first = run(case)
    for _ in range(10):
        assert_same_bits(run(case), first)


def test_batch_invariant_bits_do_not_depend_on_neighbours() -> None:
    lengths = (3000, 64, 0, 1500, 10)
    case = Case(5, 2, max(lengths), 16, causal=True, lengths=lengths)
    inputs = make_inputs(case)
    options: dict[str, Any] = {"num_heads": 16, "seq_len_q": 2, "causal": True, "max_seq_len": 4000}

    def attend(rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
        some = Inputs(inputs.q[rows], inputs.kv_cache, inputs.block_table[rows], inputs.cache_seqlens[rows])
        plan = plan_decode(some.cache_seqlens, **options, batch_invariant=True)
        return mla_decode(*some, plan=plan, causal=True)

    together = attend([0, 1, 2, 3, 4])
    expected = mla_decode_reference(*inputs, causal=True)
    assert_close(together[0], expected[0], OUT_RULES[case.dtype], "out")
    assert_close(together[1], expected[1], LSE_RULE, "lse")
    for rows in ([0], [3], [4, 3, 2, 1, 0], [0, 0, 3]):
        assert_same_bits(attend(rows), tuple(result[rows] for result in together))


@pytest.mark.parametrize("case", CHEAP_CORNERS + TINY, ids=by_id)
def test_page_order_is_bitwise_neutral(case: Case) -> None:
    inputs = make_inputs(case)
    assert_same_bits(run(case, permute_pages(inputs)), run(case, inputs))


@pytest.mark.parametrize("case", [c for c in TINY if c.batch > 1], ids=by_id)
def test_strides_are_bitwise_neutral(case: Case) -> None:
    """An interleaved layer of a pool, a slice of wider queries, and a slice of a wider table."""
    inputs = make_inputs(case)
    wide_q = np.full((*inputs.q.shape[:-1], 584), np.nan, inputs.q.dtype)
    wide_q[..., :576] = inputs.q
    wide_table = np.full((inputs.block_table.shape[0], 50), -1, np.int32)
    wide_table[:, : inputs.block_table.shape[1]] = inputs.block_table
    strided = Inputs(
        wide_q[..., :576],
        interleave(inputs.kv_cache),
        wide_table[:, : inputs.block_table.shape[1]],
        inputs.cache_seqlens,
    )
    assert not strided.kv_cache.flags.c_contiguous
    assert_same_bits(run(case, strided), run(case, inputs))


def test_heads_may_have_their_own_stride() -> None:
    """A pool stored head-major is a transposed view."""
    case = Case(2, 1, 150, 6, num_kv_heads=3)
    inputs = make_inputs(case)
    head_major = np.ascontiguousarray(inputs.kv_cache.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3)
    assert_same_bits(run(case, inputs._replace(kv_cache=head_major)), run(case, inputs))


def test_buffers() -> None:
    case = Case(2, 2, 100, 16)
    inputs = make_inputs(case)
    out, lse = mla_decode(*inputs)
    assert out.shape == (2, 2, 16, 512)
    assert lse.shape == (2, 16, 2)
    assert (out.dtype, lse.dtype) == (as_dtype("bfloat16"), np.float32)
    own_out, own_lse = np.full_like(out, np.nan), np.full_like(lse, np.nan)
    got_out, got_lse = mla_decode(*inputs, out=own_out, lse=own_lse)
    assert got_out is own_out
    assert got_lse is own_lse
    assert_same_bits((own_out, own_lse), (out, lse))
    got_out, got_lse = mla_decode(*inputs, lse=own_lse)
    assert got_out is not own_out
    assert got_lse is own_lse


def test_inputs_stay_as_they_are() -> None:
    case = Case(2, 2, 100, 16, causal=True)
    inputs = Inputs(*(array.copy() for array in make_inputs(case)))
    run(case, inputs)
    for array, original in zip(inputs, make_inputs(case), strict=True):
        assert array.tobytes() == original.tobytes()


def test_without_a_plan() -> None:
    case = Case(3, 2, 500, 16, num_kv_heads=2, varlen=True, causal=True)
    inputs = make_inputs(case)
    assert_same_bits(mla_decode(*inputs, causal=True), run(case, inputs))


def test_causal_single_query_is_no_mask() -> None:
    case = Case(2, 1, 100, 16)
    assert_same_bits(run(dataclasses.replace(case, causal=True)), run(case))


def test_negative_length_counts_as_zero() -> None:
    inputs = make_inputs(Case(2, 1, 70, 16, lengths=(0, 70)))
    expected = mla_decode(*inputs)
    got = mla_decode(*inputs._replace(cache_seqlens=np.array([-5, 70], np.int32)))
    assert_same_bits(got, expected)


@pytest.mark.parametrize(
    ("planned", "actual"),
    [
        ((700, 3, 65), (701, 4, 66)),  # a step later
        ((700, 3, 65), (10, 2000, 0)),
        ((0, 0, 0), (500, 64, 1)),
        ((5000, 5000, 5000), (1, 0, 64)),  # whole splits find nothing left
    ],
)
def test_a_stale_plan_is_out_of_balance_not_wrong(planned: tuple[int, ...], actual: tuple[int, ...]) -> None:
    inputs = make_inputs(Case(3, 2, max(actual), 16, lengths=actual))
    plan = plan_decode(np.array(planned, np.int32), num_heads=16, seq_len_q=2, causal=True, num_workers=5)
    out, lse = mla_decode(*inputs, plan=plan, causal=True)
    expected_out, expected_lse = mla_decode_reference(*inputs, causal=True)
    assert_close(out, expected_out, OUT_RULES["bfloat16"], "out")
    assert_close(lse, expected_lse, LSE_RULE, "lse")


@pytest.mark.parametrize("bad_page", [-1, -(2**31), 2**31 - 1, "num_pages"])
def test_a_bad_page_reads_as_zeros(bad_page: int | str) -> None:
    inputs = make_inputs(Case(2, 1, 300, 16, lengths=(300, 130)))
    num_pages = len(inputs.kv_cache)
    with_zeros = np.concatenate([inputs.kv_cache, np.zeros_like(inputs.kv_cache[:1])])
    table = inputs.block_table.copy()
    table[0, 2] = num_pages
    expected = mla_decode_reference(*inputs._replace(kv_cache=with_zeros, block_table=table))
    table[0, 2] = num_pages if bad_page == "num_pages" else bad_page
    out, lse = mla_decode(*inputs._replace(block_table=table))
    assert_close(out, expected[0], OUT_RULES["bfloat16"], "out")
    assert_close(lse, expected[1], LSE_RULE, "lse")


def test_a_length_past_the_table_reads_zeros() -> None:
    inputs = make_inputs(Case(1, 1, 128, 16))
    table = inputs.block_table[:, :2]
    out, lse = mla_decode(*inputs._replace(block_table=table, cache_seqlens=np.array([700], np.int32)))
    with_zeros = np.concatenate([inputs.kv_cache, np.zeros_like(inputs.kv_cache[:1])])
    padded = np.concatenate([table, np.full((1, 9), len(inputs.kv_cache), np.int32)], axis=1)
    expected = mla_decode_reference(inputs.q, with_zeros, padded, np.array([700], np.int32))
    assert_close(out, expected[0], OUT_RULES["bfloat16"], "out")
    assert_close(lse, expected[1], LSE_RULE, "lse")


def test_nan_in_use_reaches_its_own_sequence_only() -> None:
    inputs = make_inputs(Case(2, 1, 100, 16))
    q = inputs.q.copy()
    q[0, 0, 3, 5] = np.nan
    out, lse = mla_decode(*inputs._replace(q=q))
    clean, _ = mla_decode(*inputs)
    assert np.isnan(out[0, 0, 3].astype(np.float32)).all()
    assert np.isnan(lse[0, 3, 0])
    rest = np.ones((2, 16), bool)
    rest[0, 3] = False
    assert out[:, 0][rest].tobytes() == clean[:, 0][rest].tobytes()


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_threadpoolctl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)  # as if it were not installed
    cpu._blas_controller.cache_clear()
    yield
    cpu._blas_controller.cache_clear()


@pytest.mark.usefixtures("no_threadpoolctl")
def test_without_threadpoolctl(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLAS brings the threads, so workers run one after another, in the caller's."""
    monkeypatch.setattr(cpu, "_executor", lambda pid: pytest.fail("workers beside BLAS's threads"))
    check(Case(3, 2, 700, 16, causal=True, lengths=(700, 3, 65), num_workers=4))


def test_blas_threads_come_back() -> None:
    """Calls that overlap agree with calls that do not, and leave BLAS's thread count as they found it."""
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def blas_threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]

    case = Case(2, 1, 1500, 16, num_workers=4)
    expected, before = run(case), blas_threads()
    results: list[Any] = [None] * 6

    def call(slot: int) -> None:
        results[slot] = run(case)

    threads = [threading.Thread(target=call, args=(slot,)) for slot in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_same_bits(result, expected)
    assert blas_threads() == before


def test_decode_after_fork() -> None:
    """The child of a fork has none of its parent's threads and must start its own."""
    script = """
import os, sys
sys.path[:0] = ["tests"]
from cases import Case, make_inputs
from mlacore import mla_decode, plan_decode
inputs = make_inputs(Case(2, 1, 500, 16))
plan = plan_decode(inputs.cache_seqlens, num_heads=16, num_workers=3)
out, _ = mla_decode(*inputs, plan=plan)
child = os.fork()
if child == 0:
    os._exit(0 if mla_decode(*inputs, plan=plan)[0].tobytes() == out.tobytes() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


# --- merging partial results -----------------------------------------------------------------------------------------


def parts_of(inputs: Inputs, ends: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Attention over consecutive ranges of pages, as ranks of a context-parallel group would compute it."""
    for begin, end in zip([0, *ends], [*ends, inputs.block_table.shape[1]], strict=True):
        lengths = np.clip(inputs.cache_seqlens - begin * 64, 0, (end - begin) * 64).astype(np.int32)
        table = np.ascontiguousarray(inputs.block_table[:, begin:end])
        yield mla_decode(inputs.q, inputs.kv_cache, table, lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", [[], [1], [2, 3], [1, 2, 3, 4, 5]])
def test_merge_is_attention_over_everything(dtype: str, ends: list[int]) -> None:
    inputs = make_inputs(Case(4, 2, 400, 16, lengths=(400, 70, 0, 1), dtype=dtype))
    outs, lses = zip(*parts_of(inputs, ends), strict=True)
    out, lse = merge_states(outs, lses)
    assert (out.dtype, lse.dtype) == (inputs.q.dtype, np.float32)
    expected_out, expected_lse = mla_decode_reference(*inputs)
    assert_close(out, expected_out, OUT_RULES[dtype], "out")
    assert_close(lse, expected_lse, LSE_RULE, "lse")
    assert_same_bits(merge_states(np.stack(outs), np.stack(lses)), (out, lse))


def test_merge_of_one_is_the_identity() -> None:
    out, lse = mla_decode(*make_inputs(Case(2, 2, 100, 16, lengths=(100, 0), dtype="float32")))
    assert_same_bits(merge_states([out], [lse]), (out, lse))


def test_merge_never_looks_at_an_empty_part() -> None:
    out, lse = mla_decode(*make_inputs(Case(2, 1, 100, 16, dtype="float32")))
    garbage, empty = np.full_like(out, np.nan), np.full_like(lse, -np.inf)
    assert_same_bits(merge_states([garbage, out, garbage], [empty, lse, empty]), (out, lse))
    nothing, no_lse = merge_states([garbage, garbage], [empty, empty])
    assert not nothing.any()
    assert np.isneginf(no_lse).all()


def test_merge_of_far_apart_parts() -> None:
    """Denominators of e^±500 neither overflow nor disturb each other."""
    shape = (1, 1, 1, 512)
    outs = [np.full(shape, 1, np.float32), np.full(shape, 2, np.float32), np.full(shape, 4, np.float32)]
    lses = [np.full((1, 1, 1), x, np.float32) for x in (-500, 500, 500)]
    out, lse = merge_states(outs, lses)
    np.testing.assert_allclose(out, 3)
    np.testing.assert_allclose(lse, 500 + np.log(2), rtol=1e-6)
