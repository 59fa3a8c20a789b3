"""FlashMLA's calls: signatures and semantics in NumPy against the oracle; on GPU arrays, what reaches the driver."""

from __future__ import annotations

import inspect
import re
import sys
import types
from typing import Any

import numpy as np
import pytest
from cases import CORNERS, TINY, Case, Inputs, cost, make_inputs
from compare import LSE_RULE, OUT_RULES, assert_close
from pretended_gpu import FakeDriver, gpu_array

from mlacore import arrays, flash_mla, mla_decode_reference, params, plan_decode
from mlacore.arrays import bfloat16
from mlacore.flash_mla import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata

CASES = [*TINY, *(case for case in CORNERS if cost(case) < 0.05)]


def rows_of(case: Case) -> int:
    return case.seq_len_q * case.num_heads // case.num_kv_heads


SIGNATURES = {
    "2025-02": lambda case, lengths: get_mla_metadata(lengths, rows_of(case), case.num_kv_heads),
    "2025-02 by name": lambda case, lengths: get_mla_metadata(
        cache_seqlens=lengths, num_heads_per_head_k=rows_of(case), num_heads_k=case.num_kv_heads
    ),
    "2025-09": lambda case, lengths: get_mla_metadata(
        lengths, rows_of(case), case.num_kv_heads, case.num_heads, False, None
    ),
    "2026-01": lambda case, lengths: get_mla_metadata(),
}


def by_id(case: Case) -> str:
    return case.id


def check(case: Case, inputs: Inputs, metadata: tuple, **options: Any) -> None:
    """A call as FlashMLA's users make it, against the oracle."""
    out, lse = flash_mla_with_kvcache(*inputs, 512, *metadata, causal=case.causal, **options)
    expected_out, expected_lse = mla_decode_reference(*inputs, causal=case.causal, **options)
    expected_lse[np.isneginf(expected_lse)] = np.inf
    assert (type(out), type(lse)) == (np.ndarray, np.ndarray)
    assert_close(out, expected_out, OUT_RULES[case.dtype], "out")
    assert_close(lse, expected_lse, LSE_RULE, "lse")


@pytest.mark.parametrize("signature", SIGNATURES)
@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_every_signature(case: Case, signature: str) -> None:
    inputs = make_inputs(case)
    check(case, inputs, SIGNATURES[signature](case, inputs.cache_seqlens))


def test_some_cases_have_empty_rows() -> None:
    inputs = make_inputs(Case(3, 1, 200, 16, lengths=(200, 0, 65)))
    out, lse = flash_mla_with_kvcache(*inputs, 512, *get_mla_metadata())
    assert (lse[1] == np.inf).all()
    assert np.isfinite(lse[[0, 2]]).all()
    assert (out[1] == 0).all()
    poisoned = inputs.kv_cache.copy()
    poisoned[inputs.block_table[0, 0]] = np.nan  # a sequence of NaN is not an empty one
    _, lse = flash_mla_with_kvcache(*inputs._replace(kv_cache=poisoned), 512, *get_mla_metadata())
    assert np.isnan(lse[0]).all()


def test_positional_arguments_are_flashmlas() -> None:
    names = [
        name for name, p in inspect.signature(flash_mla_with_kvcache).parameters.items() if p.kind != p.KEYWORD_ONLY
    ]
    assert ", ".join(names) == (
        "q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits, softmax_scale, "
        "causal, is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, "
        "extra_topk_length"
    )


def test_scale() -> None:
    case = Case(2, 2, 200, 16, varlen=True, causal=True, dtype="float32")
    check(case, make_inputs(case), get_mla_metadata(), softmax_scale=0.135)


# --- metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signature", SIGNATURES)
def test_metadata_of_other_lengths_is_still_right(signature: str) -> None:
    first, later = (Case(3, 1, 3000, 16, lengths=lengths) for lengths in ((3000, 1, 0), (5, 700, 2999)))
    metadata = SIGNATURES[signature](first, make_inputs(first).cache_seqlens)
    check(first, make_inputs(first), metadata)
    check(later, make_inputs(later), metadata)


def test_metadata_is_planned_once_and_shared_by_layers() -> None:
    case = Case(2, 2, 300, 16)
    inputs = make_inputs(case)
    lazy, _ = get_mla_metadata()
    assert lazy.plan is None
    check(case, inputs, (lazy, None))
    plan = lazy.plan
    assert plan is not None
    check(case, inputs, (lazy, None))
    assert lazy.plan is plan
    eager, _ = get_mla_metadata(inputs.cache_seqlens, 32, 1)
    expected = plan_decode(inputs.cache_seqlens, num_heads=16, seq_len_q=2)
    for made in (lazy.plan, eager.plan):
        np.testing.assert_array_equal(made.work, expected.work)
        np.testing.assert_array_equal(made.splits, expected.splits)


def test_plan_of_metadata_can_be_updated_in_place() -> None:
    first, later = (Case(3, 1, 3000, 16, lengths=lengths) for lengths in ((3000, 1, 0), (5, 700, 2999)))
    metadata = get_mla_metadata()
    check(first, make_inputs(first), metadata)
    inputs = make_inputs(later)
    metadata[0].plan.update(inputs.cache_seqlens)
    view = metadata[0]._plan_for(inputs, 512, None, False, None)
    expected = plan_decode(inputs.cache_seqlens, num_heads=16)
    np.testing.assert_array_equal(view.work, expected.work)
    check(later, inputs, metadata)


def test_metadata_serves_the_same_rows_in_other_ways() -> None:
    """Query tokens, heads and mask that make the same rows: the old signature knows no more than these."""
    metadata = get_mla_metadata(np.array([300, 300], np.int32), 32, 1)
    for case in (Case(2, 1, 300, 32), Case(2, 2, 300, 16, causal=True), Case(2, 2, 300, 16), Case(2, 4, 300, 8)):
        check(case, make_inputs(case), metadata)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Case(3, 1, 100, 16), "batch=2, expected 3"),
        (Case(2, 1, 100, 32), "seq_len_q * num_heads / num_kv_heads=16, expected 32"),
        (Case(2, 1, 100, 32, num_kv_heads=2), "num_kv_heads=1, expected 2"),
    ],
)
def test_metadata_of_another_shape(other: Case, message: str) -> None:
    lengths = make_inputs(Case(2, 1, 100, 16)).cache_seqlens
    metadata = get_mla_metadata(lengths, 16, 1)
    expected = f"tile_scheduler_metadata: got a plan for {message} (from q and k_cache)"
    with pytest.raises(ValueError, match="^" + re.escape(expected)):
        flash_mla_with_kvcache(*make_inputs(other), 512, *metadata)


@pytest.mark.parametrize("wrong", [None, np.zeros((4, 8), np.int32), "plan"])
def test_metadata_of_another_kind(wrong: Any) -> None:
    inputs = make_inputs(TINY[0])
    with pytest.raises(TypeError, match=rf"^tile_scheduler_metadata: got {type(wrong).__name__}, expected a Flash"):
        flash_mla_with_kvcache(*inputs, 512, wrong)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument",
    [
        "is_fp8_kvcache",
        "indices",
        "attn_sink",
        "extra_k_cache",
        "extra_indices_in_kvcache",
        "topk_length",
        "extra_topk_length",
        "descale_q",
        "descale_k",
    ],
)
def test_arguments_not_served_are_named(argument: str) -> None:
    inputs, metadata = make_inputs(TINY[0]), get_mla_metadata()
    value = True if argument == "is_fp8_kvcache" else np.zeros((1, 1, 64), np.int32)
    with pytest.raises(NotImplementedError, match=rf"^{argument}: not served"):
        flash_mla_with_kvcache(*inputs, 512, *metadata, **{argument: value})
    flash_mla_with_kvcache(*inputs, 512, *metadata, **{argument: None})


def test_bad_arguments_of_metadata() -> None:
    lengths = np.array([3], np.int32)
    with pytest.raises(NotImplementedError, match=r"^is_fp8_kvcache, topk: not served"):
        get_mla_metadata(lengths, 16, 1, 16, True, 2048)
    with pytest.raises(ValueError, match=r"^num_q_tokens_per_head_k: got 0, expected at least 1"):
        get_mla_metadata(lengths, 0, 1)
    with pytest.raises(TypeError, match=r"^num_heads_k: got float"):
        get_mla_metadata(lengths, 16, 1.0)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"q": np.zeros((1, 1, 1, 512), np.float32)}, ValueError, "q: got shape (1, 1, 1, 512)"),
        ({"k_cache": np.zeros((1, 60, 1, 576), bfloat16)}, ValueError, "kv_cache: got page_size=60"),
        ({"block_table": None}, TypeError, "block_table: got NoneType, expected a NumPy array or a GPU array"),
        ({"cache_seqlens": np.array([1], np.int64)}, TypeError, "cache_seqlens: got dtype int64, expected int32"),
        ({"head_dim_v": 576}, ValueError, "head_dim_v: got 576, expected 512"),
        ({"softmax_scale": -1.0}, ValueError, "softmax_scale: got -1.0"),
        ({"causal": 1}, TypeError, "causal: got int, expected a bool"),
    ],
)
def test_bad_arguments_leave_the_metadata_unplanned(
    change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    metadata, _ = get_mla_metadata()
    call = dict(zip(("q", "k_cache", "block_table", "cache_seqlens"), make_inputs(TINY[0]), strict=True))
    with pytest.raises(kind, match="^" + re.escape(message)):
        flash_mla_with_kvcache(**{**call, "head_dim_v": 512, "tile_scheduler_metadata": metadata} | change)
    assert metadata.plan is None


# --- GPU arrays ------------------------------------------------------------------------------------------------------


@pytest.fixture
def flipped(monkeypatch: pytest.MonkeyPatch, fake: FakeDriver) -> list[tuple]:
    """The calls of the kernel that turns -inf into +inf: its arrays, and how many launches came before."""
    calls: list[tuple] = []
    kernel = lambda lse, out: calls.append((lse.data.ptr, out.data.ptr, len(fake.launches)))  # noqa: E731
    monkeypatch.setattr(flash_mla, "_empty_rows_to_plus_inf", lambda: kernel)
    return calls


def gpu_inputs() -> Inputs:
    shapes = ((3, 2, 128, 576), (12, 64, 1, 576))
    pools = [gpu_array(shape, bfloat16) for shape in shapes]
    return Inputs(*pools, gpu_array((3, 4), np.int32), gpu_array((3,), np.int32))


@pytest.mark.parametrize("is_old", [False, True])
def test_cupy_in_cupy_out(fake: FakeDriver, flipped: list[tuple], is_old: bool) -> None:
    inputs = gpu_inputs()
    metadata = get_mla_metadata(inputs.cache_seqlens, 256, 1) if is_old else get_mla_metadata()
    assert len(fake.launches) == is_old  # the planner
    for _ in range(2):
        out, lse = flash_mla_with_kvcache(*inputs, 512, *metadata)
    plan, first, second = fake.launches
    assert plan.fields(params.PLAN_PARAMS)["cache_seqlens"] == inputs.cache_seqlens.data.ptr
    assert (out.shape, lse.shape, out.dtype, lse.dtype) == ((3, 2, 128, 512), (3, 128, 2), bfloat16, np.float32)
    launched = second.fields(params.DECODE_PARAMS)
    assert (launched["out"], launched["lse"]) == (out.data.ptr, lse.data.ptr)
    assert first.fields(params.DECODE_PARAMS)["work"] == launched["work"]  # one plan
    assert flipped[1] == (lse.data.ptr, lse.data.ptr, 3)
    assert len(flipped) == 2


class Tensor:
    """Stands for torch.Tensor over a CuPy array with a made-up address."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape, self.device = array, array.shape, "cuda:0"

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("the test's from_dlpack looks into it instead")

    def new_empty(self, shape: tuple[int, ...], dtype: Any = None) -> Tensor:
        return Tensor(gpu_array(shape, self.array.dtype if dtype is None else dtype))


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As much of torch as is used, with a current stream of its own."""
    cupy = pytest.importorskip("cupy")
    module: Any = types.ModuleType("torch")
    module.Tensor, module.float32 = Tensor, np.float32
    module.cuda = types.SimpleNamespace(current_stream=lambda device: types.SimpleNamespace(cuda_stream=0x5000))
    monkeypatch.setitem(sys.modules, "torch", module)
    monkeypatch.setattr(cupy, "from_dlpack", lambda tensor: tensor.array)

    # Entering a stream, or asking it for its kind, wants a device.
    class Stream:
        ptr = 0x5000

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    stream = Stream()
    monkeypatch.setattr(arrays, "as_stream", lambda given, device=-1: stream if given in (0x5000, stream) else 1 / 0)
    monkeypatch.setattr(cupy.cuda, "Device", lambda device: stream)
    return module


@pytest.mark.parametrize("is_old", [False, True])
def test_torch_in_torch_out_on_torchs_stream(torch: Any, fake: FakeDriver, flipped: list[tuple], is_old: bool) -> None:
    inputs = gpu_inputs()
    tensors = [Tensor(array) for array in inputs]
    metadata = get_mla_metadata(tensors[3], 256, 1) if is_old else get_mla_metadata()
    out, lse = flash_mla_with_kvcache(*tensors, 512, *metadata, causal=True)
    assert (type(out), type(lse), out.shape, lse.shape) == (Tensor, Tensor, (3, 2, 128, 512), (3, 128, 2))
    plan, decode = fake.launches
    assert (plan.stream, decode.stream) == (0x5000, 0x5000)
    launched = decode.fields(params.DECODE_PARAMS)
    for name, array in zip(("q", "kv", "block_table", "cache_seqlens"), inputs, strict=True):
        assert launched[name] == array.data.ptr
    assert (launched["out"], launched["lse"]) == (out.array.data.ptr, lse.array.data.ptr)
    assert flipped == [(lse.array.data.ptr, lse.array.data.ptr, 2)]


def test_metadata_of_another_device(fake: FakeDriver) -> None:
    metadata = get_mla_metadata(np.array([1, 2, 3], np.int32), 256, 1)
    with pytest.raises(ValueError, match=r"^tile_scheduler_metadata: got a plan for device=NumPy, expected cuda:0"):
        flash_mla_with_kvcache(*gpu_inputs(), 512, *metadata)
    assert fake.launches == []


def test_results_go_back_to_the_library_that_q_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    class Standard:
        def __array_namespace__(self) -> Any:
            return types.SimpleNamespace(from_dlpack=lambda array: ("standard", array))

    class Other:
        pass

    Other.__module__ = "other.core"
    array = gpu_array((2, 2), np.float32)
    assert arrays.to_library_of(gpu_array((1,), np.int32), array) is array
    assert arrays.to_library_of(Standard(), array) == ("standard", array)
    assert arrays.to_library_of(Other(), array) is array  # no such module
    monkeypatch.setitem(sys.modules, "other", types.SimpleNamespace(from_dlpack=lambda array: ("other", array)))
    assert arrays.to_library_of(Other(), array) == ("other", array)


def test_sched_meta_is_opaque_but_for_its_plan() -> None:
    assert [name for name in dir(FlashMLASchedMeta) if not name.startswith("_")] == ["plan"]
