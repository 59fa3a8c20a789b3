"""FlashMLA's calls on the device, for CuPy and for torch where it is installed. Needs a Hopper GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import Case, Inputs, make_inputs
from compare import LSE_RULE, OUT_RULES, assert_close

from mlacore import mla_decode, mla_decode_reference
from mlacore.flash_mla import flash_mla_with_kvcache, get_mla_metadata

pytestmark = pytest.mark.gpu

CASES = [
    Case(3, 1, 200, 16, lengths=(200, 0, 65)),
    Case(3, 2, 3000, 128, causal=True, lengths=(3000, 1, 0)),
    Case(2, 2, 700, 64, causal=True, dtype="float16"),
    Case(32, 1, 1000, 128, varlen=True, zero_fraction=0.3),
]


@pytest.fixture
def cupy() -> Any:
    import cupy

    return cupy


@pytest.fixture
def torch() -> Any:
    torch = pytest.importorskip("torch", reason="needs torch")
    if not torch.cuda.is_available():
        pytest.skip("needs torch with CUDA")
    return torch


def to_torch(torch: Any, array: np.ndarray) -> Any:
    """A tensor with the bits of a NumPy array."""
    bits = array.view(np.int16) if array.dtype.itemsize == 2 else array
    tensor = torch.from_numpy(bits.copy()).cuda()
    return tensor.view({"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(array.dtype), tensor.dtype))


def metadata_of(case: Case, lengths: Any, is_old: bool) -> tuple:
    if is_old:
        return get_mla_metadata(lengths, case.seq_len_q * case.num_heads // case.num_kv_heads, case.num_kv_heads)
    return get_mla_metadata()


def expected_of(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    out, lse = mla_decode_reference(*inputs, causal=case.causal)
    lse[np.isneginf(lse)] = np.inf
    return out, lse


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_cupy(case, is_old, cupy):
    inputs, expected = make_inputs(case, cupy), expected_of(case, make_inputs(case))
    metadata = metadata_of(case, inputs.cache_seqlens, is_old)
    for _ in range(2):
        out, lse = flash_mla_with_kvcache(*inputs, 512, *metadata, causal=case.causal)
        assert isinstance(out, cupy.ndarray)
        assert isinstance(lse, cupy.ndarray)
        assert_close(out, expected[0], OUT_RULES[case.dtype], "out")
        assert_close(lse, expected[1], LSE_RULE, "lse")
    direct, direct_lse = mla_decode(*inputs, plan=None, causal=case.causal)
    assert direct.shape == out.shape
    assert bool((cupy.isposinf(lse) == cupy.isneginf(direct_lse)).all())


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_torch(case, is_old, torch):
    inputs = make_inputs(case)
    expected_out, expected_lse = expected_of(case, inputs)
    tensors = [to_torch(torch, array) for array in inputs]
    metadata = metadata_of(case, tensors[3], is_old)
    for _ in range(2):
        out, lse = flash_mla_with_kvcache(*tensors, 512, *metadata, causal=case.causal)
        assert isinstance(out, torch.Tensor)
        assert (out.dtype, lse.dtype, out.device) == (tensors[0].dtype, torch.float32, tensors[0].device)
        assert_close(out.float().cpu().numpy(), expected_out, OUT_RULES[case.dtype], "out")
        assert_close(lse.cpu().numpy(), expected_lse, LSE_RULE, "lse")


def test_torch_side_stream_is_followed(torch):
    """Queries that a slow kernel on torch's stream has yet to write, and a result that this stream goes on to read."""
    case = Case(4, 1, 500, 16)
    inputs = make_inputs(case)
    expected_out, _ = expected_of(case, inputs)
    ready, *tensors = [to_torch(torch, array) for array in inputs]
    metadata = get_mla_metadata(tensors[2], 16, 1)
    q = torch.zeros_like(ready)
    flash_mla_with_kvcache(q, *tensors, 512, *metadata)  # loads the kernels
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
        q.copy_(ready)
        out, _ = flash_mla_with_kvcache(q, *tensors, 512, *metadata)
        assert not stream.query(), "a call waited for the device"
        doubled = out.float() * 2
    stream.synchronize()
    assert_close(doubled.cpu().numpy() / 2, expected_out, OUT_RULES[case.dtype], "out")


def test_torch_graph(torch):
    """Captured by torch with all of its checks on, replayed with other lengths."""
    case = Case(4, 1, 500, 16, lengths=(500, 20, 300, 1))
    inputs = make_inputs(case)
    tensors = [to_torch(torch, array) for array in inputs]
    metadata = get_mla_metadata()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        flash_mla_with_kvcache(*tensors, 512, *metadata)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        metadata[0].plan.update(tensors[3], stream=torch.cuda.current_stream().cuda_stream)
        out, lse = flash_mla_with_kvcache(*tensors, 512, *metadata)
    for lengths in ([500, 20, 300, 1], [1, 0, 299, 1]):
        tensors[3].copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        expected_out, expected_lse = expected_of(case, inputs._replace(cache_seqlens=np.array(lengths, np.int32)))
        assert_close(out.float().cpu().numpy(), expected_out, OUT_RULES[case.dtype], "out")
        assert_close(lse.cpu().numpy(), expected_lse, LSE_RULE, "lse")
