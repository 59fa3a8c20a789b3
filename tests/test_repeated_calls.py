"""Which calls repeat a prepared launch, and which must not: what a plan remembers of one is never believed of another.

Arrays are CuPy's over made-up addresses; the driver library is one that writes down what it is given.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import types
import weakref
from typing import Any

import numpy as np
import pytest
from pretended_gpu import PLAN_SCRATCH, FakeDriver, gpu_array, make_call, make_plan

from mlacore import (
    attention,
    decode_checks,
    driver,
    launch,
    mla_decode,
    params,
)
from mlacore.arrays import bfloat16
from mlacore.dispatch import KernelShape

pytest.importorskip("cupy")
pytest.importorskip("cuda.bindings")


def test_other_addresses_streams_and_plans_repeat_a_launch(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, prepare = [], driver.prepare_decode
    monkeypatch.setattr(driver, "prepare_decode", lambda *given: prepared.append(given) or prepare(*given))
    for stream in (0x50, 0x51, None):
        call = make_call()
        mla_decode(**call, stream=stream)
        fields = fake.launches[-1].fields(params.DECODE_PARAMS)
        assert fields["q"] == call["q"].data.ptr
        assert fields["work"] == call["plan"].work.data.ptr
        assert fake.tensor_maps[-1][0] == call["kv_cache"].data.ptr
    assert [launched.stream for launched in fake.launches] == [0x50, 0x51, 0]
    mla_decode(**call)
    assert len(prepared) == 1
    assert len(fake.tensor_maps) == 3  # one for each pool
    assert [launched.leading[0] for launched in fake.launches] == [1, 2, 3, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"kv_cache": gpu_array((13, 64, 1, 576), bfloat16)},
        {"kv_cache": gpu_array((12, 64, 1, 576), bfloat16, strides=(147456, 1152, 1152, 2))},
        {"block_table": gpu_array((3, 5), np.int32)},
        {"block_table": gpu_array((3, 4), np.int32, strides=(64, 4))},
        {"q": gpu_array((3, 2, 128, 576), bfloat16, strides=(147456, 147456, 1152, 2))},
        {"softmax_scale": 0.5},
        {"softmax_scale": np.float32(0.25)},
        {"causal": True, "plan": make_plan(causal=True)},
        {"plan": make_plan(num_workers=8)},
        {"plan": make_plan(kernel=KernelShape(64, 1, 4))},
        {"kv_cache": gpu_array((12, 32, 1, 576), bfloat16)},
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_other_shapes_and_options_get_a_launch_of_their_own(fake: FakeDriver, change: dict[str, Any]) -> None:
    call = make_call()
    for _ in range(2):
        mla_decode(**call)
        mla_decode(**call | change)
    first, second, third, fourth = fake.launches
    for one, other in ((first, third), (second, fourth)):
        assert one.fields(params.DECODE_PARAMS) == other.fields(params.DECODE_PARAMS)
        assert (one.function, one.grid, one.stream) == (other.function, other.grid, other.stream)
    if "kv_cache" in change:
        assert fake.tensor_maps[0] != fake.tensor_maps[1]
    else:
        assert first.fields(params.DECODE_PARAMS) != second.fields(params.DECODE_PARAMS) or first.grid != second.grid
    assert len(attention._prepared) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": gpu_array((3, 2, 128, 576), bfloat16, offset=8)}, r"q: got address 0x\w+8, expected a multiple of 16"),
        ({"kv_cache": gpu_array((12, 64, 1, 576), bfloat16, offset=8)}, r"kv_cache: got address 0x\w+8"),
        ({"out": gpu_array((3, 2, 128, 512), bfloat16, offset=8)}, r"out: got address 0x\w+8"),
        ({"q": gpu_array((3, 2, 128, 576), bfloat16, strides=(294912, 147456, 1156, 2))}, "q: got strides"),
        ({"lse": gpu_array((3, 128, 2), np.float32, strides=(4, 8, 4))}, "lse: got strides"),
        ({"lse": gpu_array((3, 128, 2), np.int32)}, "lse: got dtype int32"),
        ({"lse": gpu_array((3, 128, 3), np.float32)}, "lse: got shape"),
        ({"block_table": gpu_array((3, 4), np.int32, device=1)}, "block_table: got an array on cuda:1"),
        ({"lse": np.empty((3, 128, 2), np.float32)}, "lse: got NumPy"),
        ({"q": None}, "q: got NoneType"),
        ({"plan": make_plan(batch=4)}, "plan: got a plan for batch=4"),
        ({"plan": make_plan(causal=True)}, "plan: got a plan for causal=True"),
        ({"plan": make_plan(device=1)}, "plan: got a plan for cuda:1"),
        ({"plan": ()}, "plan: got tuple"),
        ({"causal": 0}, "causal: got int"),
        ({"causal": []}, "causal: got list"),
        ({"causal": np.array([False, False])}, "causal: got ndarray"),
        ({"head_dim_v": 512.0}, None),
        ({"softmax_scale": True}, "softmax_scale: got bool"),
        ({"softmax_scale": [1.0]}, "softmax_scale: got list"),
        ({"softmax_scale": np.array([1.0, 1.0])}, "softmax_scale: got ndarray"),
        ({"softmax_scale": float("nan")}, "softmax_scale: got nan"),
        ({"stream": "default"}, "stream: got str"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_named_after_the_right_call(fake: FakeDriver, change: dict[str, Any], message: str | None) -> None:
    call = make_call(softmax_scale=1.0)
    mla_decode(**call)
    with pytest.raises((TypeError, ValueError), match=message):
        mla_decode(**call | change)
    assert len(fake.launches) == 1
    mla_decode(**call)
    assert len(fake.launches) == 2


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("q", (3, 128, 2, 576)),
        ("kv_cache", (12, 1, 64, 576)),
        ("block_table", (4, 3)),
        ("cache_seqlens", (1, 3)),
        ("out", (3, 128, 2, 512)),
        ("lse", (3, 2, 128)),
    ],
)
def test_a_changed_array_is_checked_again(fake: FakeDriver, name: str, shape: tuple[int, ...]) -> None:
    """Arrays are told apart by what they are, not by which object they are."""
    call = make_call()
    mla_decode(**call)
    before = call[name].shape
    call[name].shape = shape
    with pytest.raises(ValueError, match=r"got shape|page_size=1 ") as after_a_call:
        mla_decode(**call)
    with pytest.raises(ValueError, match=r"got shape|page_size=1 ") as at_first:
        mla_decode(**call | {"plan": dataclasses.replace(call["plan"])})
    assert str(after_a_call.value) == str(at_first.value)
    call[name].shape = before
    mla_decode(**call)
    assert len(fake.launches) == 2


def test_only_a_new_shape_is_checked(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's new plan is not checked again, nor are calls that take turns with one plan."""
    checked, check = [], decode_checks.check_call
    monkeypatch.setattr(decode_checks, "check_call", lambda *given: checked.append(given) or check(*given))
    call = make_call()
    for _ in range(3):
        plan = make_plan()
        for change in ({}, {"block_table": gpu_array((3, 5), np.int32)}) * 2:
            mla_decode(**call | change | {"plan": plan})
            fields = fake.launches[-1].fields(params.DECODE_PARAMS)
            assert (fields["work"], fields["launches"]) == (plan.work.data.ptr, plan.launches.data.ptr)
    assert len(checked) == 2


def test_results_are_checked_where_the_last_call_gave_none(fake: FakeDriver) -> None:
    """What stands for buffers that are not given is never taken for a buffer."""
    call = make_call()
    mla_decode(**call | {"out": None, "lse": None})
    for name in ("out", "lse"):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: got "):
            mla_decode(**call | {"out": None, "lse": None, name: call["q"]})
    assert len(fake.launches) == 1


def test_strides_that_no_index_reaches_do_not_matter(fake: FakeDriver) -> None:
    call = make_call()
    for strides in (None, (73728, 1152, 6, 2)):  # the one KV head's
        mla_decode(**call | {"kv_cache": gpu_array((12, 64, 1, 576), bfloat16, strides=strides)})
    first, second = (launched.fields(params.DECODE_PARAMS) for launched in fake.launches)
    assert first | {"kv": None} == second | {"kv": None}
    first, second = fake.tensor_maps
    assert first[1:] == second[1:]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (np.empty(3, np.int32), "cache_seqlens: got a NumPy array"),
        (gpu_array((4,), np.int32), r"cache_seqlens: got shape \(4,\)"),
        (gpu_array((3, 1), np.int32), r"cache_seqlens: got shape \(3, 1\)"),
        (gpu_array((3,), np.uint32), "cache_seqlens: got dtype uint32"),
        (gpu_array((3,), np.int32, strides=(8,)), "cache_seqlens: got strides"),
        (gpu_array((3,), np.int32, device=1), "cache_seqlens: got cuda:1"),
    ],
)
def test_a_mistake_is_named_after_the_right_update(fake: FakeDriver, lengths: Any, message: str) -> None:
    plan, right = make_plan(), gpu_array((3,), np.int32)
    plan.update(right)
    with pytest.raises((TypeError, ValueError), match=message):
        plan.update(lengths)
    with pytest.raises(TypeError, match="stream: got str"):
        plan.update(right, stream="default")
    assert len(fake.launches) == 1
    assert plan.planned_seqlens is right


def test_one_sequence_of_any_stride_is_planned(fake: FakeDriver) -> None:
    plan, lengths = make_plan(batch=1), gpu_array((1,), np.int32, strides=(400,))
    plan.update(lengths)
    assert fake.launches[0].fields(params.PLAN_PARAMS)["cache_seqlens"] == lengths.data.ptr


@pytest.mark.parametrize(
    "made_from",
    [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan)), dataclasses.replace],
    ids=["copy", "deepcopy", "pickle", "replace"],
)
def test_what_is_made_from_a_plan_remembers_nothing_of_it(fake: FakeDriver, made_from: Any) -> None:
    def memory(address: int) -> Any:
        """As much of an array as launches use; it can be pickled."""
        return types.SimpleNamespace(data=types.SimpleNamespace(ptr=address))

    names = ("work", "splits", *PLAN_SCRATCH)
    plan = make_plan(**{name: memory(0x1000 * i) for i, name in enumerate(names)})
    call = make_call(plan=plan)
    for _ in range(2):
        plan.update(call["cache_seqlens"])
        mla_decode(**call)
    object.__setattr__(plan, "planned_seqlens", None)  # a real array
    other = made_from(plan)
    for i, name in enumerate(names):
        getattr(plan, name).data.ptr = 0  # not looked at again
        object.__setattr__(other, name, memory(0x2000 * i))
    other.update(call["cache_seqlens"])
    mla_decode(**call | {"plan": other})
    planned, decoded = fake.launches[-2:]
    assert planned.fields(params.PLAN_PARAMS)["work"] == 0
    assert planned.fields(params.PLAN_PARAMS)["splits"] == 0x2000
    fields = decoded.fields(params.DECODE_PARAMS)
    assert [fields[name] for name in names] == [0x2000 * i for i in range(len(names))]


def test_check_switch_is_asked_every_time(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    call, checked = make_call(), []
    monkeypatch.setattr(decode_checks, "check_indices", lambda *arguments: checked.append(arguments))
    for value, times in (("0", 0), ("1", 1), ("1", 2), ("0", 2)):
        monkeypatch.setenv("MLACORE_CHECK", value)
        mla_decode(**call, stream=0x50)
        assert len(checked) == times
    monkeypatch.delenv("MLACORE_CHECK")
    mla_decode(**call)
    assert len(checked) == 2
    table, lengths, *rest = checked[0]
    assert table is call["block_table"]
    assert lengths is call["cache_seqlens"]
    assert rest == [12, 64, 0x50]


def test_nothing_keeps_a_plan_or_an_array(fake: FakeDriver) -> None:
    memory = gpu_array((3, 2, 128, 576), bfloat16)
    owner = weakref.ref(memory.data.mem._owner)
    call = make_call(q=memory)
    work = weakref.ref(call["plan"].work.data.mem._owner)
    mla_decode(**call)
    del call, memory
    gc.collect()
    assert (owner(), work()) == (None, None)


def test_the_caches_are_bounded(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_MAX_PREPARED", 4)
    for columns in [*range(1, 12), 1]:
        mla_decode(**make_call(block_table=gpu_array((3, columns), np.int32)))
        assert len(attention._prepared) <= 4
    assert [launched.fields(params.DECODE_PARAMS)["max_pages"] for launched in fake.launches] == [*range(1, 12), 1]
    maps = launch.tensor_maps(0, "bfloat16", (64, 64, 9, 1, 12), (1152, 128, 1152, 73728), (64, 32, 1, 1, 1))
    for address in range(0, 300 * 16, 16):
        maps(address)
    assert maps.cache_info().currsize == maps.cache_info().maxsize == 256  # type: ignore[attr-defined]
