"""Prepared launches: what reaches the driver, on which device, from which thread.

Arrays are CuPy's over made-up addresses; the driver library is one that writes down what it is given.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pretended_gpu import PLAN_SCRATCH, FakeDriver, cupy_stream, gpu_array, make_call, make_plan

from mlacore import (
    attention,
    cache_kernels,
    driver,
    libcuda,
    mla_decode,
    params,
    plan_decode,
)
from mlacore.arrays import bfloat16
from mlacore.block_tables import TableChanges
from mlacore.cache_layout import RowTransform
from mlacore.dispatch import KernelShape
from mlacore.shapes import LOG2_E

pytest.importorskip("cupy")
pytest.importorskip("cuda.bindings")


# --- what reaches the driver -----------------------------------------------------------------------------------------


def test_decode_reaches_the_driver(fake: FakeDriver) -> None:
    call = make_call()
    out, lse = mla_decode(**call, softmax_scale=0.25, stream=0x50)
    assert out is call["out"]
    assert lse is call["lse"]
    [got] = fake.launches
    assert got.function == fake.function("mla_decode_sm90.bfloat16.rows64.cluster2", params.DECODE_SHARED_BYTES)
    assert (got.grid, got.block) == ((4, 1, 4), (params.DECODE_THREADS, 1, 1))
    assert (got.shared_bytes, got.stream, got.overlaps_previous) == (params.DECODE_SHARED_BYTES, 0x50, True)

    plan, given = call["plan"], {name: array for name, array in call.items() if name not in ("plan", "kv_cache")}
    given["kv"] = call["kv_cache"]
    given |= {name: getattr(plan, name) for name in ("work", "splits", *PLAN_SCRATCH)}
    expected = {name: array.data.ptr for name, array in given.items()} | {
        "q_stride_batch": 2 * 128 * 576,
        "q_stride_seq": 128 * 576,
        "q_stride_head": 576,
        "block_table_stride": 4,
        "kv_stride_page": 64 * 576,
        "num_pages": 12,
        "prefetches_next": 1,
        "prefetches_first": 1,
        "batch": 3,
        "max_pages": 4,
        "seq_len_q": 2,
        "num_heads": 128,
        "num_kv_heads": 1,
        "heads_per_kv": 128,
        "row_blocks": 4,
        "blocks_per_worker": 4,
        "page_size_log2": 6,
        "causal": 0,
        "merge_patience_cycles": params.MERGE_PATIENCE_CYCLES,
        "softmax_scale_log2": np.float32(0.25 * LOG2_E),
    }
    assert got.fields(params.DECODE_PARAMS) == expected
    [encoded] = fake.tensor_maps
    assert encoded == (call["kv_cache"].data.ptr, 9, (64, 64, 9, 1, 12), (1152, 128, 1152, 73728), (64, 32, 1, 1, 1))
    assert got.leading == bytes([1]) * 128
    assert got.leading_address % 64 == 0


def test_log_tells_what_a_launch_is_once_a_shape(fake: FakeDriver, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "mlacore")
    for _ in range(3):
        mla_decode(**make_call())
    plan_decode(gpu_array((3,), np.int32), num_heads=16, num_workers=7).update(gpu_array((3,), np.int32))
    decode, plan = caplog.messages
    assert decode == (
        "decode of batch 3, 2 query tokens, 128 heads, 1 KV heads, pages of 64 tokens on device 0: "
        "mla_decode_sm90.bfloat16.rows64.cluster2, grid 4 x 1 x 4 of clusters of 2, 4 workers, so at most as many "
        "splits of a sequence; splits merged by all their workers; tiles prefetched to L2"
    )
    assert plan == "plans of 3 sequences for 7 workers: mla_plan, 1 CTA of 512 threads"
    fake.resident[2] = 8  # two workers of four
    driver.resident_ctas.cache_clear()
    mla_decode(**make_call(block_table=gpu_array((3, 5), np.int32)))
    assert "those that start last, as not all CTAs are resident" in caplog.messages[-1]


@pytest.mark.parametrize("page_size", params.PAGE_SIZES)
@pytest.mark.parametrize(
    ("num_heads", "max_seq_len", "rows", "ctas"),
    [
        (8, None, 16, 1),
        (16, None, 32, 1),
        (32, None, 64, 1),
        (64, None, 64, 2),
        (96, None, 64, 1),
        (32, 3000, 16, 2),
        (64, 1500, 16, 2),
        (64, 5000, 64, 2),
    ],
)
def test_the_plans_kernel_is_launched(
    fake: FakeDriver, num_heads: int, max_seq_len: int | None, rows: int, ctas: int, page_size: int
) -> None:
    """Variant, grid and box follow the plan, whose workers fill the SMs that clusters reach."""
    call = make_call(
        q=gpu_array((3, 2, num_heads, 576), bfloat16),
        kv_cache=gpu_array((12, page_size, 1, 576), bfloat16),
        out=None,
        lse=None,
    )
    plan = plan_decode(call["cache_seqlens"], num_heads=num_heads, seq_len_q=2, max_seq_len=max_seq_len)
    blocks = -(-2 * num_heads // rows)
    assert plan.kernel == KernelShape(rows, ctas, blocks)
    workers = plan.num_workers
    assert workers == fake.resident[ctas] // blocks
    mla_decode(**call | {"plan": plan})
    planned, got = fake.launches
    assert planned.fields(params.PLAN_PARAMS)["num_workers"] == workers
    kernel = "mla_decode_sm90" if rows == 64 else "mla_decode_swapped_sm90"
    name, shared = f"{kernel}.bfloat16.rows{rows}.cluster{ctas}", params.DECODE_SHARED_BYTES
    assert (got.function, got.grid) == (fake.function(name, shared), (blocks, 1, workers))
    assert fake.occupancies == [(got.function, params.DECODE_THREADS, shared, ctas, 0)]
    fields = got.fields(params.DECODE_PARAMS)
    assert (fields["row_blocks"], fields["blocks_per_worker"]) == (blocks, blocks)
    assert fields["merge_patience_cycles"] == params.MERGE_PATIENCE_CYCLES
    assert (1 << fields["page_size_log2"], fields["kv_stride_page"]) == (page_size, page_size * 576)
    [(_, _, dims, strides, box)] = fake.tensor_maps
    assert (dims, strides) == ((64, page_size, 9, 1, 12), (1152, 128, 1152, page_size * 1152))
    assert box == (64, min(page_size, 64 // ctas), 3 if page_size >= 64 and ctas == 1 else 1, 1, 1)
    slots = (2 * workers, 1, blocks)
    assert plan.partial_out.shape == (*slots, rows * (256 if rows == 64 else 512))
    assert plan.partial_lse.shape == (*slots, rows // 2, 4)
    assert (plan.merge_counters.shape, plan.merge_abandoned.shape) == ((workers, 1, blocks), slots)
    assert plan.launches.shape == (2,)


@pytest.mark.parametrize(
    ("kernel", "page_size", "strides", "next_", "first"),
    [
        (KernelShape(64, 1, 1), 64, None, 0, 1),  # no cluster
        (KernelShape(64, 1, 5), 64, None, 0, 1),
        (KernelShape(64, 2, 2), 64, None, 1, 1),
        (KernelShape(64, 2, 4), 256, None, 1, 1),  # two clusters share the sequence
        (KernelShape(64, 2, 8), 128, None, 1, 1),
        (KernelShape(64, 2, 4), 32, None, 0, 1),  # a tile in several pages
        (KernelShape(64, 2, 4), 64, (1 << 20, 1152, 1152, 2), 1, 1),  # layers interleaved by page
        (KernelShape(64, 2, 4), 64, (81920, 1280, 1280, 2), 0, 0),  # rows with gaps
        (KernelShape(16, 1, 1), 64, None, 0, 1),
        (KernelShape(16, 2, 8), 64, None, 0, 0),  # few tiles a worker
    ],
)
def test_prefetch_wants_contiguous_rows(
    fake: FakeDriver, kernel: KernelShape, page_size: int, strides: Any, next_: int, first: int
) -> None:
    kv_cache = gpu_array((12, page_size, 1, 576), bfloat16, strides=strides)
    mla_decode(**make_call(kv_cache=kv_cache, plan=make_plan(kernel=kernel)))
    fields = fake.launches[-1].fields(params.DECODE_PARAMS)
    assert (fields["prefetches_next"], fields["prefetches_first"]) == (next_, first)
    assert fields["kv_stride_page"] == kv_cache.strides[0] // 2


def test_rows_of_several_kv_heads_are_not_prefetched(fake: FakeDriver) -> None:
    kv_cache = gpu_array((12, 64, 2, 576), bfloat16)
    plan = make_plan(num_kv_heads=2, kernel=KernelShape(64, 2, 2))
    mla_decode(**make_call(kv_cache=kv_cache, plan=plan))
    [got] = fake.launches
    assert got.grid == (2, 2, 4)
    fields = got.fields(params.DECODE_PARAMS)
    assert (fields["prefetches_next"], fields["prefetches_first"]) == (0, 0)
    assert fake.tensor_maps[-1][2:4] == ((64, 64, 9, 2, 12), (2304, 128, 1152, 147456))


@pytest.mark.parametrize("kernel", [KernelShape(64, 2, 2), KernelShape(16, 1, 1), KernelShape(16, 2, 4)])
def test_nobody_waits_where_not_all_ctas_are_resident(fake: FakeDriver, kernel: KernelShape) -> None:
    resident = fake.resident[kernel.cluster_ctas] // kernel.row_blocks
    for workers, patience in ((resident, params.MERGE_PATIENCE_CYCLES), (resident + 1, 0)):
        mla_decode(**make_call(plan=make_plan(kernel=kernel, num_workers=workers)))
        assert fake.launches[-1].fields(params.DECODE_PARAMS)["merge_patience_cycles"] == patience
    assert len(fake.occupancies) == 1


def test_plan_reaches_the_driver(fake: FakeDriver) -> None:
    plan, lengths = make_plan(), gpu_array((3,), np.int32)
    plan.update(lengths, stream=0x51)
    (planned,) = fake.launches
    assert (planned.function, planned.grid, planned.stream) == (fake.function("mla_plan", 0), (1, 1, 1), 0x51)
    assert planned.block == (params.PLAN_THREADS, 1, 1)
    assert planned.fields(params.PLAN_PARAMS) == {
        "cache_seqlens": lengths.data.ptr,
        "work": plan.work.data.ptr,
        "splits": plan.splits.data.ptr,
        "batch": 3,
        "num_workers": 4,
        "max_splits": 0,
    }
    assert not planned.overlaps_previous


def test_buffers_that_are_not_given_are_made(fake: FakeDriver) -> None:
    for missing in ({"out": None}, {"lse": None}, {"out": None, "lse": None}) * 2:
        call = make_call(**missing)
        out, lse = mla_decode(**call)
        assert (out.shape, out.dtype) == ((3, 2, 128, 512), bfloat16)
        assert (lse.shape, lse.dtype) == ((3, 128, 2), np.float32)
        fields = fake.launches[-1].fields(params.DECODE_PARAMS)
        assert (fields["out"], fields["lse"]) == (out.data.ptr, lse.data.ptr)
    assert len(attention._prepared) == 3


# --- the cache's launches ---------------------------------------------------------------------------------------------


def test_cache_update_reaches_the_driver(fake: FakeDriver) -> None:
    table, where = gpu_array((8, 5), np.int32), gpu_array((2, 3), np.int64)
    lengths, limits = gpu_array((8,), np.int32), gpu_array((8,), np.int32)
    changes = [TableChanges.pack(np.array(seqs, np.int32), lengths=64, tokens=1) for seqs in ([1, 2, 3], [4, 5, 6])]
    for change in (*changes, TableChanges.pack(np.arange(5, dtype=np.int32), lengths=0)):
        stream = cupy_stream(0x50)
        words = cache_kernels.update_words(change)
        assert words == 960
        cache_kernels.launch_update(change, words, table, lengths, limits, where, 32, stream)
        got = fake.launches[-1]
        assert (got.function, got.stream) == (fake.function("cache_update.960", 0), 0x50)
        assert (got.shared_bytes, got.block) == (0, (params.UPDATE_ROWS * params.WARP_THREADS, 1, 1))
        assert got.grid == (-(-change.num_changes // params.UPDATE_ROWS), 1, 1)
        assert not got.overlaps_previous
        assert len(got.leading) == 4 * words
        np.testing.assert_array_equal(np.frombuffer(got.leading, np.int32)[: len(change.packed)], change.packed)
        assert got.fields(params.UPDATE_PARAMS) == {
            "block_table": table.data.ptr,
            "cache_seqlens": lengths.data.ptr,
            "limits": limits.data.ptr,
            "where": where.data.ptr,
            "block_table_stride": 5,
            "num_changes": change.num_changes,
            "num_tokens": change.num_tokens,
            "page_size_log2": 5,
        }
    assert cache_kernels._update_launch.cache_info().misses == 2  # the second step repeats the first one's launch


def test_cache_write_reaches_the_driver(fake: FakeDriver) -> None:
    pool = gpu_array((7, 32, 1, 576), bfloat16, strides=(147456, 1152, 1152, 2))  # a layer of four
    where, fused = gpu_array((2, 9), np.int64), gpu_array((9, 640), bfloat16)
    ckv, kpe = fused[:, :512], fused[:, 512:576]
    weight = gpu_array((512,), bfloat16)
    cos, sin = gpu_array((100, 32), np.float32), gpu_array((100, 32), np.float32)
    turned = RowTransform(weight, 1e-5, cos, sin, rope_interleaved=False)
    for transform in (RowTransform(), turned, turned):
        cache_kernels.launch_write(pool, where, ckv, kpe, transform, cupy_stream(0x50))
    plain, *others = fake.launches
    for got in fake.launches:
        assert (got.function, got.stream) == (fake.function("cache_write.bfloat16", 0), 0x50)
        assert (got.grid, got.block) == ((3, 1, 1), (params.WRITE_ROWS * params.WARP_THREADS, 1, 1))
    expected = {
        "pool": pool.data.ptr,
        "ckv": fused.data.ptr,
        "kpe": fused.data.ptr + 1024,
        "where": where.data.ptr,
        "norm_weight": weight.data.ptr,
        "rope_cos": cos.data.ptr,
        "rope_sin": sin.data.ptr,
        "pool_stride_page": 73728,
        "pool_stride_row": 576,
        "ckv_stride": 640,
        "kpe_stride": 640,
        "num_slots": 224,
        "page_size_log2": 5,
        "num_tokens": 9,
        "rope_positions": 100,
        "rope_interleaved": 0,
        "norm_eps": np.float32(1e-5),
    }
    for got in others:
        assert got.fields(params.WRITE_PARAMS) == expected
    absent = dict.fromkeys(("norm_weight", "rope_cos", "rope_sin", "rope_positions"), 0)
    assert plain.fields(params.WRITE_PARAMS) == expected | absent | {
        "rope_interleaved": 1,
        "norm_eps": np.float32(1e-6),
    }
    assert cache_kernels.prepare_write.cache_info().misses == 2


# --- contexts, threads, failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("current", [None, 1])
def test_the_launch_goes_to_the_arrays_device(fake: FakeDriver, current: int | None) -> None:
    """In a new thread no context is current; elsewhere it may be another device's."""
    call = make_call()
    mla_decode(**call)
    fake.current = current
    mla_decode(**call)
    assert [launched.device for launched in fake.launches] == [0, 0]
    assert fake.current == current


def test_the_context_is_left_when_a_launch_fails(fake: FakeDriver) -> None:
    call = make_call()
    fake.current, fake.status = 1, 719
    with pytest.raises(RuntimeError, match="kernel launch failed: CUDA_ERROR_719"):
        mla_decode(**call)
    assert fake.current == 1
    fake.status = 0
    mla_decode(**call)
    assert len(fake.launches) == 1


def test_a_fork_is_told_so_after_a_prepared_launch(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call()
    mla_decode(**call)
    fake.status = 3  # what the driver answers in a fork
    for name, function in fake.real.items():
        monkeypatch.setattr(libcuda, name, function)
    monkeypatch.setattr(libcuda, "_initialised_in", [1])
    with pytest.raises(RuntimeError, match="before this process was forked"):
        mla_decode(**call)


def repeat_in_threads(calls: list[Callable[[], Any]], times: int) -> None:
    """Each call so many times in a thread of its own; none of them may fail."""
    failures: list[BaseException] = []

    def work(call: Callable[[], Any]) -> None:
        try:
            for _ in range(times):
                call()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_threads_do_not_share_parameters(fake: FakeDriver) -> None:
    """While one thread is inside the driver, others fill in their own launches."""
    fake.pause = lambda: time.sleep(0.001)
    calls = [make_call() for _ in range(8)]
    mla_decode(**calls[0])
    fake.launches.clear()
    repeat_in_threads([functools.partial(mla_decode, **call, stream=0x100 + i) for i, call in enumerate(calls)], 10)
    assert len(fake.launches) == 80
    for launched in fake.launches:
        call = calls[launched.stream - 0x100]
        fields = launched.fields(params.DECODE_PARAMS)
        assert (fields["q"], fields["lse"]) == (call["q"].data.ptr, call["lse"].data.ptr)
        assert launched.record_before == launched.record


def test_threads_may_call_one_plan_differently(fake: FakeDriver) -> None:
    """Each launches what it asked for, whatever call the plan remembers; the GPU runs them one after another."""
    plan = make_plan()
    calls = [make_call(plan=plan, block_table=gpu_array((3, columns), np.int32)) for columns in range(1, 5)]
    repeat_in_threads([functools.partial(mla_decode, **call) for call in calls], 50)
    assert len(fake.launches) == 200
    columns = {call["block_table"].data.ptr: call["block_table"].shape[1] for call in calls}
    for launched in fake.launches:
        fields = launched.fields(params.DECODE_PARAMS)
        assert fields["max_pages"] == columns[fields["block_table"]]
