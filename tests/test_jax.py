"""mlacore.jax on JAX's CPU: XLA runs the same calls through the same handlers as on a GPU, over the NumPy backend."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CORNERS, TINY, Case, Inputs, cost, make_inputs, repaged
from compare import LSE_RULE, OUT_RULES, assert_close
from pretended_gpu import pretend_driver

import mlacore
from mlacore import mla_decode_reference, xla_targets

jax = pytest.importorskip("jax", reason="needs the jax extra")

import jax.numpy as jnp  # noqa: E402
from jax_loop import decode_loop  # noqa: E402

import mlacore.jax as mla_jax  # noqa: E402

CASES = [*TINY, *(case for case in CORNERS if cost(case) < 0.02)]


@pytest.fixture(autouse=True)
def cpu() -> Iterator[None]:
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def decode(inputs: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    out, lse = jax.jit(functools.partial(mla_jax.mla_decode, **options))(*inputs)
    return np.asarray(out), np.asarray(lse)


def check(inputs: Any, case: Case, pool: Any = None, **options: Any) -> None:
    expected = mla_decode_reference(*inputs, causal=case.causal)
    given = inputs if pool is None else inputs._replace(kv_cache=pool)
    out, lse = decode(given, causal=case.causal, **options)
    assert_close(out, expected[0], OUT_RULES[case.dtype], "out")
    assert_close(lse, expected[1], LSE_RULE, "lse")


# ---- decode --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_decode(case):
    check(make_inputs(case), case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_pages_and_dtypes(page_size, dtype):
    case = Case(4, 2, 300, 8, causal=True, dtype=dtype, lengths=(300, 0, 17, 65))
    check(repaged(make_inputs(case), page_size), case)


@pytest.mark.parametrize("layer", [0, 2, np.int64(1)])
def test_layer_of_a_pool(layer):
    case = Case(3, 1, 200, 16, lengths=(200, 0, 65))
    inputs = make_inputs(case)
    pool = np.full((3, *inputs.kv_cache.shape), np.nan, inputs.kv_cache.dtype)
    pool[layer] = inputs.kv_cache
    check(inputs, case, pool, layer=layer)


def test_bits_of_the_eager_call():
    case = Case(5, 2, 400, 16, varlen=True, causal=True)
    inputs = make_inputs(case)
    for num_workers in (1, 3, 16):
        options = {"num_heads": 16, "seq_len_q": 2, "causal": True, "num_workers": num_workers}
        eager = mlacore.mla_decode(
            *inputs, plan=mlacore.plan_decode(inputs.cache_seqlens, **options), causal=True, softmax_scale=0.1
        )

        @jax.jit
        def planned(*inputs: Any, options: Any = options) -> Any:
            plan = mla_jax.plan_decode(inputs[3], **options)
            return mla_jax.mla_decode(*inputs, plan=plan, causal=True, softmax_scale=0.1)

        for got, expected in zip(planned(*inputs), eager, strict=True):
            assert np.asarray(got).tobytes() == expected.tobytes()


def test_outside_jit():
    case = TINY[2]
    inputs = make_inputs(case)
    expected = decode(inputs)
    for given in (inputs, tuple(map(jnp.asarray, inputs))):
        for got, bits in zip(mla_jax.mla_decode(*given), expected, strict=True):
            assert isinstance(got, jax.Array)
            assert np.asarray(got).tobytes() == bits.tobytes()


def test_plan_is_that_of_plan_decode():
    lengths = np.array([500, 0, 70, 3000], np.int32)
    for options in ({"num_workers": 7}, {"batch_invariant": True, "max_seq_len": 4096}):
        expected = mlacore.plan_decode(lengths, num_heads=16, **options)
        got = jax.jit(lambda lengths, options=options: mla_jax.plan_decode(lengths, num_heads=16, **options))(lengths)
        np.testing.assert_array_equal(got.work, expected.work)
        np.testing.assert_array_equal(got.splits, expected.splits)
        for name in ("batch", "num_heads", "seq_len_q", "num_kv_heads", "causal", "num_workers", "max_splits"):
            assert getattr(got, name) == getattr(expected, name), name


def test_one_plan_for_all_layers_and_programs():
    case = Case(4, 1, 500, 16, varlen=True)
    inputs = make_inputs(case)
    layers = np.stack([inputs.kv_cache, inputs.kv_cache[::-1]])

    def both(q: Any, layers: Any, table: Any, lengths: Any, plan: Any) -> list[Any]:
        return [mla_jax.mla_decode(q, layers, table, lengths, plan=plan, layer=layer) for layer in range(2)]

    @jax.jit
    def step(q: Any, layers: Any, table: Any, lengths: Any) -> Any:
        plan = mla_jax.plan_decode(lengths, num_heads=16, num_workers=3)
        return plan, both(q, layers, table, lengths, plan)

    q, _, table, lengths = inputs
    lowered = step.lower(q, layers, table, lengths).as_text()
    assert (lowered.count("@mlacore_plan("), lowered.count("@mlacore_decode(")) == (1, 2)
    plan, within = step(q, layers, table, lengths)
    assert [leaf.shape for leaf in jax.tree.leaves(plan)] == [(4, 2), (4, 2)]
    given = jax.jit(both)(q, layers, table, lengths, plan)  # a pytree goes from one program to another
    for layer in range(2):
        expected = mla_decode_reference(q, layers[layer], table, lengths)
        for out, lse in (within[layer], given[layer]):
            assert_close(np.asarray(out), expected[0], OUT_RULES["bfloat16"], "out")
            assert_close(np.asarray(lse), expected[1], LSE_RULE, "lse")


def test_threads_decode_at_once():
    """XLA's threads wait for the backend's, which need the GIL that a waiting handler must not keep."""
    case = Case(6, 1, 700, 16, varlen=True)
    inputs = make_inputs(case)
    run = jax.jit(
        lambda *given: mla_jax.mla_decode(*given, plan=mla_jax.plan_decode(given[3], num_heads=16, num_workers=4))
    )
    expected = np.asarray(run(*inputs)[0]).tobytes()
    same: list[bool] = []

    def work() -> None:
        for _ in range(10):
            results = [run(*inputs)[0] for _ in range(3)]  # dispatched before the first is waited for
            same.extend(np.asarray(out).tobytes() == expected for out in results)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert same == [True] * 120


def test_a_spec_says_all():
    """An executable out of a cache calls the handlers in a process that has not traced it."""
    case = TINY[3]
    inputs = make_inputs(case)
    run = jax.jit(functools.partial(mla_jax.mla_decode, causal=True))
    expected = [np.asarray(result).tobytes() for result in run(*inputs)]
    xla_targets._fixed.cache_clear()
    assert [np.asarray(result).tobytes() for result in run(*inputs)] == expected
    assert xla_targets._fixed.cache_info().misses == 2  # planner and attention


def test_each_device_runs_its_heads():
    """``jax.shard_map``, in a process of its own: JAX's CPU is split into devices before it starts."""
    code = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"
import functools
import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec as P
import mlacore.jax
from cases import Case, make_inputs
from compare import LSE_RULE, OUT_RULES, assert_close
from mlacore import mla_decode_reference

case = Case(4, 1, 300, 16, lengths=(300, 0, 17, 65))
inputs = make_inputs(case)
specs = {"in_specs": (P(None, None, "tp"), P(), P(), P()), "out_specs": (P(None, None, "tp"), P(None, "tp"))}
run = jax.jit(jax.shard_map(mlacore.jax.mla_decode, mesh=Mesh(np.array(jax.devices()), ("tp",)), **specs))
out, lse = run(*inputs)
assert len(out.devices()) == 2
for got, expected, rule in zip((out, lse), mla_decode_reference(*inputs), (OUT_RULES["bfloat16"], LSE_RULE)):
    assert_close(np.asarray(got), expected, rule)
"""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- append --------------------------------------------------------------------------------------------------------

TABLE = np.array([[3, 1, 9], [0, 4, 9], [5, 2, 7], [6, 9, -1], [7, 10, 1000], [10, 8, 6]], np.int32)
LENGTHS = np.array([17, 16, 1, 0, 20, -5], np.int32)  # of pages of 16 tokens; 9 and more lie outside the pool


def transform(dtype: np.dtype, options: str) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    given: dict[str, Any] = {}
    if "norm" in options:
        given |= {"norm_weight": rng.standard_normal(512, np.float32).astype(dtype), "norm_eps": 1e-5}
    if "rope" in options:
        given |= {name: rng.standard_normal((32, 32), np.float32) for name in ("rope_cos", "rope_sin")}
        given["rope_interleaved"] = "halves" not in options
    return given


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("options", ["", "norm", "rope", "rope halves", "norm rope"])
@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_append_writes_what_a_cache_does(dtype, options, layer, num_tokens):
    rng = np.random.default_rng(1)
    cache = mlacore.PagedKVCache(8, 16, num_layers=2, max_seqs=6, dtype=dtype, device="cpu")
    cache.pool[...] = rng.standard_normal(cache.pool.shape, np.float32).astype(cache.dtype)
    pool = cache.pool if layer is not None else cache.pool[1]
    before = pool.copy()
    ckv, kpe = (rng.standard_normal((6, num_tokens, w), np.float32).astype(cache.dtype) for w in (512, 64))
    given = transform(cache.dtype, options)

    @functools.partial(jax.jit, static_argnames=("norm_eps", "rope_interleaved"))
    def run(*arguments: Any, **given: Any) -> Any:
        return mla_jax.append(*arguments, layer=layer, **given)

    got = np.asarray(run(before, TABLE, LENGTHS, ckv, kpe, **given))

    # The same tokens through the eager cache, which is told their slots.
    slots, positions = [], []
    for table, length in zip(TABLE.tolist(), LENGTHS.tolist(), strict=True):
        for position in range(length - num_tokens, length):
            page = table[position // 16] if position >= 0 else -1
            slots.append(page * 16 + position % 16 if 0 <= page < 8 else -1)
            positions.append(position)
    assert 0 < sum(slot >= 0 for slot in slots) < len(slots)
    tokens = cache.step_tokens(num_tokens=num_tokens)
    tokens.where[...] = slots, positions
    cache.write(tokens, ckv.reshape(-1, 512), kpe.reshape(-1, 64), layer=1, **given)
    assert got.tobytes() == pool.tobytes()
    assert got.tobytes() != before.tobytes()


def test_append_is_in_place_where_donated():
    ckv, kpe = np.ones((2, 1, 512), np.float16), np.ones((2, 1, 64), np.float16)
    table, lengths = np.array([[0, 1], [2, 3]], np.int32), np.array([3, 20], np.int32)
    donating = jax.jit(lambda pool, *rest: mla_jax.append(pool, *rest), donate_argnums=0)
    pool = jnp.zeros((4, 16, 1, 576), jnp.float16)
    address = pool.unsafe_buffer_pointer()
    written = donating(pool, table, lengths, ckv, kpe)
    assert pool.is_deleted()
    assert written.unsafe_buffer_pointer() == address
    kept = jax.jit(mla_jax.append)(written, table, lengths, ckv * 2, kpe)
    assert written.sum() == 2 * 576
    assert kept[3, 3, 0, 0] == 2


def test_appends_of_a_step_share_their_slots():
    pool, ckv, kpe = (np.zeros(shape, np.float16) for shape in ((2, 4, 16, 1, 576), (2, 1, 512), (2, 1, 64)))
    table, lengths = np.array([[0, 1], [2, 3]], np.int32), np.array([3, 20], np.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(pool: Any, *rest: Any) -> Any:
        for layer in range(2):
            pool = mla_jax.append(pool, *rest, layer=layer)
        return pool

    compiled = step.lower(pool, table, lengths, ckv, kpe).compile().as_text()
    calls = [line for line in compiled.splitlines() if "custom-call(" in line and "mlacore_append" in line]
    operands = [line.split("custom-call(")[1].split(")")[0].split(", ") for line in calls]
    assert len(calls) == 2
    assert operands[0][1] == operands[1][1], "computed once"
    assert "copy(" not in compiled


def test_64_steps_in_one_loop():
    """`append` and `mla_decode` under ``lax.fori_loop``, the cache carried, against as many eager steps."""
    steps, batch, num_heads = 64, 3, 4
    rng = np.random.default_rng(0)
    table = rng.permutation(12).astype(np.int32).reshape(batch, 4)
    lengths = np.array([10, 0, 150], np.int32)  # the second is padding
    pool = (rng.standard_normal((12, 64, 1, 576), np.float32) / 4).astype(np.float16)
    first = rng.standard_normal((batch, 1, num_heads, 576), np.float32).astype(np.float16)

    plan_of = functools.partial(mla_jax.plan_decode, num_heads=num_heads, num_workers=3)
    generate = decode_loop(steps, table, plan_of)

    donated = jnp.array(pool)  # a copy, in memory of its own: what is imported cannot be donated
    address = donated.unsafe_buffer_pointer()
    got, got_pool, got_lengths = generate(first, donated, lengths)
    assert got_pool.unsafe_buffer_pointer() == address

    cache = mlacore.PagedKVCache(12, 64, dtype="float16", num_layers=1, max_seqs=batch, device="cpu")
    layer, q = cache.layers[0], first
    layer[...] = pool
    for _ in range(steps):
        lengths = lengths + (lengths > 0)
        tokens = cache.step_tokens()
        page = np.take_along_axis(table, np.maximum(lengths - 1, 0)[:, None] // 64, 1)[:, 0]
        tokens.where[...] = np.where(lengths > 0, page * 64 + (lengths - 1) % 64, -1), lengths - 1
        cache.write(tokens, q[:, 0, 0, :512], q[:, 0, 0, 512:])
        plan = mlacore.plan_decode(lengths, num_heads=num_heads, num_workers=3)
        out, _ = mlacore.mla_decode(q, layer, table, lengths, plan=plan)
        q = np.concatenate([out, q[..., 512:]], -1)
    np.testing.assert_array_equal(got_lengths, [74, 0, 214])
    assert np.asarray(got).tobytes() == q.tobytes()
    assert np.asarray(got_pool).tobytes() == layer.tobytes()
    assert np.isfinite(np.asarray(got)).all()


# ---- for a GPU -----------------------------------------------------------------------------------------------------


def test_launches_are_prepared_while_tracing_for_a_gpu(monkeypatch):
    """XLA may record a program's first run into a CUDA graph, when it is too late to load a kernel."""
    fake = pretend_driver(monkeypatch)
    monkeypatch.setattr(mla_jax, "_gpu", lambda: 0)
    prepare = [target.prepare for target in (xla_targets.PLAN, xla_targets.DECODE, xla_targets.APPEND)]
    for cached in prepare:
        cached.cache_clear()

    def step(q: Any, pool: Any, table: Any, lengths: Any, rows: Any) -> Any:
        pool = mla_jax.append(pool, table, lengths, rows[..., :512], rows[..., 512:], layer=1)
        return pool, mla_jax.mla_decode(q, pool, table, lengths, layer=1)

    shapes = (3, 2, 128, 576), (4, 8, 64, 1, 576), (3, 2), (3,), (3, 2, 576)
    dtypes = jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.int32, jnp.bfloat16
    given = [jax.ShapeDtypeStruct(*one) for one in zip(shapes, dtypes, strict=True)]
    program = jax.jit(step).lower(*given).as_text()
    assert [cached.cache_info().currsize for cached in prepare] == [1, 1, 1]
    assert fake.launches == []
    assert "tensor<34x2xi32>" in program  # 132 CTAs at once, 4 for each worker
    floats = [jax.ShapeDtypeStruct(one.shape, np.float32) if one.dtype != np.int32 else one for one in given]
    with pytest.raises(TypeError, match=r"kv_cache: got dtype float32, .* \(what the GPU kernels take\)"):
        jax.jit(step).lower(*floats)
    with pytest.raises(TypeError, match=r"q: got dtype float32, .* \(what the GPU kernels take\)"):
        jax.jit(mla_jax.mla_decode).lower(floats[0], jax.ShapeDtypeStruct(shapes[1][1:], np.float32), *floats[2:4])
    for cached in prepare:
        cached.cache_clear()


# ---- mistakes ------------------------------------------------------------------------------------------------------


def valid() -> Inputs:
    return make_inputs(Case(3, 1, 200, 16, lengths=(200, 0, 65)))


@pytest.mark.parametrize("under_jit", [False, True])
@pytest.mark.parametrize(
    ("transformed", "message"),
    [
        (lambda f: jax.vmap(f), r"mlacore.jax.mla_decode under jax.vmap: .* leading axis"),
        (lambda f: jax.grad(lambda q: f(q[0]).astype(jnp.float32).sum()), r"mlacore.jax.mla_decode under jax.grad"),
        (lambda f: lambda q: jax.jvp(f, (q[0],), (q[0],)), r"mlacore.jax.mla_decode under jax.grad or jvp"),
    ],
    ids=["vmap", "grad", "jvp"],
)
def test_neither_vmap_nor_grad(transformed, message, under_jit):
    q, *rest = map(jnp.asarray, valid())

    def f(q: Any) -> Any:
        return mla_jax.mla_decode(q, *rest)[0]

    with pytest.raises(NotImplementedError, match=message):
        transformed(jax.jit(f) if under_jit else f)(jnp.stack([q, q]))


def test_neither_for_append_and_plan():
    pool, ckv, kpe = (jnp.zeros(shape, jnp.float16) for shape in ((4, 16, 1, 576), (2, 1, 512), (2, 1, 64)))
    table, lengths = jnp.zeros((2, 2), jnp.int32), jnp.ones(2, jnp.int32)

    def written(ckv: Any) -> Any:
        return mla_jax.append(pool, table, lengths, ckv, kpe)

    with pytest.raises(NotImplementedError, match=r"mlacore.jax.append under jax.vmap"):
        jax.vmap(written)(jnp.stack([ckv, ckv]))
    with pytest.raises(NotImplementedError, match=r"mlacore.jax.append under jax.grad"):
        jax.grad(lambda ckv: written(ckv).sum())(ckv)
    with pytest.raises(NotImplementedError, match=r"mlacore.jax.plan_decode under jax.vmap"):
        jax.vmap(lambda lengths: mla_jax.plan_decode(lengths, num_heads=16))(jnp.ones((3, 2), jnp.int32))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"q": np.zeros((3, 1, 16, 512), np.float16)}, ValueError, r"q: got shape \(3, 1, 16, 512\), expected"),
        ({"q": np.zeros((3, 1, 16, 576))}, TypeError, r"q: got dtype float64, expected bfloat16 or float16"),
        ({"q": [1.0]}, TypeError, r"q: got list, expected a JAX array"),
        ({"kv_cache": np.zeros((8, 64, 1, 576), np.float16)}, TypeError, r"kv_cache: got dtype float16, .*from q"),
        ({"block_table": np.zeros((2, 4), np.int32)}, ValueError, r"block_table: .* batch=3 \(from cache_seqlens\)"),
        ({"block_table": np.zeros((3, 4), np.int64)}, TypeError, r"block_table: got dtype int64, expected int32"),
        ({"cache_seqlens": np.zeros(3, np.uint32)}, TypeError, r"cache_seqlens: got dtype uint32, expected int32"),
        ({"softmax_scale": 0.0}, ValueError, r"softmax_scale: got 0.0"),
        ({"head_dim_v": 256}, ValueError, r"head_dim_v: got 256, expected 512"),
        ({"causal": 1}, TypeError, r"causal: got int, expected a bool"),
        ({"layer": 0}, ValueError, r"kv_cache: got shape .*, expected \(num_layers, num_pages"),
        ({"plan": "none"}, TypeError, r"plan: got str, expected a mlacore.jax.DecodePlan"),
    ],
)
def test_wrong_arguments(change, kind, message):
    arguments = valid()._asdict() | change
    with pytest.raises(kind, match=message):
        mla_jax.mla_decode(**arguments)


def test_wrong_layer_and_plan():
    q, kv_cache, table, lengths = valid()
    with pytest.raises(ValueError, match=r"layer: got 2, expected below 2 \(num_layers from kv_cache\)"):
        mla_jax.mla_decode(q, np.stack([kv_cache, kv_cache]), table, lengths, layer=2)
    plan = mla_jax.plan_decode(lengths, num_heads=8)
    with pytest.raises(ValueError, match=r"plan: got a plan for num_heads=8, expected num_heads=16 \(from q\)"):
        mla_jax.mla_decode(q, kv_cache, table, lengths, plan=plan)
    with pytest.raises(TypeError, match=r"plan: got DecodePlan, expected a mlacore.jax.DecodePlan"):
        mla_jax.mla_decode(q, kv_cache, table, lengths, plan=mlacore.plan_decode(lengths, num_heads=16))
    scaled = jax.jit(lambda scale: mla_jax.mla_decode(q, kv_cache, table, lengths, softmax_scale=scale))
    with pytest.raises(TypeError, match=r"softmax_scale: got .*Tracer, expected a number or None"):
        scaled(0.5)


def test_a_plan_whose_arrays_were_changed():
    """A pytree's leaves are anybody's: what the call would read past their end is an error."""
    given = valid()
    plan = mla_jax.plan_decode(given.cache_seqlens, num_heads=16, num_workers=3)
    for changes, message in (
        ({"work": plan.work[:2]}, r"plan\.work: got shape \(2, 2\), expected \(4, 2\)"),
        ({"splits": plan.splits[1:]}, r"plan\.splits: got shape"),
        ({"work": plan.work.astype(jnp.float32)}, r"plan\.work: got dtype float32"),
        ({"splits": None}, r"plan\.splits: got NoneType, expected a JAX array"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            mla_jax.mla_decode(*given, plan=dataclasses.replace(plan, **changes))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"kv_cache": np.zeros((4, 16, 2, 576), np.float16)}, ValueError, r"kv_cache: got shape \(4, 16, 2, 576\)"),
        ({"kv_cache": np.zeros((4, 17, 1, 576), np.float16)}, ValueError, r"kv_cache: got page_size=17"),
        ({"kv_cache": np.zeros((4, 16, 1, 576), np.int16)}, TypeError, r"kv_cache: got dtype int16"),
        ({"ckv": np.zeros((2, 1, 512), np.float32)}, TypeError, r"ckv: got dtype float32, expected float16"),
        ({"ckv": np.zeros((3, 1, 512), np.float16)}, ValueError, r"ckv: .* with batch=2 \(from cache_seqlens\)"),
        ({"kpe": np.zeros((2, 2, 64), np.float16)}, ValueError, r"kpe: .*num_tokens=1 \(from ckv\)"),
        ({"block_table": np.zeros((2, 2), np.int16)}, TypeError, r"block_table: got dtype int16, expected int32"),
        ({"cache_seqlens": np.ones((2, 1), np.int32)}, ValueError, r"cache_seqlens: got shape \(2, 1\)"),
        ({"layer": 0}, ValueError, r"kv_cache: got shape .*num_layers"),
        ({"norm_weight": np.ones(64, np.float16)}, ValueError, r"norm_weight: got shape \(64,\)"),
        ({"rope_cos": np.ones((8, 32), np.float32)}, ValueError, r"rope_sin: got None, expected a table"),
    ],
)
def test_append_wrong_arguments(change, kind, message):
    arguments = {
        "kv_cache": np.zeros((4, 16, 1, 576), np.float16),
        "block_table": np.zeros((2, 2), np.int32),
        "cache_seqlens": np.ones(2, np.int32),
        "ckv": np.zeros((2, 1, 512), np.float16),
        "kpe": np.zeros((2, 1, 64), np.float16),
    }
    mla_jax.append(**arguments)
    with pytest.raises(kind, match=message):
        mla_jax.append(**arguments | change)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_heads": 0}, ValueError, "num_heads: got 0"),
        ({"num_heads": 16, "num_kv_heads": 3}, ValueError, "num_kv_heads: got 3, expected a divisor"),
        ({"num_heads": 16, "batch_invariant": True}, ValueError, "batch_invariant: got no max_seq_len"),
    ],
)
def test_plan_wrong_options(options, kind, message):
    with pytest.raises(kind, match=message):
        mla_jax.plan_decode(np.ones(2, np.int32), **options)


def test_an_error_in_the_handler_is_raised(monkeypatch):
    """As XLA's error, with the exception's own words; the next call is as good as any."""
    inputs = valid()
    expected = decode(inputs)[0].tobytes()
    run = jax.jit(mla_jax.mla_decode)
    bad = np.where(np.arange(inputs.block_table.shape[1]) == 1, 1000, inputs.block_table).astype(np.int32)
    monkeypatch.setenv("MLACORE_CHECK", "1")
    with pytest.raises(Exception, match=r"IndexError: block_table: sequence 0, column 1 got page 1000, expected 0 <= "):
        jax.block_until_ready(run(*inputs._replace(block_table=bad)))
    monkeypatch.delenv("MLACORE_CHECK")
    assert np.asarray(run(*inputs)[0]).tobytes() == expected


def test_what_xla_is_told():
    inputs = valid()
    lowered = jax.jit(mla_jax.mla_decode).lower(*inputs).as_text()
    assert "custom_call @mlacore_decode(" in lowered
    assert r"\22dtype\22:\22bfloat16\22" in lowered, "the spec is an attribute"
