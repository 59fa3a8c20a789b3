"""The SM90 kernels against the oracle, and what must hold bit by bit. Needs a Hopper GPU."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import racecheck
from cases import CORNERS, GRID, PAGE_SIZE, TINY, Case, Inputs, make_inputs, on_module, permute_pages, repaged
from compare import LSE_RULE, OUT_RULES, Rule, assert_close

from mlacore import driver, jit, mla_decode, mla_decode_reference, plan_decode
from mlacore.arrays import as_dtype
from mlacore.params import CLEAR_TURNS, STATE_MARKS, TILE_ROWS
from mlacore.plan import schedule

pytestmark = pytest.mark.gpu

LAUNCH_NUMBERS = STATE_MARKS * CLEAR_TURNS


def by_id(case: Case) -> str:
    return case.id


@pytest.fixture
def cupy() -> Any:
    import cupy

    return cupy


def on_device(inputs: Inputs, cupy: Any) -> Inputs:
    return Inputs(*(on_module(cupy, array) for array in inputs))


def plan_of(case: Case, inputs: Inputs, **options: Any) -> Any:
    counts = {"num_heads": case.num_heads, "seq_len_q": case.seq_len_q, "num_kv_heads": case.num_kv_heads}
    options = {"causal": case.causal, "num_workers": case.num_workers} | options
    return plan_decode(inputs.cache_seqlens, **counts, **options)


def buffers(case: Case, cupy: Any) -> tuple[Any, Any]:
    """Output buffers full of NaN."""
    out = cupy.full((case.batch, case.seq_len_q, case.num_heads, 512), np.nan, cupy.float32)
    lse = cupy.full((case.batch, case.num_heads, case.seq_len_q), np.nan, cupy.float32)
    return out.astype(as_dtype(case.dtype)), lse


def run(case: Case, inputs: Inputs, cupy: Any, **options: Any) -> tuple[Any, Any]:
    options = {"plan": plan_of(case, inputs), "causal": case.causal} | options
    out, lse = buffers(case, cupy)
    # No launch has this number, so nobody may take what stands there for a state.
    options["plan"].partial_out[...] = 0xFFFFFFFF
    options["plan"].partial_lse[...] = 0xFFFFFFFF
    return mla_decode(*inputs, out=out, lse=lse, **options)


def is_close_on_device(got: Any, expected: Any, rule: Rule, cupy: Any) -> bool:
    """The comparator's rule computed on the GPU, which spares the grid the copies to the host."""
    is_finite = cupy.isfinite(expected)
    if not (got[~is_finite].astype(np.float64) == expected[~is_finite]).all():
        return False
    a = cupy.where(is_finite, got.astype(np.float64), 0.0)
    b = cupy.where(is_finite, expected, 0.0)
    error = cupy.abs(a - b)
    passes = ((error < rule.abs_tol) | (error < rule.rel_tol * cupy.abs(b))).all()
    squares = float((a * a + b * b).sum())
    cosine = 1 - 2 * float((a * b).sum()) / squares if squares else 0.0
    return bool(passes) and cosine <= rule.cos_tol


def check(case: Case, cupy: Any, inputs: Inputs | None = None, **options: Any) -> None:
    inputs = make_inputs(case, cupy) if inputs is None else inputs
    results = run(case, inputs, cupy, **options)
    expected = mla_decode_reference(*inputs, causal=case.causal)
    for name, got, reference, rule in zip(
        ("out", "lse"), results, expected, (OUT_RULES[case.dtype], LSE_RULE), strict=True
    ):
        if not is_close_on_device(got, reference, rule, cupy):
            assert_close(got, reference, rule, name)
            pytest.fail(f"{name}: the host comparison passes, the one on the device does not")


def assert_same_bits(got: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for name, a, b in zip(("out", "lse"), got, expected, strict=True):
        assert a.get().tobytes() == b.get().tobytes(), name


@pytest.mark.parametrize("case", GRID, ids=by_id)
def test_grid(case, cupy):
    check(case, cupy)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", TINY, ids=by_id)
def test_tiny(case, dtype, cupy):
    check(dataclasses.replace(case, dtype=dtype), cupy)


@pytest.mark.parametrize("case", CORNERS, ids=by_id)
def test_corners(case, cupy):
    check(case, cupy)


@pytest.mark.parametrize("given", [(), ("out",), ("lse",)])
def test_what_is_not_given_is_made(given, cupy):
    inputs = make_inputs(SPLIT, cupy)
    named = dict(zip(("out", "lse"), buffers(SPLIT, cupy), strict=True))
    results = mla_decode(*inputs, causal=True, **{name: named[name] for name in given})
    expected = mla_decode_reference(*inputs, causal=True)
    assert_close(results[0], expected[0], OUT_RULES["bfloat16"])
    assert_close(results[1], expected[1], LSE_RULE, "lse")
    for name, result in zip(("out", "lse"), results, strict=True):
        assert name not in given or result is named[name]


SPLIT = Case(5, 2, 3000, 100, varlen=True, causal=True, seed=3)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 10, 100, 500])
def test_any_number_of_workers(num_workers, cupy):
    check(dataclasses.replace(SPLIT, num_workers=num_workers), cupy)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("max_seq_len", [250, 700])
@pytest.mark.parametrize(("seq_len_q", "num_heads"), [(1, 40), (4, 16), (1, 100), (2, 63), (1, 128)])
def test_clusters_of_few_rows(seq_len_q, num_heads, max_seq_len, dtype, cupy):
    case = Case(7, seq_len_q, max_seq_len // 2, num_heads, varlen=True, causal=True, dtype=dtype, seed=5)
    inputs = make_inputs(case, cupy)
    plan = plan_of(case, inputs, max_seq_len=max_seq_len)
    assert plan.kernel.cluster_ctas > 1
    assert plan.kernel.tile_rows == 16
    check(case, cupy, inputs, plan=plan)


def test_a_plan_whose_workers_are_not_resident_is_merged_by_those_that_start_last(cupy):
    """With more CTAs than the GPU runs at once, nobody waits: what is abandoned falls to whoever starts last."""
    case = Case(1, 1, 60_000, 16)
    inputs = make_inputs(case, cupy)
    plan = plan_of(case, inputs, num_workers=900)
    assert int(plan.splits[0, 1]) > driver.num_sms(0)
    expected = run(case, inputs, cupy, plan=plan)
    for _ in range(3):
        check(case, cupy, inputs, plan=plan)
        assert_same_bits(run(case, inputs, cupy, plan=plan), expected)
    assert not plan.merge_counters.any()
    assert not plan.merge_abandoned.any()
    assert plan.launches.tolist() == [0, 7]


@pytest.mark.parametrize("num_heads", [16, 32, 128])
def test_states_of_earlier_launches_are_told_apart(num_heads, cupy):
    """Scratch memory is never cleared: splits become one, two and many in turn, and numbers begin anew."""
    inputs = on_device(make_inputs(Case(3, 1, 9000, num_heads)), cupy)
    options = {"num_heads": num_heads, "num_workers": 12}
    plan = plan_decode(inputs.cache_seqlens, **options)
    plan.launches[1] = LAUNCH_NUMBERS - 8
    for lengths in (
        (9000, 9000, 9000),
        (64, 64, 9000),
        (64, 640, 640),
        (64, 64, 64),
        (9000, 100, 3000),
        (0, 9000, 0),
    ) * 2:
        seqlens = cupy.asarray(lengths, cupy.int32)
        plan.update(seqlens)
        now = inputs._replace(cache_seqlens=seqlens)
        expected = mla_decode(*now, plan=plan_decode(seqlens, **options))
        assert_same_bits(mla_decode(*now, plan=plan), expected)
    assert plan.launches.tolist() == [0, 12 - 8]


def marks_of(plan: Any, cupy: Any) -> Any:
    """The mark of each cell of a plan's partial states, 0 where there is none (cuda/cells.cuh)."""
    cells = plan.partial_out.reshape(-1, 4)
    if plan.kernel.tile_rows < TILE_ROWS:
        return cells[:, 3] & 0xFF
    return cells[:, 0] >> 28 | cells[:, 1] >> 28 << 4


@pytest.mark.parametrize("num_heads", [16, 32, 128])
def test_marks_are_gone_before_they_come_again(num_heads, cupy):
    inputs = on_device(make_inputs(Case(3, 1, 2000, num_heads)), cupy)
    plan = plan_decode(inputs.cache_seqlens, num_heads=num_heads, num_workers=8)
    for lengths in ((2000, 100, 700), (700, 100, 2000)):
        seqlens = cupy.asarray(lengths, cupy.int32)
        plan.update(seqlens)
        assert sorted(plan.splits[:, 1].tolist()) == [1, 2, 5]
        for _ in range(CLEAR_TURNS + 1):
            mla_decode(*inputs._replace(cache_seqlens=seqlens), plan=plan)
        number = int(plan.launches[1])
        marks = marks_of(plan, cupy)
        marks = marks[marks != 0].astype(cupy.int64)
        assert marks.size > 0
        assert int(((number - marks) % STATE_MARKS).max()) < CLEAR_TURNS  # launches ago
    seqlens = cupy.asarray((64, 64, 64), cupy.int32)
    plan.update(seqlens)
    for _ in range(CLEAR_TURNS):
        mla_decode(*inputs._replace(cache_seqlens=seqlens), plan=plan)
    assert not plan.partial_out.any()
    assert not plan.partial_lse.any()


@pytest.mark.parametrize("num_heads", [8, 16, 100])
@pytest.mark.parametrize("num_workers", [None, 7])  # 7: sequences of two splits, which merge in another way
def test_same_call_same_bits(num_workers, num_heads, cupy):
    case = dataclasses.replace(SPLIT, num_workers=num_workers, num_heads=num_heads)
    inputs = make_inputs(case, cupy)
    splits = plan_of(case, inputs).splits[:, 1]
    assert (splits == 2).any() if num_workers else (splits > 2).any()
    first = run(case, inputs, cupy)
    for _ in range(10):
        assert_same_bits(run(case, inputs, cupy), first)


@pytest.mark.parametrize(("num_heads", "seq_len_q"), [(16, 1), (32, 1), (16, 4), (128, 1), (128, 2)])
def test_batch_invariant_bits_do_not_depend_on_neighbours(num_heads, seq_len_q, cupy):
    lengths = (3000, 64, 0, 20_000, 10, 1500, 7777)
    case = Case(7, seq_len_q, max(lengths), num_heads, causal=True, lengths=lengths)
    inputs = make_inputs(case, cupy)
    options = {"max_seq_len": 20_000, "batch_invariant": True, "num_workers": None}
    plan = plan_of(case, inputs, **options)
    assert (plan.splits[:, 1] == 2).any()  # both ways to merge
    assert (plan.splits[:, 1] > 2).any()
    check(case, cupy, inputs, plan=plan)
    together = run(case, inputs, cupy, plan=plan)
    for rows in ([3], [0, 6], [6, 5, 4, 3, 2, 1, 0], [0] * 40 + [3]):
        rows_of = cupy.asarray(rows)
        some = Inputs(inputs.q[rows_of], inputs.kv_cache, inputs.block_table[rows_of], inputs.cache_seqlens[rows_of])
        part = dataclasses.replace(case, batch=len(rows), lengths=tuple(lengths[row] for row in rows))
        got = run(part, some, cupy, plan=plan_of(part, some, **options))
        assert_same_bits(got, (together[0][rows_of], together[1][rows_of]))


def test_place_of_pages_does_not_matter(cupy):
    inputs = make_inputs(SPLIT, cupy)
    moved = on_device(permute_pages(make_inputs(SPLIT)), cupy)
    assert not (moved.block_table == inputs.block_table).all()
    assert_same_bits(run(SPLIT, moved, cupy), run(SPLIT, inputs, cupy))


# Query tokens, heads and `max_seq_len`, and the kernel that they choose: rows and CTAs that share a tile.
KERNELS = [
    (1, 16, None, 16, 1),
    (1, 32, None, 32, 1),
    (1, 64, None, 64, 1),
    (1, 128, None, 64, 2),
    (2, 128, None, 64, 2),  # two clusters: prefetches two tiles ahead
    (1, 40, 800, 16, 2),
    (1, 128, 800, 16, 2),
]
# Edges of every page size; the longest outlasts the page ids that a warp holds at once, whatever the size.
PAGED_LENGTHS = (2500, 0, 257, 16, 47, 129)


@pytest.mark.parametrize("num_workers", [None, 2])
@pytest.mark.parametrize("page_size", [16, 32, 128, 256])
@pytest.mark.parametrize(("seq_len_q", "num_heads", "max_seq_len", "tile_rows", "cluster_ctas"), KERNELS)
def test_page_sizes_give_the_same_bits(
    seq_len_q, num_heads, max_seq_len, tile_rows, cluster_ctas, page_size, num_workers, cupy
):
    case = Case(6, seq_len_q, 2500, num_heads, causal=True, lengths=PAGED_LENGTHS, num_workers=num_workers)
    inputs = make_inputs(case)
    plan = plan_of(case, on_device(inputs, cupy), max_seq_len=max_seq_len)
    assert (plan.kernel.tile_rows, plan.kernel.cluster_ctas) == (tile_rows, cluster_ctas)
    expected = run(case, on_device(inputs, cupy), cupy, plan=plan)
    paged = on_device(repaged(inputs, page_size), cupy)
    assert paged.kv_cache.shape[1] == page_size
    check(case, cupy, paged, plan=plan)
    assert_same_bits(run(case, paged, cupy, plan=plan), expected)

    num_pages = len(paged.kv_cache)
    layers = cupy.full((num_pages, 3, page_size, 1, 576), np.nan, cupy.float32).astype(paged.q.dtype)
    wide = cupy.full((num_pages, page_size, 1, 640), np.nan, cupy.float32).astype(paged.q.dtype)
    for pool in (layers[:, 1], wide[..., 64:]):  # pages with gaps between them; rows with gaps
        pool[...] = paged.kv_cache
        assert_same_bits(run(case, paged._replace(kv_cache=pool), cupy, plan=plan), expected)


@pytest.mark.parametrize("page_size", [16, 32, 128, 256])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_page_sizes_of_several_kv_heads(num_heads, page_size, cupy):
    case = Case(3, 2, 700, num_heads, num_kv_heads=2, causal=True, lengths=(700, 33, 64), dtype="float16")
    inputs = make_inputs(case)
    paged = on_device(repaged(inputs, page_size), cupy)
    check(case, cupy, paged)
    assert_same_bits(run(case, paged, cupy), run(case, on_device(inputs, cupy), cupy))


def test_strided_pool_queries_and_table(cupy):
    inputs = make_inputs(SPLIT, cupy)
    expected = run(SPLIT, inputs, cupy)
    pool = cupy.full((len(inputs.kv_cache), 3, PAGE_SIZE, 1, 640), np.nan, cupy.float32).astype(inputs.q.dtype)
    layer = pool[:, 1, :, :, 64:]
    layer[...] = inputs.kv_cache
    q = cupy.full((2, 5, 100, 2, 584), np.nan, cupy.float32).astype(inputs.q.dtype)
    q_view = q.transpose(1, 3, 2, 0, 4)[:, :, :, 1, :576]
    q_view[...] = inputs.q
    table = cupy.zeros((5, 2 * inputs.block_table.shape[1]), cupy.int32)[:, : inputs.block_table.shape[1]]
    table[...] = inputs.block_table
    assert_same_bits(run(SPLIT, inputs._replace(q=q_view, kv_cache=layer, block_table=table), cupy), expected)


def test_scale(cupy):
    inputs = make_inputs(SPLIT, cupy)
    for scale in (1e-6, 0.135, 3.0):
        out, lse = run(SPLIT, inputs, cupy, softmax_scale=scale)
        expected_out, expected_lse = mla_decode_reference(*inputs, causal=True, softmax_scale=scale)
        assert_close(out, expected_out, OUT_RULES["bfloat16"])
        assert_close(lse, expected_lse, LSE_RULE, "lse")


def test_scores_that_grow_along_the_sequence(cupy):
    """Every tile's scores exceed the last one's by far more than the softmax reference's slack."""
    case = Case(1, 1, 1024, 64, dtype="float16", num_workers=1)
    inputs = make_inputs(case, cupy)
    q = cupy.zeros_like(inputs.q)
    q[..., 0] = 8
    pages = inputs.block_table[0, : 1024 // PAGE_SIZE]
    pool = inputs.kv_cache.copy()
    pool[pages, :, 0, 0] = cupy.arange(1024, dtype=cupy.float32).reshape(-1, PAGE_SIZE).astype(cupy.float16) / 8
    check(case, cupy, inputs._replace(q=q, kv_cache=pool), softmax_scale=576**-0.5)


def test_nan_in_a_sequence_stays_there(cupy):
    case = Case(3, 1, 200, 16)
    inputs = make_inputs(case, cupy)
    pool = inputs.kv_cache.copy()
    pool[inputs.block_table[1, 0], 5] = np.nan
    out, lse = run(case, inputs._replace(kv_cache=pool), cupy)
    is_nan = cupy.isnan(out.astype(np.float32)).all(axis=(1, 2, 3)).get()
    assert is_nan.tolist() == [False, True, False]
    assert cupy.isnan(lse).all(axis=(1, 2)).get().tolist() == [False, True, False]
    expected, _ = run(case, inputs, cupy)
    assert (out[[0, 2]] == expected[[0, 2]]).all()


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("num_heads", [16, 64, 128])
def test_pages_outside_the_pool_read_as_zeros(num_heads, page_size, cupy):
    case = Case(2, 1, 300, num_heads)
    inputs = on_device(repaged(make_inputs(case), page_size), cupy)
    last = -(-300 // page_size) - 1  # column of the last page
    table, pool = inputs.block_table.copy(), inputs.kv_cache.copy()
    pool[inputs.block_table[0, 1]] = 0
    pool[inputs.block_table[1, last]] = 0
    expected = run(case, inputs._replace(kv_cache=pool), cupy)
    table[0, 1], table[1, last] = -5, 2147480000
    assert_same_bits(run(case, inputs._replace(block_table=table), cupy), expected)
    # a table that is too narrow for the lengths
    pool[inputs.block_table[0, last]] = 0
    narrow = table[:, :last]
    assert_same_bits(
        run(case, inputs._replace(block_table=narrow), cupy), run(case, inputs._replace(kv_cache=pool), cupy)
    )


def test_check_mode_names_sequence_and_column(cupy, monkeypatch):
    case = Case(2, 1, 300, 16)
    inputs = make_inputs(case, cupy)
    inputs.block_table[1, 3] = len(inputs.kv_cache)
    monkeypatch.setenv("MLACORE_CHECK", "1")
    with pytest.raises(IndexError, match="sequence 1, column 3"):
        mla_decode(*inputs)


@pytest.mark.parametrize("batch", [1, 2, 31, 512, 513, 1500])
@pytest.mark.parametrize("num_workers", [1, 7, 132])
def test_device_planner_equals_the_host_one(batch, num_workers, cupy):
    rng = np.random.default_rng(batch * num_workers)
    for top in (1, 300, 100_000):
        lengths = rng.integers(-2, top, batch).astype(np.int32)
        plan = plan_decode(cupy.asarray(lengths), num_heads=16, num_workers=num_workers)
        work, splits = schedule(lengths, num_workers)
        np.testing.assert_array_equal(plan.work.get(), work)
        np.testing.assert_array_equal(plan.splits.get(), splits)


def test_plan_of_other_lengths_is_still_right(cupy):
    case = dataclasses.replace(SPLIT, batch=6, lengths=(3000, 64, 0, 5000, 10, 900), causal=False)
    inputs = make_inputs(case, cupy)
    for planned in ([0] * 6, [9000, 0, 9000, 0, 0, 9000], [10, 5000, 3000, 64, 900, 0]):
        for num_workers in (None, 3):  # with fewer workers than sequences, some begin in what is no longer there
            options = {"num_heads": 100, "seq_len_q": 2, "num_workers": num_workers}
            check(case, cupy, inputs, plan=plan_decode(cupy.asarray(planned, cupy.int32), **options))


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("length", [0, 40, 700])
def test_splits_that_are_empty_by_now_are_merged_right(length, num_heads, cupy):
    """What was asked for on a hint does not land in memory that a merge uses."""
    case = Case(1, 1, 9000, num_heads)
    inputs = make_inputs(case, cupy)
    plan = plan_of(case, inputs)
    now = inputs._replace(cache_seqlens=cupy.asarray([length], cupy.int32))
    check(case, cupy, now, plan=plan)
    expected = run(case, now, cupy, plan=plan)
    results = [buffers(case, cupy) for _ in range(200)]
    for out, lse in results:
        mla_decode(*now, plan=plan, out=out, lse=lse)
    for result in results:
        assert_same_bits(result, expected)


def test_graph_replay_sees_new_lengths_and_tables(cupy):
    case = Case(6, 1, 2000, 128, varlen=True)
    first, second = make_inputs(case, cupy), make_inputs(dataclasses.replace(case, seed=1), cupy)
    # Both sets of sequences in one pool and one table shape.
    columns = max(first.block_table.shape[1], second.block_table.shape[1])
    pool = cupy.concatenate([first.kv_cache.view(np.uint16), second.kv_cache.view(np.uint16)]).view(first.q.dtype)

    def table_of(inputs: Inputs, offset: int) -> Any:
        wide = cupy.full((case.batch, columns), 2147480000, cupy.int32)
        wide[:, : inputs.block_table.shape[1]] = inputs.block_table + offset
        return wide

    tables = [table_of(first, 0), table_of(second, len(first.kv_cache))]
    lengths = [first.cache_seqlens, second.cache_seqlens]
    q, table, seqlens = first.q.copy(), tables[0].copy(), lengths[0].copy()
    plan = plan_decode(seqlens, num_heads=128)
    out, lse = buffers(case, cupy)

    def step(stream: Any = None) -> None:
        plan.update(seqlens, stream=stream)
        mla_decode(q, pool, table, seqlens, plan=plan, out=out, lse=lse, stream=stream)

    step()  # loads the kernels
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        step()
        graph = stream.end_capture()
    for index in (1, 0, 1):
        q[...] = (first, second)[index].q
        table[...], seqlens[...] = tables[index], lengths[index]
        out[...], lse[...] = np.nan, np.nan
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        expected_out, expected_lse = mla_decode_reference(q, pool, table, seqlens)
        assert_close(out, expected_out, OUT_RULES["bfloat16"])
        assert_close(lse, expected_lse, LSE_RULE, "lse")


# Lets the next kernel of the stream start at once, and writes what that one reads 2 ms later.
LATE_WRITER = r"""
extern "C" __global__ void late_writer(int* const* to, const int* const* from, const int* counts, int num_arrays) {
  asm volatile("griddepcontrol.launch_dependents;");
  for (long long begin = clock64(); clock64() - begin < 4000000;) {}
  for (int a = 0; a < num_arrays; ++a) {
    for (int i = threadIdx.x; i < counts[a]; i += blockDim.x) to[a][i] = from[a][i];
  }
}
"""


@pytest.mark.parametrize(
    "late", [(), ("table",), ("lengths",), ("work", "splits"), ("work", "splits", "table", "lengths")]
)
@pytest.mark.parametrize("before", ["others", "garbage"])
@pytest.mark.parametrize(("seq_len_q", "num_heads", "max_seq_len", "tile_rows", "cluster_ctas"), KERNELS)
def test_what_the_previous_kernel_writes_last_counts(
    seq_len_q, num_heads, max_seq_len, tile_rows, cluster_ctas, before, late, cupy
):
    """All that the kernels read early is a hint: schedule, block table and lengths may still change."""
    case = Case(6, seq_len_q, 2500, num_heads, lengths=(2500, 0, 257, 16, 1900, 129))
    inputs = make_inputs(case, cupy)
    plan = plan_of(case, inputs, max_seq_len=max_seq_len)
    assert (plan.kernel.tile_rows, plan.kernel.cluster_ctas) == (tile_rows, cluster_ctas)
    expected = run(case, inputs, cupy, plan=plan)

    arrays = {"work": plan.work, "splits": plan.splits, "table": inputs.block_table, "lengths": inputs.cache_seqlens}
    right = {name: array.copy() for name, array in arrays.items()}
    if before == "others":  # what would be right of another batch
        lengths = inputs.cache_seqlens[::-1].copy()
        other = plan_of(case, inputs._replace(cache_seqlens=lengths), max_seq_len=max_seq_len)
        wrong = {"work": other.work, "splits": other.splits, "table": inputs.block_table[::-1] % 7, "lengths": lengths}
    else:
        rng = np.random.default_rng(0)
        wrong = {
            name: cupy.asarray(rng.integers(-(1 << 31), 1 << 31, array.shape).astype(np.int32))
            for name, array in arrays.items()
        }
        # Some that lead somewhere.
        wrong["work"][1::3] = cupy.asarray(rng.integers(-2, case.batch + 2, wrong["work"][1::3].shape))
    for name in late:
        arrays[name][...] = wrong[name]
    to, source = (cupy.asarray([of[name].data.ptr for name in arrays], np.uint64) for of in (arrays, right))
    counts = cupy.asarray([array.size for array in arrays.values()], np.int32)
    writer = cupy.RawKernel(LATE_WRITER, "late_writer")
    out, lse = buffers(case, cupy)
    cupy.cuda.Device().synchronize()
    writer((1,), (256,), (to, source, counts, np.int32(len(arrays))))
    mla_decode(*inputs, plan=plan, out=out, lse=lse)
    assert_same_bits((out, lse), expected)


def test_two_streams_at_once(cupy):
    cases = [dataclasses.replace(SPLIT, seed=seed) for seed in (1, 2)]
    inputs = [make_inputs(case, cupy) for case in cases]
    expected = [run(case, given, cupy) for case, given in zip(cases, inputs, strict=True)]
    plans = [plan_of(case, given) for case, given in zip(cases, inputs, strict=True)]
    results = [[buffers(SPLIT, cupy) for _ in range(20)] for _ in cases]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in cases]
    cupy.cuda.Device().synchronize()
    for i in range(20):
        for index, stream in enumerate(streams):
            out, lse = results[index][i]
            mla_decode(*inputs[index], plan=plans[index], causal=True, out=out, lse=lse, stream=stream)
    cupy.cuda.Device().synchronize()
    for index in range(2):
        for result in results[index]:
            assert_same_bits(result, expected[index])


# FlashMLA's relative L2 error on such data is 2.0e-3, of which 1.65e-3 is the rounding of the output to bfloat16.
@pytest.mark.parametrize("length", [4096, 1 << 17, 1 << 20])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_error_does_not_grow_with_the_length(length, num_heads, cupy):
    case = Case(1, 1, length, num_heads)
    inputs = make_inputs(case, cupy)
    out, lse = run(case, inputs, cupy)
    expected_out, expected_lse = mla_decode_reference(*inputs)
    error = cupy.sqrt(((out.astype(np.float64) - expected_out) ** 2).sum() / (expected_out**2).sum())
    lse_error = cupy.abs(lse - expected_lse).max()
    print(f"length {length}, {num_heads} heads: relative L2 {float(error):.2e}, lse {float(lse_error):.1e}")
    assert float(error) < 2.1e-3
    assert float(lse_error) < 3e-6


def test_other_gpus_are_named(cupy, monkeypatch):
    monkeypatch.setattr(driver, "compute_capability", lambda device: (8, 0))
    driver._function.cache_clear()
    driver.prepare_plan.cache_clear()
    inputs = make_inputs(TINY[0], cupy)
    with pytest.raises(RuntimeError, match=r"need a Hopper GPU .* is NVIDIA .* with 8\.0"):
        mla_decode(*inputs)


SANITIZED = """
import sys
sys.path.insert(0, "tests")
import cupy
from cases import CORNERS, TINY, make_inputs
from mlacore import mla_decode, plan_decode
for case in [*TINY, *(c for c in CORNERS if c.batch < 128)]:
    inputs = make_inputs(case, cupy)
    counts = dict(num_heads=case.num_heads, seq_len_q=case.seq_len_q, num_kv_heads=case.num_kv_heads)
    workers = case.num_workers or min(16, case.batch * 3)
    plan = plan_decode(inputs.cache_seqlens, **counts, causal=case.causal, num_workers=workers)
    mla_decode(*inputs, plan=plan, causal=case.causal)
cupy.cuda.Device().synchronize()
"""


def sanitize(tool: str) -> tuple[int, str]:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer on the PATH")
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", "--print-limit", "1000"]
    command = [sanitizer, *options, sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("tool", ["memcheck", "synccheck"])
def test_sanitizer_is_clean(tool):
    status, log = sanitize(tool)
    assert status == 0, log[-6000:]


def test_racecheck_finds_only_what_named_barriers_order(tmp_path):
    nvdisasm = shutil.which("nvdisasm")
    if nvdisasm is None:
        pytest.skip("needs nvdisasm on the PATH")
    kernels = {}
    for name, variant in jit.VARIANTS.items():
        if variant.kernel.startswith("mla_decode"):
            (tmp_path / name).write_bytes(jit.cubin(variant))
            command = [nvdisasm, "-c", "--print-line-info-inline", str(tmp_path / name)]
            disassembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            kernels[name] = racecheck.functions_of_kernel(disassembly, jit.source_dir())
    for _ in range(3):
        unexpected, placeless = racecheck.unexpected(sanitize("racecheck")[1], kernels)
        assert not unexpected, "\n".join(unexpected)
        if not placeless:
            return
    pytest.fail("\n".join(placeless))
