"""Timing on the device by CUDA-graph replay, and on the host by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Timing:
    """Time of one call in µs: median over replays, and the 10th and 90th percentile around it."""

    us: float
    low_us: float
    high_us: float
    replays: int

    def as_json(self) -> dict[str, float]:
        """A dictionary of rounded figures."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to replay. Every graph gets `rounds` turns, each of at least `min_replays` and then until `seconds` are
    spent or `max_replays` are done."""

    rounds: int = 3
    seconds: float = 0.1
    min_replays: int = 5
    max_replays: int = 50
    warmup: int = 2


QUICK = Budget(rounds=1, seconds=0.03, min_replays=3, max_replays=10, warmup=1)

Replay = Callable[[], None]


def capture(calls: Sequence[Callable[[], Any]], stream: Any) -> Replay:
    """Record `calls` in order into one CUDA graph of CuPy `stream`; the result launches it there.

    Every call must have run once before (kernels loaded) and must allocate nothing it does not own: memory that goes
    back to the pool after the capture would be written again by each replay.
    """
    with stream:
        stream.begin_capture()
        try:
            for call in calls:
                call()
        finally:
            graph = stream.end_capture()
        graph.upload(stream)
    return lambda: graph.launch(stream)


def time_replays(replay: Replay, num_calls: int, stream: Any, budget: Budget) -> Timing:
    """Time `replay`, a graph of `num_calls` calls launched on `stream`, and return the time of one call.

    The calls of a graph follow each other on the device, so the launch of the graph itself, a few µs, is shared by all
    of them; give short calls many to a graph.
    """
    return time_in_turns({"": replay}, num_calls, stream, budget)[""]


def time_in_turns(replays: dict[str, Replay], num_calls: int, stream: Any, budget: Budget) -> dict[str, Timing]:
    """`time_replays` of several graphs by turns: a chip at its power limit slows as it heats up, and whoever came first
    would be favoured."""
    samples: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(budget.rounds):
        for name, replay in replays.items():
            samples[name] += _one_turn(replay, num_calls, stream, budget)
    timings = {}
    for name, values in samples.items():
        low, median, high = np.percentile(values, (10, 50, 90))
        timings[name] = Timing(float(median), float(low), float(high), len(values))
    return timings


def _one_turn(replay: Replay, num_calls: int, stream: Any, budget: Budget) -> list[float]:
    import cupy

    for _ in range(budget.warmup):
        replay()
    stream.synchronize()
    samples: list[float] = []
    deadline = time.perf_counter() + budget.seconds
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    while len(samples) < budget.min_replays or (len(samples) < budget.max_replays and time.perf_counter() < deadline):
        start.record(stream)
        replay()
        end.record(stream)
        end.synchronize()
        samples.append(cupy.cuda.get_elapsed_time(start, end) * 1e3 / num_calls)
    return samples


def host_us(call: Callable[[], Any], stream: Any, repeats: int = 50) -> float:
    """Host time of one eager call in µs: the median over short bursts, the device's queue empty before each."""
    bursts = []
    for _ in range(5):
        stream.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        bursts.append((time.perf_counter() - start) / repeats * 1e6)
    stream.synchronize()
    return float(np.median(bursts))
