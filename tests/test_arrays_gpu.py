"""Arrays of other libraries, zero-copy: the same memory, in order after what their library still has to do with it.

Needs a Hopper GPU, and each test the library it is about.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import Case, Inputs, make_inputs
from compare import LSE_RULE, OUT_RULES, assert_close

from mlacore import arrays, mla_decode, mla_decode_reference, plan_decode

pytestmark = pytest.mark.gpu

CASE = Case(4, 1, 500, 16, lengths=(500, 0, 64, 301), dtype="float16")
DTYPES = {"torch": ["bfloat16", "float16", "float32"], "jax": ["bfloat16", "float16", "float32"], "numba": ["float16"]}


@pytest.fixture
def cupy() -> Any:
    import cupy

    return cupy


class Torch:
    def __init__(self) -> None:
        self.torch = pytest.importorskip("torch", reason="needs torch")
        if not self.torch.cuda.is_available():
            pytest.skip("needs torch with CUDA")

    def array(self, array: np.ndarray) -> Any:
        bits = array.view(np.int16) if array.dtype.itemsize == 2 else array
        tensor = self.torch.from_numpy(bits.copy()).cuda()
        return tensor.view(getattr(self.torch, str(array.dtype)))

    def address(self, array: Any) -> int:
        return array.data_ptr()

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()


class Jax:
    def __init__(self) -> None:
        self.jax = pytest.importorskip("jax", reason="needs jax")
        if self.jax.default_backend() != "gpu":
            pytest.skip("needs jax with CUDA")

    def array(self, array: np.ndarray) -> Any:
        return self.jax.device_put(array.copy())

    def address(self, array: Any) -> int:
        return array.unsafe_buffer_pointer()

    def synchronize(self) -> None:
        pass  # every array waits for itself


class Numba:
    def __init__(self) -> None:
        self.cuda = pytest.importorskip("numba.cuda", reason="needs the numba extra")

    def array(self, array: np.ndarray) -> Any:
        return self.cuda.to_device(array.copy())

    def address(self, array: Any) -> int:
        return array.__cuda_array_interface__["data"][0]

    def synchronize(self) -> None:
        self.cuda.synchronize()


@pytest.fixture(params=[Torch, Jax, Numba], ids=["torch", "jax", "numba"])
def library(request: pytest.FixtureRequest) -> Any:
    return request.param()


def check(out: Any, lse: Any, inputs: Inputs, case: Case = CASE) -> None:
    expected_out, expected_lse = mla_decode_reference(*inputs)
    assert_close(out, expected_out, OUT_RULES[case.dtype], "out")
    assert_close(lse, expected_lse, LSE_RULE, "lse")


def test_same_memory(library, cupy):
    for dtype in [*DTYPES[type(library).__name__.lower()], "int32"]:
        values = np.arange(6).reshape(2, 3).astype(arrays.as_dtype(dtype) if dtype != "int32" else np.int32)
        array = library.array(values)
        view = arrays.to_device("q", array)
        assert isinstance(view, cupy.ndarray)
        assert view.data.ptr == library.address(array), dtype
        assert (view.dtype, view.shape, view.strides) == (values.dtype, values.shape, values.strides)
        assert view.get().tobytes() == values.tobytes()


def test_decode_gives_the_bits_that_cupy_arrays_give(library, cupy):
    inputs = make_inputs(CASE)
    on_device = make_inputs(CASE, cupy)
    plan = plan_decode(on_device.cache_seqlens, num_heads=16)
    expected = mla_decode(*on_device, plan=plan)
    given = [library.array(array) for array in inputs]  # which live until the results are here
    out, lse = mla_decode(*given, plan=plan)
    assert out.get().tobytes() == expected[0].get().tobytes()
    assert lse.get().tobytes() == expected[1].get().tobytes()


def test_plan_from_their_lengths(library, cupy):
    lengths = np.array([500, 0, 64, 301], np.int32)
    plan = plan_decode(library.array(lengths), num_heads=16, num_workers=7)
    expected = plan_decode(lengths, num_heads=16, num_workers=7)
    np.testing.assert_array_equal(plan.work.get(), expected.work)
    plan.update(library.array(lengths[::-1].copy()))
    expected.update(lengths[::-1].copy())
    np.testing.assert_array_equal(plan.work.get(), expected.work)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_into_torch_tensors(dtype, cupy):
    library = Torch()
    case = Case(2, 1, 300, 16, dtype=dtype)
    inputs = make_inputs(case)
    out = library.array(np.full((2, 1, 16, 512), np.nan, inputs.q.dtype))
    lse = library.array(np.full((2, 16, 1), np.nan, np.float32))
    given = [library.array(array) for array in inputs]
    got = mla_decode(*given, out=out, lse=lse)
    assert got[0] is out
    assert got[1] is lse
    cupy.cuda.get_current_stream().synchronize()
    check(out.float().cpu().numpy(), lse.cpu().numpy(), inputs, case)


# --- order -----------------------------------------------------------------------------------------------------------


def test_waits_for_torchs_stream(cupy):
    """The queries are zero until a stream of torch's, which sleeps first, has copied the right ones in."""
    library = Torch()
    inputs = make_inputs(CASE)
    ready, *rest = (library.array(array) for array in inputs)
    q, plan = library.torch.zeros_like(ready), plan_decode(rest[2], num_heads=16)
    mine = cupy.cuda.Stream(non_blocking=True)
    mla_decode(q, *rest, plan=plan, stream=mine)  # loads the kernel
    library.synchronize()
    stream = library.torch.cuda.Stream()
    with library.torch.cuda.stream(stream):
        library.torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
        q.copy_(ready)
        out, lse = mla_decode(q, *rest, plan=plan, stream=mine)
        assert not stream.query(), "the call waited for the device"
    mine.synchronize()
    check(out, lse, inputs)


def test_waits_for_jax(cupy):
    """The queries come out of a computation that JAX has only begun."""
    library = Jax()
    jax = library.jax
    inputs = make_inputs(CASE)
    q, *rest = (library.array(array) for array in inputs)
    plan = plan_decode(rest[2], num_heads=16)

    @jax.jit
    def slowly(q: Any, a: Any) -> Any:
        a = jax.lax.fori_loop(0, 100, lambda _, a: (a @ a) * 0, a)
        return q + a[0, 0].astype(q.dtype)

    zeros = jax.numpy.zeros((4096, 4096), jax.numpy.float32)
    slowly(q, zeros).block_until_ready()
    mine = cupy.cuda.Stream(non_blocking=True)
    mla_decode(q, *rest, plan=plan, stream=mine)
    delayed = slowly(q, zeros)
    out, lse = mla_decode(delayed, *rest, plan=plan, stream=mine)
    mine.synchronize()
    check(out, lse, inputs)
    # In the other direction: JAX waits for the kernel, on the stream that is current when it takes the result.
    with mine:
        delayed = slowly(q, zeros)
        _, lse = mla_decode(delayed, *rest, plan=plan)
        plus_one = jax.dlpack.from_dlpack(lse) + 1
    check(out, np.asarray(plus_one) - 1, inputs)


def test_waits_for_numbas_stream(cupy):
    library = Numba()
    cuda = library.cuda

    @cuda.jit
    def slowly(q: Any, ready: Any) -> None:
        for _ in range(50):
            cuda.nanosleep(np.uint32(1_000_000))  # 50 ms in all
        row = cuda.grid(1)
        if row < q.shape[0] * q.shape[2]:
            for d in range(q.shape[3]):
                q[row // q.shape[2], 0, row % q.shape[2], d] = ready[row // q.shape[2], 0, row % q.shape[2], d]

    inputs = make_inputs(CASE)
    ready, *rest = (library.array(array) for array in inputs)
    plan = plan_decode(rest[2], num_heads=16)
    stream, mine = cuda.stream(), cupy.cuda.Stream(non_blocking=True)
    q = cuda.to_device(np.zeros_like(inputs.q), stream=stream)
    assert q.__cuda_array_interface__["stream"] == int(stream)
    mla_decode(q, *rest, plan=plan, stream=mine)
    library.synchronize()
    slowly[1, 64, stream](q, ready)
    out, lse = mla_decode(q, *rest, plan=plan, stream=mine)
    mine.synchronize()
    check(out, lse, inputs)


# --- read-only -------------------------------------------------------------------------------------------------------


def test_jax_arrays_are_never_written(cupy):
    library = Jax()
    inputs = make_inputs(CASE)
    given = [library.array(array) for array in inputs]
    out = library.array(np.zeros((4, 1, 16, 512), np.float16))
    lse = library.array(np.zeros((4, 16, 1), np.float32))
    for name, buffer in (("out", out), ("lse", lse)):
        with pytest.raises(ValueError, match=f"^{name}: got a read-only array"):
            mla_decode(*given, **{name: buffer})
    mla_decode(*given)
    cupy.cuda.Device().synchronize()
    assert not np.asarray(out).any()
    assert not np.asarray(lse).any()
    for array, original in zip(given, inputs, strict=True):
        assert np.asarray(array).tobytes() == original.tobytes()
