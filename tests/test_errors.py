"""Every mistake a caller can make is named before anything is launched: argument, got, expected, where from.

GPU arrays are CuPy arrays over made-up addresses, which need neither a GPU nor a driver until somebody touches them;
`mlacore.driver` is replaced by one that fails the test when it is reached.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import Case, make_inputs
from pretended_gpu import gpu_array

import mlacore
from mlacore import DecodePlan, arrays, attention, merge_states, mla_decode, plan_decode, shapes
from mlacore.arrays import bfloat16
from mlacore.dispatch import KernelShape

Make = Callable[..., Any]
HEAD_DIM = "head_dim=576 (kv_lora_rank 512 + qk_rope_head_dim 64)"


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A driver that must not be reached."""

    def launch(*arguments: Any) -> None:
        raise AssertionError("the call reached the driver")

    module = types.SimpleNamespace(num_sms=lambda device: 132, prepare_plan=launch, prepare_decode=launch)
    monkeypatch.setitem(sys.modules, "mlacore.driver", module)  # type: ignore[misc]
    monkeypatch.setattr(mlacore, "driver", module, raising=False)
    monkeypatch.setattr(attention, "_prepared", {})
    return module


def numpy_array(shape: tuple[int, ...], dtype: Any, *, strides: Any = None, offset: int = 0) -> Any:
    """NumPy array at `offset` bytes past an aligned address, like `gpu_array`. Nobody may touch its values."""
    buffer = np.empty(1 << 16, np.uint8)
    start = -buffer.ctypes.data % 256 + offset
    if strides is None:
        strides = np.empty(0, dtype).itemsize * np.cumprod([1, *shape[:0:-1]])[: len(shape)][::-1]
    flat = buffer[start : start + 64].view(dtype)[:1]
    return np.lib.stride_tricks.as_strided(flat, shape, tuple(map(int, strides)))


@pytest.fixture(params=["numpy", "gpu"])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes arrays on either side; tests that take it run on both."""
    if request.param == "gpu":
        pytest.importorskip("cupy")
    return numpy_array if request.param == "numpy" else gpu_array


def arguments(make: Make) -> dict[str, Any]:
    """A valid call: 3 sequences, 2 queries, 16 heads, 12 pages, 4 columns."""
    return {
        "q": make((3, 2, 16, 576), bfloat16),
        "kv_cache": make((12, 64, 1, 576), bfloat16),
        "block_table": make((3, 4), np.int32),
        "cache_seqlens": make((3,), np.int32),
    }


def gpu_plan(device: int = 0) -> DecodePlan:
    names = ("work", "splits", "partial_out", "partial_lse", "merge_counters", "merge_abandoned", "launches")
    arrays_of_plan = {name: gpu_array((5, 2), np.int32) for name in names}
    return DecodePlan(3, 2, 16, 1, False, 4, device, kernel=KernelShape(32, 1, 1), **arrays_of_plan)


def raises(kind: type[Exception], message: str) -> Any:
    return pytest.raises(kind, match="^" + re.escape(message))


# --- shapes and dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "shape", "expected"),
    [
        ("block_table", (4, 7), "(batch, max_pages) with batch=3 (from cache_seqlens)"),
        ("block_table", (3,), "(batch, max_pages) with batch=3 (from cache_seqlens)"),
        ("block_table", (3, 0), "(batch, max_pages) with batch=3 (from cache_seqlens), every size at least 1"),
        ("cache_seqlens", (3, 1), "(batch,)"),
        ("cache_seqlens", (), "(batch,)"),
        ("cache_seqlens", (0,), "(batch,), every size at least 1"),
        ("q", (3, 16, 576), f"(batch, seq_len_q, num_heads, head_dim) with batch=3 (from cache_seqlens), {HEAD_DIM}"),
        ("q", (2, 2, 16, 576), "(batch, seq_len_q, num_heads, head_dim) with batch=3 (from cache_seqlens)"),
        (
            "q",
            (3, 2, 16, 512),
            f"(batch, seq_len_q, num_heads, head_dim) with batch=3 (from cache_seqlens), {HEAD_DIM}",
        ),
        ("q", (3, 2, 0, 576), "(batch, seq_len_q, num_heads, head_dim) with batch=3"),
        ("kv_cache", (12, 64, 576), f"(num_pages, page_size, num_kv_heads, head_dim) with {HEAD_DIM}"),
        ("kv_cache", (12, 64, 1, 656), f"(num_pages, page_size, num_kv_heads, head_dim) with {HEAD_DIM}"),
        ("kv_cache", (0, 64, 1, 576), f"(num_pages, page_size, num_kv_heads, head_dim) with {HEAD_DIM}"),
        (
            "out",
            (3, 2, 16, 576),
            "(batch, seq_len_q, num_heads, head_dim_v) with batch=3 (from cache_seqlens), seq_len_q=2 (from q), "
            "num_heads=16 (from q), head_dim_v=512 (kv_lora_rank)",
        ),
        ("out", (6, 16, 512), "(batch, seq_len_q, num_heads, head_dim_v) with batch=3 (from cache_seqlens)"),
        (
            "lse",
            (3, 2, 16),
            "(batch, num_heads, seq_len_q) with batch=3 (from cache_seqlens), num_heads=16 (from q), "
            "seq_len_q=2 (from q)",
        ),
    ],
)
def test_wrong_shape(make: Make, argument: str, shape: tuple[int, ...], expected: str) -> None:
    dtype = {"block_table": np.int32, "cache_seqlens": np.int32, "lse": np.float32}.get(argument, bfloat16)
    with raises(ValueError, f"{argument}: got shape {shape}, expected {expected}"):
        mla_decode(**arguments(make) | {argument: make(shape, dtype)})


@pytest.mark.parametrize("page_size", [1, 48, 512])
def test_wrong_page_size(make: Make, page_size: int) -> None:
    wrong = make((12, page_size, 1, 576), bfloat16)
    message = (
        f"kv_cache: got page_size={page_size} (shape (12, {page_size}, 1, 576)), expected one of 16, 32, 64, 128, 256"
    )
    with raises(ValueError, message):
        mla_decode(**arguments(make) | {"kv_cache": wrong})


def test_kv_heads_must_divide_heads(make: Make) -> None:
    wrong = make((12, 64, 3, 576), bfloat16)
    with raises(ValueError, "kv_cache: got num_kv_heads=3, expected a divisor of num_heads=16 (from q)"):
        mla_decode(**arguments(make) | {"kv_cache": wrong})


@pytest.mark.parametrize("head_dim_v", [256, 576, None])
def test_wrong_head_dim_v(make: Make, head_dim_v: Any) -> None:
    with raises(ValueError, f"head_dim_v: got {head_dim_v}, expected 512 (kv_lora_rank)"):
        mla_decode(**arguments(make), head_dim_v=head_dim_v)


@pytest.mark.parametrize(
    ("argument", "dtype", "expected"),
    [
        ("q", np.int8, "int8, expected bfloat16 or float16"),
        ("q", np.float64, "float64, expected bfloat16 or float16"),
        ("kv_cache", np.float16, "float16, expected bfloat16 (from q)"),
        ("kv_cache", np.uint8, "uint8, expected bfloat16 (from q)"),
        ("block_table", np.int64, "int64, expected int32 (page ids are int32)"),
        ("cache_seqlens", np.int64, "int64, expected int32 (lengths are int32)"),
        ("cache_seqlens", np.uint32, "uint32, expected int32 (lengths are int32)"),
        ("out", np.float32, "float32, expected bfloat16 (from q)"),
        ("lse", np.float64, "float64, expected float32 (lse is float32)"),
    ],
)
def test_wrong_dtype(make: Make, argument: str, dtype: Any, expected: str) -> None:
    shape = {"out": (3, 2, 16, 512), "lse": (3, 16, 2)}.get(argument) or arguments(make)[argument].shape
    with raises(TypeError, f"{argument}: got dtype {expected}"):
        mla_decode(**arguments(make) | {argument: make(shape, dtype)})


def test_float32_is_for_numpy() -> None:
    call = arguments(gpu_array) | {"q": gpu_array((3, 2, 16, 576), np.float32)}
    with raises(TypeError, "q: got dtype float32, expected bfloat16 or float16 (what the GPU kernels take)"):
        mla_decode(**call)


# --- strides and alignment -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "shape", "strides", "expected"),
    [
        (
            "q",
            (3, 2, 16, 576),
            (36864, 18432, 2, 32),
            "expected the last axis contiguous (2 bytes) and no negative stride",
        ),
        ("q", (3, 2, 16, 576), (37120, 18560, 1156, 2), "expected multiples of 16 bytes but for the last axis"),
        ("kv_cache", (12, 64, 1, 576), (73728, 1160, 1160, 2), "expected multiples of 16 bytes but for the last axis"),
        ("kv_cache", (12, 64, 1, 576), (73736, 1152, 1152, 2), "expected multiples of 16 bytes but for the last axis"),
        ("kv_cache", (12, 64, 1, 576), (147456, 2304, 2304, 4), "expected the last axis contiguous (2 bytes)"),
        (
            "kv_cache",
            (12, 64, 1, 576),
            (-73728, 1152, 1152, 2),
            "expected the last axis contiguous (2 bytes) and no neg",
        ),
        ("block_table", (3, 4), (4, 12), "expected the last axis contiguous (4 bytes) and no negative stride"),
        ("cache_seqlens", (3,), (8,), "expected a C-contiguous array"),
        ("out", (3, 2, 16, 512), (65536, 32768, 2048, 2), "expected a C-contiguous array"),
        ("lse", (3, 16, 2), (128, 4, 64), "expected a C-contiguous array"),
    ],
)
def test_wrong_strides(
    make: Make, argument: str, shape: tuple[int, ...], strides: tuple[int, ...], expected: str
) -> None:
    dtype = {"block_table": np.int32, "cache_seqlens": np.int32, "lse": np.float32}.get(argument, bfloat16)
    with raises(ValueError, f"{argument}: got strides {strides} bytes, {expected}"):
        mla_decode(**arguments(make) | {argument: make(shape, dtype, strides=strides)})


@pytest.mark.parametrize("argument", ["q", "kv_cache", "out"])
def test_wrong_alignment(make: Make, argument: str) -> None:
    shape = {"q": (3, 2, 16, 576), "kv_cache": (12, 64, 1, 576), "out": (3, 2, 16, 512)}[argument]
    with pytest.raises(ValueError, match=rf"^{argument}: got address 0x[0-9a-f]+8, expected a multiple of 16 bytes"):
        mla_decode(**arguments(make) | {argument: make(shape, bfloat16, offset=8)})


def test_free_strides_reach_the_driver(driver: Any) -> None:
    """Interleaved layers, sliced queries and tables, and any stride on axes of length 1: none of it is a mistake."""
    cupy = pytest.importorskip("cupy")
    prepared, launched = [], []

    def prepare(*arguments: Any) -> Any:
        prepared.append(arguments)
        return types.SimpleNamespace(
            at=lambda *arguments: launched.append(arguments), addresses_of=lambda plan: (b"", b"")
        )

    driver.prepare_decode = prepare
    call = {
        "q": gpu_array((3, 2, 16, 576), bfloat16, strides=(65536, 32768, 1168, 2)),
        "kv_cache": gpu_array((12, 64, 1, 576), bfloat16, strides=(60 * 73728, 1280, 6, 2)),
        "block_table": gpu_array((3, 4), np.int32, strides=(400, 4)),
        "cache_seqlens": gpu_array((3,), np.int32),
        "out": gpu_array((3, 2, 16, 512), bfloat16),
        "lse": gpu_array((3, 16, 2), np.float32),
    }
    plan, stream = gpu_plan(), cupy.cuda.Stream.null
    out, lse = mla_decode(**call, plan=plan, softmax_scale=0.5, stream=stream)
    assert out is call["out"]
    assert lse is call["lse"]
    inputs = [call[name] for name in ("q", "kv_cache", "block_table", "cache_seqlens")]
    assert [id(got) for got in prepared[0][:4]] == [id(array) for array in (*inputs[:3], plan)]
    assert prepared[0][4:] == (0.5, False)
    assert launched == [(stream.ptr, (*(a.data.ptr for a in inputs), b"", out.data.ptr, lse.data.ptr, b""))]


# --- which side, which device ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["q", "kv_cache", "block_table", "cache_seqlens", "out", "lse"])
@pytest.mark.parametrize(("mine", "other"), [(numpy_array, gpu_array), (gpu_array, numpy_array)])
def test_numpy_mixed_with_gpu(argument: str, mine: Make, other: Make) -> None:
    pytest.importorskip("cupy")
    buffers = {"out": mine((3, 2, 16, 512), bfloat16), "lse": mine((3, 16, 2), np.float32)}
    stranger = {"out": other((3, 2, 16, 512), bfloat16), "lse": other((3, 16, 2), np.float32)} | arguments(other)
    call = arguments(mine) | buffers | {argument: stranger[argument]}
    rest = ", ".join(name for name in call if name != argument)
    host, device = (rest, argument) if mine is numpy_array else (argument, rest)
    with raises(TypeError, f"{host}: got NumPy, expected GPU arrays, as {device} came on a GPU"):
        mla_decode(**call)


@pytest.mark.parametrize("argument", ["kv_cache", "block_table", "cache_seqlens", "out", "lse"])
def test_two_gpus(argument: str) -> None:
    buffers = {"out": ((3, 2, 16, 512), bfloat16), "lse": ((3, 16, 2), np.float32)}
    shape, dtype = buffers.get(argument) or (
        arguments(numpy_array)[argument].shape,
        arguments(numpy_array)[argument].dtype,
    )
    with raises(ValueError, f"{argument}: got an array on cuda:1, expected cuda:0 (from q)"):
        mla_decode(**arguments(gpu_array) | {argument: gpu_array(shape, dtype, device=1)})


@pytest.mark.parametrize("wrong", [[1, 2, 3], 7, "text", None])
def test_not_an_array(make: Make, wrong: Any) -> None:
    with raises(TypeError, f"cache_seqlens: got {type(wrong).__name__}, expected a NumPy array or a GPU array (CuPy"):
        mla_decode(**arguments(make) | {"cache_seqlens": wrong})
    with raises(TypeError, f"cache_seqlens: got {type(wrong).__name__}, expected a NumPy array or a GPU array (CuPy"):
        plan_decode(wrong, num_heads=16)


class Foreign:
    """An array of another library, as far as its protocols show."""

    def __init__(self, device_type: int) -> None:
        self.device_type = device_type

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self.device_type, 0)

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("no capsule")


def test_foreign_array_in_cpu_memory() -> None:
    with raises(
        TypeError, "q: got Foreign in CPU memory (numpy.asarray views it), expected a NumPy array or a GPU array"
    ):
        mla_decode(**arguments(numpy_array) | {"q": Foreign(device_type=1)})


@pytest.mark.parametrize("device_type", [2, 13])
def test_foreign_array_on_a_gpu_is_imported(monkeypatch: pytest.MonkeyPatch, device_type: int) -> None:
    """By DLPack, the same memory; its shape is checked like any other."""
    cupy = pytest.importorskip("cupy")
    foreign = Foreign(device_type)
    imported = {id(foreign): gpu_array((3, 2, 16, 512), bfloat16)}
    monkeypatch.setattr(cupy, "from_dlpack", lambda array: imported[id(array)])
    assert arrays.to_device("q", foreign) is imported[id(foreign)]
    with raises(ValueError, "q: got shape (3, 2, 16, 512)"):
        mla_decode(**arguments(gpu_array) | {"q": foreign})


def test_foreign_array_is_ordered_before_the_calls_stream_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy orders by the stream that is current on the array's device: there the call's own must be current."""
    cupy = pytest.importorskip("cupy")
    entered: list[Any] = []

    class Entered:
        def __init__(self, what: Any) -> None:
            self.what = what

        def __enter__(self) -> None:
            entered.append(self.what)

        def __exit__(self, *_: object) -> None:
            entered.pop()

    monkeypatch.setattr(cupy.cuda, "Device", Entered)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(cupy, "from_dlpack", lambda array: [*entered])
    foreign = Foreign(device_type=2)
    monkeypatch.setattr(Foreign, "__dlpack_device__", lambda self: (2, 1))
    assert arrays.to_device("q", foreign, Entered("stream")) == [1, "stream"]
    assert arrays.to_device("q", foreign) == []


def test_foreign_array_that_cupy_cannot_view(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(cupy, "from_dlpack", lambda array: array.__dlpack__())
    with raises(TypeError, "q: got Foreign that CuPy cannot view: no capsule"):
        mla_decode(**arguments(gpu_array) | {"q": Foreign(device_type=2)})


def test_cuda_array_interface_without_dlpack(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(cupy, "asarray", lambda array: "imported")
    foreign = types.SimpleNamespace(__cuda_array_interface__={})
    assert arrays.is_gpu(foreign)
    assert arrays.to_device("q", foreign) == "imported"


def test_gpu_array_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # type: ignore[arg-type]
    foreign = Foreign(device_type=2)
    with pytest.raises(ImportError, match=r"^GPU arrays need CuPy.*pip install 'cupy-cuda13x"):
        mla_decode(foreign, foreign, foreign, foreign)


def test_streams() -> None:
    cupy = pytest.importorskip("cupy")
    with raises(TypeError, "stream: got Stream, expected None (NumPy arrays have no stream)"):
        mla_decode(**arguments(numpy_array), stream=cupy.cuda.Stream.null)
    with raises(TypeError, "stream: got str, expected a CuPy stream, a cudaStream_t as int"):
        mla_decode(**arguments(gpu_array), stream="default")
    assert arrays.as_stream(cupy.cuda.Stream.null) is cupy.cuda.Stream.null


# --- scale and plan --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0, 0.0, -0.1, float("nan"), float("inf"), -float("inf"), 1e-60, 1e60])
def test_unusable_scale(make: Make, scale: float) -> None:
    with raises(
        ValueError, f"softmax_scale: got {float(scale)!r}, expected a finite float32 > 0 (the default is 576**-0.5)"
    ):
        mla_decode(**arguments(make), softmax_scale=scale)


@pytest.mark.parametrize("scale", ["1", True, [0.1], 1j])
def test_scale_is_no_number(make: Make, scale: Any) -> None:
    with raises(TypeError, f"softmax_scale: got {type(scale).__name__}, expected a number or None"):
        mla_decode(**arguments(make), softmax_scale=scale)


def test_usable_scales() -> None:
    assert shapes.resolve_scale(None, 576) == 576**-0.5
    assert shapes.resolve_scale(np.float32(0.5), 576) == 0.5
    assert shapes.resolve_scale(2, 576) == 2.0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"batch": 4}, "batch=4, expected batch=3 (from cache_seqlens)"),
        ({"seq_len_q": 1}, "seq_len_q=1, expected seq_len_q=2 (from q)"),
        ({"num_heads": 128}, "num_heads=128, expected num_heads=16 (from q)"),
        ({"num_kv_heads": 2}, "num_kv_heads=2, expected num_kv_heads=1 (from kv_cache)"),
        ({"causal": True}, "causal=True, expected causal=False (from this call)"),
    ],
)
def test_plan_for_another_shape(make: Make, change: dict[str, Any], expected: str) -> None:
    shape = {"batch": 3, "seq_len_q": 2, "num_heads": 16, "num_kv_heads": 1, "causal": False} | change
    device = None if make is numpy_array else 0
    plan = DecodePlan(**shape, num_workers=4, device=device, work=None, splits=None)
    with raises(ValueError, f"plan: got a plan for {expected}"):
        mla_decode(**arguments(make), plan=plan)


def test_plan_for_another_device() -> None:
    with raises(ValueError, "plan: got a plan for NumPy, expected one for cuda:0 (from q)"):
        mla_decode(**arguments(gpu_array), plan=DecodePlan(3, 2, 16, 1, False, 4, None, None, None))
    with raises(ValueError, "plan: got a plan for cuda:1, expected one for cuda:0 (from q)"):
        mla_decode(**arguments(gpu_array), plan=gpu_plan(device=1))
    with raises(ValueError, "plan: got a plan for cuda:0, expected one for NumPy (from q)"):
        mla_decode(**arguments(numpy_array), plan=gpu_plan())


def test_plan_is_no_plan(make: Make) -> None:
    with raises(TypeError, "plan: got tuple, expected a DecodePlan (from plan_decode) or None"):
        mla_decode(**arguments(make), plan=(1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_heads": 0}, ValueError, "num_heads: got 0, expected at least 1"),
        ({"num_heads": 2.5}, TypeError, "num_heads: got float 2.5, expected an integer"),
        ({"num_heads": 16, "seq_len_q": 0}, ValueError, "seq_len_q: got 0, expected at least 1"),
        ({"num_heads": 16, "seq_len_q": None}, TypeError, "seq_len_q: got NoneType None, expected an integer"),
        ({"num_heads": 16, "num_kv_heads": -1}, ValueError, "num_kv_heads: got -1, expected at least 1"),
        ({"num_heads": 16, "num_kv_heads": 3}, ValueError, "num_kv_heads: got 3, expected a divisor of num_heads=16"),
        ({"num_heads": 16, "num_workers": 0}, ValueError, "num_workers: got 0, expected at least 1"),
        ({"num_heads": 16, "num_workers": "4"}, TypeError, "num_workers: got str '4', expected an integer"),
    ],
)
def test_plan_options(make: Make, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with raises(kind, message):
        plan_decode(make((3,), np.int32), **options)


def test_plan_lengths(make: Make) -> None:
    with raises(ValueError, "cache_seqlens: got shape (3, 1), expected (batch,)"):
        plan_decode(make((3, 1), np.int32), num_heads=16)
    with raises(TypeError, "cache_seqlens: got dtype int64, expected int32"):
        plan_decode(make((3,), np.int64), num_heads=16)
    with raises(ValueError, "cache_seqlens: got strides (8,) bytes, expected a C-contiguous array"):
        plan_decode(make((3,), np.int32, strides=(8,)), num_heads=16)


def test_plan_update() -> None:
    plan = plan_decode(np.array([5, 6, 7], np.int32), num_heads=16)
    with raises(ValueError, "cache_seqlens: got shape (4,), expected (batch,) with batch=3 (from the plan)"):
        plan.update(np.zeros(4, np.int32))
    with raises(TypeError, "cache_seqlens: got dtype int64, expected int32"):
        plan.update(np.zeros(3, np.int64))
    with raises(TypeError, "cache_seqlens: got a GPU array, expected one on NumPy (from the plan)"):
        plan.update(gpu_array((3,), np.int32))
    with raises(TypeError, "stream: got int, expected None"):
        plan.update(np.zeros(3, np.int32), stream=1)
    with raises(TypeError, "cache_seqlens: got a NumPy array, expected one on cuda:0 (from the plan)"):
        gpu_plan().update(np.zeros(3, np.int32))
    with raises(ValueError, "cache_seqlens: got shape (2,), expected (batch,) with batch=3 (from the plan)"):
        gpu_plan().update(gpu_array((2,), np.int32))
    with raises(ValueError, "cache_seqlens: got cuda:1, expected cuda:0 (from the plan)"):
        gpu_plan().update(gpu_array((3,), np.int32, device=1))


# --- the rest --------------------------------------------------------------------------------------------------------


def test_read_only_buffers() -> None:
    inputs = make_inputs(Case(3, 2, 200, 16))
    out, lse = mla_decode(*inputs)
    out.setflags(write=False)
    with raises(ValueError, "out: got a read-only array, expected a writable one"):
        mla_decode(*inputs, out=out)
    lse.setflags(write=False)
    with raises(ValueError, "lse: got a read-only array, expected a writable one"):
        mla_decode(*inputs, lse=lse)


class ReadOnly(Foreign):
    """A GPU array whose capsule is NumPy's: read-only as the array behind it."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(device_type=2)
        self.array, self.streams = array, []  # type: ignore[var-annotated]

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        self.streams.append(stream)
        return self.array.__dlpack__(max_version=max_version)


class Interface:
    """A GPU array that knows ``__cuda_array_interface__`` alone."""

    def __init__(self, is_read_only: bool) -> None:
        self.__cuda_array_interface__ = {"data": (4096, is_read_only)}


@pytest.mark.parametrize("argument", ["out", "lse"])
@pytest.mark.parametrize("library", ["dlpack", "interface", "jax"])
def test_read_only_gpu_buffers(monkeypatch: pytest.MonkeyPatch, driver: Any, argument: str, library: str) -> None:
    """Nothing is imported, let alone launched."""
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(cupy, "from_dlpack", None)
    array = np.zeros(4, np.float32)
    array.setflags(write=False)
    buffer = {"dlpack": ReadOnly(array), "interface": Interface(True), "jax": Foreign(device_type=2)}[library]
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(Array=Foreign if library == "jax" else str))  # type: ignore[arg-type]
    with raises(ValueError, f"{argument}: got a read-only array, expected a writable one"):
        mla_decode(**arguments(gpu_array) | {argument: buffer})
    if library == "dlpack":
        assert buffer.streams == [-1]  # it asks for no synchronisation


def test_writable_gpu_buffers_pass() -> None:
    for buffer in (ReadOnly(np.zeros(4, np.float32)), Interface(False), Foreign(device_type=2)):
        arrays.check_writable("out", buffer)
    arrays.check_writable("out", gpu_array((4,), np.float32))


def test_looking_at_a_capsule_keeps_nothing_alive() -> None:
    array = np.zeros(4, np.float32)
    count = sys.getrefcount(array)
    for _ in range(5):
        arrays.check_writable("out", ReadOnly(array))
    assert sys.getrefcount(array) == count


def test_merge_states(make: Make) -> None:
    out, lse = make((3, 2, 16, 512), bfloat16), make((3, 16, 2), np.float32)
    with raises(ValueError, "lses: got 1 parts, expected as many as outs has (2), and at least 1"):
        merge_states([out, out], [lse])
    with raises(ValueError, "lses: got 0 parts, expected as many as outs has (0), and at least 1"):
        merge_states([], [])
    with raises(
        ValueError, "lses[1]: got shape (3, 2, 16), expected (batch, num_heads, seq_len_q) with batch=3 (from outs[0])"
    ):
        merge_states([out, out], [lse, make((3, 2, 16), np.float32)])
    with raises(ValueError, "outs[0]: got shape (16, 512), expected (batch, seq_len_q, num_heads, head_dim_v)"):
        merge_states([make((16, 512), bfloat16)], [lse])
    with raises(TypeError, "outs[1]: got dtype float16, expected bfloat16 (from outs[0])"):
        merge_states([out, make((3, 2, 16, 512), np.float16)], [lse, lse])
    with raises(TypeError, "lses[0]: got dtype float64, expected float32 (lse is float32)"):
        merge_states([out], [make((3, 16, 2), np.float64)])
    with raises(TypeError, "outs[0]: got dtype int32, expected bfloat16 or float16 or float32"):
        merge_states([make((3, 2, 16, 512), np.int32)], [lse])
    with raises(TypeError, "outs[0]: got NoneType, expected a NumPy array or a GPU array"):
        merge_states([None], [lse])


def test_merge_states_mixed() -> None:
    parts = [make((3, 2, 16, 512), bfloat16) for make in (numpy_array, gpu_array)]
    lses = [make((3, 16, 2), np.float32) for make in (numpy_array, gpu_array)]
    with raises(TypeError, "outs[0], lses[0]: got NumPy, expected GPU arrays, as outs[1], lses[1] came on a GPU"):
        merge_states(parts, lses)
    other = gpu_array((3, 2, 16, 512), bfloat16, device=1)
    with raises(ValueError, "outs[1]: got an array on cuda:1, expected cuda:0 (from outs[0])"):
        merge_states([parts[1], other], [lses[1], lses[1]])


@pytest.mark.parametrize("dtype", ["float64", "bf16", "int8", np.int32, object(), None])
def test_unknown_dtype_name(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"^dtype: got .*, expected bfloat16, float16, float32"):
        arrays.as_dtype(dtype)


def test_dtype_names() -> None:
    for name in ("bfloat16", "float16", "float32"):
        assert arrays.as_dtype(name).name == name
        assert arrays.as_dtype(arrays.as_dtype(name)).name == name
    assert arrays.as_dtype(np.float16) == np.float16


def test_dims_bind_nothing_when_they_refuse() -> None:
    dims = shapes.Dims()
    with pytest.raises(ValueError, match=r"x: got shape \(2, 3\), expected \(n, n\)"):
        dims.match("x", (2, 3), ("n", "n"))
    dims.match("y", (7, 5), ("n", 5))
    assert (dims["n"], dims.source("n")) == (7, "from y")
    with raises(ValueError, "z: got shape (7, 4), expected (n, 5) with n=7 (from y)"):
        dims.match("z", (7, 4), ("n", 5))
