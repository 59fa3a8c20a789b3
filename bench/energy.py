"""Energy of a call: what bounds a decode that runs at the GPU's power limit.

A call of many rows loads pages at the memory's rate and multiplies at the tensor cores' rate at the same time, and
each alone takes most of the power there is, or all. How fast it can go is then a matter of energy, which NVML counts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from bench.nvml import Meter
from bench.timing import Figures, Replay

SECONDS = 0.8  # of replays that count: eight steps of the counter
SETTLE_SECONDS = 0.3
LIMIT_SECONDS = 5  # after which the counter is taken to stand still
REPLAYS = 8  # queued at a time, the next ones before they are done: the GPU does not pause


@dataclass(frozen=True, slots=True)
class Energy(Figures):
    """Mean time, power and energy of a call, replayed without pause."""

    us: float
    watts: float
    millijoules: float


def measure(replay: Replay, num_calls: int, stream: Any, meter: Meter) -> Energy | None:
    """Replay a graph of `num_calls` calls for about a second; None where NVML does not count energy."""
    import cupy

    begin = time.perf_counter()
    before = meter.joules()
    first: tuple[float, float, Any] | None = None
    calls, earlier = 0, None
    while before is not None and time.perf_counter() < begin + LIMIT_SECONDS:
        for _ in range(REPLAYS):
            replay()
        done = cupy.cuda.Event()
        done.record(stream)
        joules, now = meter.joules(), time.perf_counter()  # some ms, in which the GPU works
        if earlier is not None:
            earlier.synchronize()
        earlier = done
        calls += REPLAYS * num_calls
        if joules is None or joules == before:
            continue
        before = joules  # the counter has just moved: it tells the energy up to now
        if first is None:
            if now >= begin + SETTLE_SECONDS:
                first, calls = (now, joules, done), 0
        elif now >= first[0] + SECONDS:
            done.synchronize()
            us = cupy.cuda.get_elapsed_time(first[2], done) * 1e3 / calls
            watts = (joules - first[1]) / (now - first[0])
            return Energy(us, watts, watts * us * 1e-3)
    return None
