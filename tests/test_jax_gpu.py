"""mlacore.jax on a GPU: XLA's calls launch what eager calls do, on its stream, and the cache stays where it is."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import pytest
from cases import Case, make_inputs, repaged

import mlacore
from mlacore.arrays import as_dtype

pytestmark = pytest.mark.gpu

jax = pytest.importorskip("jax", reason="needs jax")
cupy = pytest.importorskip("cupy", reason="needs CuPy")

import jax.numpy as jnp  # noqa: E402
from jax_loop import decode_loop  # noqa: E402

import mlacore.jax as mla_jax  # noqa: E402

CASES = [
    Case(1, 1, 1, 1),
    Case(7, 1, 700, 16, lengths=(0, 700, 0, 0, 64, 1, 0)),
    Case(1, 1, 9000, 16),
    Case(5, 2, 3000, 16, varlen=True, causal=True),
    Case(1, 1, 5000, 128),
    Case(16, 1, 2000, 128, varlen=True),
    Case(3, 4, 300, 8, num_kv_heads=2, varlen=True, causal=True),
    Case(64, 2, 1000, 128, varlen=True, causal=True, dtype="float16"),
]


@pytest.fixture(autouse=True)
def on_gpu() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("needs jax with CUDA")


def bits(*results: Any) -> list[bytes]:
    return [(result.get() if hasattr(result, "get") else np.asarray(result)).tobytes() for result in results]


def to_cupy(array: np.ndarray) -> Any:
    return cupy.asarray(array.view(np.uint16)).view(array.dtype) if array.dtype.itemsize == 2 else cupy.asarray(array)


def options_of(case: Case, **more: Any) -> dict[str, Any]:
    shape = {"num_heads": case.num_heads, "seq_len_q": case.seq_len_q, "num_kv_heads": case.num_kv_heads}
    return shape | {"causal": case.causal} | more


def eager(inputs: Any, case: Case, **options: Any) -> list[bytes]:
    given = [to_cupy(array) for array in inputs]
    plan = mlacore.plan_decode(given[3], **options_of(case, **options))
    return bits(*mlacore.mla_decode(*given, plan=plan, causal=case.causal))


def jitted(case: Case, layer: int | None = None, **options: Any) -> Any:
    @jax.jit
    def run(*given: Any) -> Any:
        plan = mla_jax.plan_decode(given[3], **options_of(case, **options))
        return mla_jax.mla_decode(*given, plan=plan, causal=case.causal, layer=layer)

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bits_of_the_eager_call(case):
    inputs = make_inputs(case)
    expected = eager(inputs, case)
    assert bits(*jitted(case)(*inputs)) == expected
    assert bits(*jax.jit(functools.partial(mla_jax.mla_decode, causal=case.causal))(*inputs)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 1},
        {"num_workers": 5},
        {"max_seq_len": 3000},
        {"batch_invariant": True, "max_seq_len": 1000},  # never splits
        {"batch_invariant": True, "max_seq_len": 3000},
    ],
)
@pytest.mark.parametrize("num_heads", [16, 128])
def test_options_of_a_plan(options, num_heads):
    case = Case(2, 1, 3000, num_heads, lengths=(3000, 900))
    if options.get("max_seq_len") == 1000:
        case = Case(2, 1, 1000, num_heads, lengths=(1000, 900))
    inputs = make_inputs(case)
    assert bits(*jitted(case, **options)(*inputs)) == eager(inputs, case, **options)


@pytest.mark.parametrize("page_size", [16, 32, 128, 256])
def test_pages_and_layers(page_size):
    case = Case(4, 1, 900, 16, varlen=True)
    inputs = repaged(make_inputs(case), page_size)
    pool = np.full((3, *inputs.kv_cache.shape), np.nan, inputs.kv_cache.dtype)
    pool[1] = inputs.kv_cache
    run = jitted(case, layer=1)
    assert bits(*run(inputs.q, pool, inputs.block_table, inputs.cache_seqlens)) == eager(inputs, case)


def test_calls_of_several_programs_share_scratch_memory():
    """One for each shape and stream, whatever the program: what a call leaves in it, no other takes for its own."""
    case, other = Case(1, 1, 20000, 128), Case(3, 1, 5000, 128, varlen=True)
    calls = [(jitted(one), [jnp.array(array) for array in make_inputs(one)]) for one in (case, other)]
    first = [bits(*run(*inputs)) for run, inputs in calls]
    for _ in range(5):
        assert [bits(*run(*inputs)) for run, inputs in calls] == first


def test_one_plan_for_two_layers():
    case = Case(6, 1, 2000, 16, varlen=True)
    inputs = make_inputs(case)
    other = inputs._replace(kv_cache=inputs.kv_cache[::-1].copy())
    layers = np.stack([inputs.kv_cache, other.kv_cache])

    @jax.jit
    def step(q: Any, layers: Any, table: Any, lengths: Any) -> Any:
        plan = mla_jax.plan_decode(lengths, num_heads=16)
        return [mla_jax.mla_decode(q, layers, table, lengths, plan=plan, layer=layer) for layer in range(2)]

    results = step(inputs.q, layers, inputs.block_table, inputs.cache_seqlens)
    assert [bits(*result) for result in results] == [eager(inputs, case), eager(other, case)]


def test_order_on_xlas_stream():
    """q comes from a long chain of products, and what follows reads the result: no wait on the host in between."""
    case = Case(8, 1, 2000, 128, varlen=True)
    inputs = make_inputs(case)
    expected = eager(inputs, case)

    @jax.jit
    def run(a: Any, q: Any, *rest: Any) -> Any:
        a = jax.lax.fori_loop(0, 50, lambda _, a: jnp.tanh(a @ a), a)  # finite, and long
        q = jnp.where(jnp.isfinite(a.sum()), q, jnp.nan)
        out, lse = mla_jax.mla_decode(q, *rest)
        return out, lse, out.astype(jnp.float32) * 2

    a = jnp.full((4096, 4096), 1e-3, jnp.float32)
    for _ in range(3):
        out, lse, doubled = run(a, *inputs)
        assert bits(out, lse) == expected
        np.testing.assert_array_equal(np.asarray(doubled), np.asarray(out).astype(np.float32) * 2)


def test_threads_at_once():
    case = Case(4, 1, 3000, 16, varlen=True)
    inputs = [jnp.array(array) for array in make_inputs(case)]
    run = jitted(case)
    expected = bits(*run(*inputs))
    same: list[bool] = []

    def work() -> None:
        for _ in range(50):
            results = [run(*inputs) for _ in range(4)]
            same.extend(bits(*result) == expected for result in results)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 800


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", ["", "norm rope", "rope halves"])
@pytest.mark.parametrize("layer", [None, 1])
def test_append_writes_what_a_cache_does(dtype, options, layer):
    rng = np.random.default_rng(1)
    element = as_dtype(dtype)
    cache = mlacore.PagedKVCache(8, 16, num_layers=2, max_seqs=3, dtype=dtype, device="cuda")
    before = rng.standard_normal(cache.pool.shape, np.float32).astype(element)
    cache.pool[...] = to_cupy(before)
    seqs = cache.create(3).seqs
    tokens = cache.extend(seqs, [17, 0, 5])
    table, lengths = (array.get() for array in (cache.block_table, cache.cache_seqlens))
    ckv, kpe = (rng.standard_normal((3, 5, width), np.float32).astype(element) for width in (512, 64))
    given: dict[str, Any] = {}
    if "norm" in options:
        given |= {"norm_weight": rng.standard_normal(512, np.float32).astype(element)}
    if "rope" in options:
        given |= {name: rng.standard_normal((32, 32), np.float32) for name in ("rope_cos", "rope_sin")}
    static = {"rope_interleaved": False} if "halves" in options else {}

    step = cache.step_tokens(num_tokens=5)
    where = np.full((2, 15), -1, np.int64)
    last = [(0, position) for position in range(12, 17)] + [(2, position) for position in range(5)]
    for i, (seq, position) in enumerate(last):
        at = i if seq == 0 else i + 5
        where[:, at] = table[seq, position // 16] * 16 + position % 16, position
    step.where[...] = cupy.asarray(where)
    rows = to_cupy(ckv).reshape(15, 512), to_cupy(kpe).reshape(15, 64)
    cache.write(step, *rows, layer=1, **{name: to_cupy(array) for name, array in given.items()}, **static)
    expected = cache.pool.get()
    assert len(tokens) == 22

    run = jax.jit(
        lambda pool, *rest, **given: mla_jax.append(pool, *rest, layer=layer, **given, **static), donate_argnums=0
    )
    pool = jnp.array(before if layer is not None else before[1])
    address = pool.unsafe_buffer_pointer()
    written = run(pool, table, lengths, ckv, kpe, **given)
    assert written.unsafe_buffer_pointer() == address
    assert pool.is_deleted()
    assert bits(written) == bits(expected if layer is not None else expected[1])
    assert bits(written) != bits(before if layer is not None else before[1])


def test_64_steps_in_one_loop():
    """`append` and `mla_decode` under ``lax.fori_loop``, the cache carried, against as many eager steps."""
    steps, batch, num_heads = 64, 3, 16
    rng = np.random.default_rng(0)
    element = as_dtype("bfloat16")
    table = rng.permutation(60).astype(np.int32).reshape(batch, 20)
    lengths = np.array([10, 0, 1150], np.int32)  # the second is padding
    pool = (rng.standard_normal((60, 64, 1, 576), np.float32) / 4).astype(element)
    first = rng.standard_normal((batch, 1, num_heads, 576), np.float32).astype(element)

    generate = decode_loop(steps, table)

    donated = jnp.array(pool)
    address = donated.unsafe_buffer_pointer()
    got, got_pool, got_lengths = generate(first, donated, lengths)
    assert got_pool.unsafe_buffer_pointer() == address

    # Bits are moved as integers, which CuPy can index.
    q, rows, device_table = to_cupy(first).view(np.uint16), to_cupy(pool).view(np.uint16), cupy.asarray(table)
    for _ in range(steps):
        lengths = lengths + (lengths > 0)
        for seq in np.flatnonzero(lengths):
            position = int(lengths[seq]) - 1
            rows[table[seq, position // 64], position % 64, 0] = q[seq, 0, 0]
        given = q.view(element), rows.view(element), device_table, cupy.asarray(lengths)
        out, _ = mlacore.mla_decode(*given)
        q = cupy.concatenate([out.view(np.uint16), q[..., 512:]], -1)
    np.testing.assert_array_equal(np.asarray(got_lengths), lengths)
    assert bits(got, got_pool) == bits(q, rows)
    assert np.isfinite(np.asarray(got).astype(np.float32)).all()


def test_another_device():
    if len(jax.local_devices()) < 2:
        pytest.skip("needs two GPUs")
    case = Case(3, 1, 2000, 16, varlen=True)
    inputs = make_inputs(case)
    expected = eager(inputs, case)
    there = [jax.device_put(array, jax.local_devices()[1]) for array in inputs]
    run = jitted(case)
    results = run(*there)
    assert {device.id for device in results[0].devices()} == {jax.local_devices()[1].id}
    assert bits(*results) == expected
    assert bits(*run(*inputs)) == expected
