"""What a decode step costs beside the attention kernel: ``python -m bench.host``.

By batch: the host's time of an eager `mla_decode` with a plan, of the same call replayed as one of a step's layers in a
CUDA graph, and of `plan.update`; the device's time of `plan.update`. By route, for one small call: arrays of CuPy, of
torch and of JAX in an eager call, a call in ``jax.jit``, a graph. Sequences hold one page, so that the device never
keeps the host waiting.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from cases import Case

import mlacore
from bench import environment
from bench.check import to_host
from bench.peers import import_torch
from bench.timing import QUICK, capture, host_us, time_replays
from mlacore.arrays import bfloat16
from mlacore.params import HEAD_DIM_QK, HEAD_DIM_V, PAGE_SIZE

BATCHES = (1, 32, 128, 512, 1024)
NUM_HEADS = (16, 128)
LAYERS = 61  # calls in a graph, and in a jitted function: DeepSeek-V3's


def measure(stream: Any) -> list[dict[str, Any]]:
    """One row a shape: µs of the host for each route, and of the device for planning."""
    return [_row(batch, num_heads, stream) for num_heads in NUM_HEADS for batch in BATCHES]


def _row(batch: int, num_heads: int, stream: Any) -> dict[str, Any]:
    import cupy

    with stream:
        pool = cupy.zeros((batch, PAGE_SIZE, 1, HEAD_DIM_QK), bfloat16)
        block_table = cupy.arange(batch, dtype=cupy.int32).reshape(batch, 1)
        lengths = cupy.full(batch, PAGE_SIZE, cupy.int32)
        drawn = cupy.asarray(Case(batch, 1, 4096, num_heads, varlen=True).draw_lengths(), cupy.int32)
        q = cupy.zeros((batch, 1, num_heads, HEAD_DIM_QK), bfloat16)
        out = cupy.empty((batch, 1, num_heads, HEAD_DIM_V), bfloat16)
        lse = cupy.empty((batch, num_heads, 1), cupy.float32)
    plan = mlacore.plan_decode(lengths, num_heads=num_heads, stream=stream)
    decode = functools.partial(
        mlacore.mla_decode, q, pool, block_table, lengths, plan=plan, out=out, lse=lse, stream=stream
    )
    decode()
    other = mlacore.plan_decode(drawn, num_heads=num_heads, stream=stream)  # planning reads lengths, never the pool
    update = functools.partial(other.update, drawn, stream=stream)
    update()
    step = capture([decode] * LAYERS, stream)
    step()
    planning = time_replays(capture([update] * 100, stream), 100, stream, QUICK)
    figures = {
        "eager_us": host_us(decode, stream),
        "graph_us": host_us(step, stream, repeats=1, bursts=20) / LAYERS,
        "update_us": host_us(update, stream),
        "plan_us": planning.us,
    }
    return {"batch": batch, "num_heads": num_heads} | {name: round(us, 2) for name, us in figures.items()}


# ---- routes --------------------------------------------------------------------------------------------------------

ROUTE_BATCH, ROUTE_HEADS = 1, 16  # little for the device to do
JIT_RUNS = 50


def routes(stream: Any, torch: Any) -> list[dict[str, Any]]:
    """µs of the host for one call by each route there is; `torch` is the module, or None to leave it out."""
    import cupy

    batch, num_heads = ROUTE_BATCH, ROUTE_HEADS
    with stream:
        arguments = {
            "q": cupy.zeros((batch, 1, num_heads, HEAD_DIM_QK), bfloat16),
            "kv_cache": cupy.zeros((batch, PAGE_SIZE, 1, HEAD_DIM_QK), bfloat16),
            "block_table": cupy.arange(batch, dtype=cupy.int32).reshape(batch, 1),
            "cache_seqlens": cupy.full(batch, PAGE_SIZE, cupy.int32),
        }
        buffers = {
            "out": cupy.empty((batch, 1, num_heads, HEAD_DIM_V), bfloat16),
            "lse": cupy.empty((batch, num_heads, 1), cupy.float32),
        }
    plan = mlacore.plan_decode(arguments["cache_seqlens"], num_heads=num_heads, stream=stream)

    def eager(**given: Any) -> Callable[[], Any]:
        call = functools.partial(mlacore.mla_decode, plan=plan, stream=stream, **arguments | buffers | given)
        call()
        return call

    own = eager()
    times = {"CuPy arrays": host_us(own, stream)}
    if torch is not None:
        tensors = {name: torch.from_dlpack(array) for name, array in (arguments | buffers).items()}
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):  # as a torch program has it: one stream
            times["torch tensors"] = host_us(eager(**tensors), stream)
    if (jax := _jax_on_gpu()) is not None:
        imported = {name: jax.device_put(to_host(array)) for name, array in arguments.items()}
        times["JAX arrays"] = host_us(eager(**imported), stream)
        times["in jax.jit"] = jit_us(batch, num_heads, LAYERS)
    step = capture([own] * LAYERS, stream)
    step()
    times["in a CUDA graph"] = host_us(step, stream, repeats=1, bursts=20) / LAYERS
    return [{"route": name, "us": round(us, 2)} for name, us in times.items()]


def _jax_on_gpu() -> Any:
    """JAX, if it has the GPU."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes most of the memory at once
    try:
        import jax
    except ImportError:
        return None
    return jax if jax.default_backend() == "gpu" else None


def jit_us(batch: int, num_heads: int, layers: int) -> float:
    """µs of one of a step's `mlacore.jax.mla_decode` in ``jax.jit``, with one plan: by how much a function of so many
    calls takes longer than one of a single call, result included, over the calls that it has more."""
    import jax

    keys = jax.random.split(jax.random.key(0), 2)
    q = jax.random.normal(keys[0], (batch, 1, num_heads, HEAD_DIM_QK), "bfloat16")
    pool = jax.random.normal(keys[1], (layers, batch, PAGE_SIZE, 1, HEAD_DIM_QK), "bfloat16")
    block_table = np.arange(batch, dtype=np.int32).reshape(batch, 1)
    given = jax.device_put((q, pool, block_table, np.full(batch, PAGE_SIZE, np.int32)))
    one, all_layers = (functools.partial(_step(calls), *given) for calls in (1, layers))
    return (_wall_us(all_layers) - _wall_us(one)) / (layers - 1)


def _step(calls: int) -> Callable[..., Any]:
    import jax

    import mlacore.jax

    @jax.jit
    def step(q: Any, pool: Any, block_table: Any, lengths: Any) -> Any:
        plan = mlacore.jax.plan_decode(lengths, num_heads=q.shape[2])
        results = [
            mlacore.jax.mla_decode(q, pool, block_table, lengths, plan=plan, layer=layer) for layer in range(calls)
        ]
        return jax.numpy.stack([lse for _, lse in results])  # one small result, so that no call is dropped

    return step


def _wall_us(call: Callable[[], Any]) -> float:
    """Median time of a call of JAX until its result is there, in µs."""
    import jax

    times = []
    for _ in range(JIT_RUNS + 3):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - start) * 1e6)
    return float(np.median(times[3:]))  # the first compile


def main() -> int:
    """Measure and print."""
    if why := environment.why_not():
        print(why, file=sys.stderr)
        return 2
    import cupy

    from bench import table

    stream = cupy.cuda.Stream(non_blocking=True)
    print(table.align(table.host_lines(measure(stream))))
    print()
    print(table.align(table.route_lines(routes(stream, import_torch()[0]))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
