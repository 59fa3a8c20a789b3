"""What a decode step costs beside the attention kernel, by batch: ``python -m bench.host``.

The host's time of an eager `mla_decode` with a plan, of the same call replayed as one of a step's layers in a CUDA
graph, and of `plan.update`; the device's time of `plan.update`. Sequences hold one page, so that the device never keeps
the host waiting.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from cases import Case

import mlacore
from bench import environment
from bench.timing import QUICK, capture, host_us, time_replays
from mlacore.arrays import bfloat16
from mlacore.params import HEAD_DIM_QK, HEAD_DIM_V, PAGE_SIZE

BATCHES = (1, 32, 128, 512, 1024)
NUM_HEADS = (16, 128)
LAYERS = 61  # calls in a graph: DeepSeek-V3's


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


def main() -> int:
    """Measure and print."""
    if why := environment.why_not():
        print(why, file=sys.stderr)
        return 2
    import cupy

    from bench import table

    print(table.align(table.host_lines(measure(cupy.cuda.Stream(non_blocking=True)))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
