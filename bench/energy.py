"""Energy of a call: what bounds a decode that runs at the GPU's power limit.

A call of many rows loads pages at the memory's rate and multiplies at the tensor cores' rate at the same time, and
each alone takes most of the power there is, or all. How fast it can go is then a matter of energy, which NVML counts.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from bench.nvml import Meter
from bench.timing import Replay

SECONDS = 0.8  # of replays that count: eight steps of the counter
SETTLE_SECONDS = 0.3
REPLAYS = 8  # queued at a time, so that the GPU does not pause in between


@dataclass(frozen=True, slots=True)
class Energy:
    """Mean time, power and energy of a call, replayed without pause."""

    us: float
    watts: float
    millijoules: float

    def as_json(self) -> dict[str, float]:
        """A dictionary of rounded figures."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


def measure(replay: Replay, num_calls: int, stream: Any, meter: Meter) -> Energy | None:
    """Replay a graph of `num_calls` calls for about a second; None where NVML does not count energy."""
    begin = time.perf_counter()
    first: tuple[float, float, int] | None = None
    last = before = meter.joules()
    calls = 0
    while last is not None:
        for _ in range(REPLAYS):
            replay()
        stream.synchronize()
        calls += REPLAYS * num_calls
        now, last = time.perf_counter(), meter.joules()
        if last is None or last == before:
            continue
        before = last  # the counter has just moved: energy, time and calls belong together
        if first is None:
            if now >= begin + SETTLE_SECONDS:
                first = now, last, calls
        elif now >= first[0] + SECONDS:
            seconds, joules, count = now - first[0], last - first[1], calls - first[2]
            return Energy(seconds / count * 1e6, joules / seconds, joules / count * 1e3)
    return None
