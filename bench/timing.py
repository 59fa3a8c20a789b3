"""Timing on the device by CUDA-graph replay, and on the host by the clock."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.nvml import Meter, Reading

METER_PAUSE_SECONDS = 0.005  # between readings, or ten times what the last one took if that is longer


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured, by name; None if unknown."""

    def as_json(self) -> dict[str, Any]:
        """A dictionary of rounded figures."""
        return {name: None if value is None else round(value, 3) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Timing(Figures):
    """Time of one call in µs: median over replays, and the 10th and 90th percentile around it. Beside it the medians of
    SM clock and power while it ran, None if unknown."""

    us: float
    low_us: float
    high_us: float
    replays: int
    sm_mhz: float | None = None
    watts: float | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to replay. Every graph gets `rounds` turns. A turn begins with `settle_seconds` of replays that do not
    count, one at least; then come `min_replays`, and more until `seconds` are spent or `max_replays` are done."""

    rounds: int = 3
    seconds: float = 0.1
    min_replays: int = 5
    max_replays: int = 50
    settle_seconds: float = 0.06


QUICK = Budget(rounds=1, seconds=0.03, min_replays=3, max_replays=10, settle_seconds=0)

Replay = Callable[[], Any]


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


def time_replays(replay: Replay, num_calls: int, stream: Any, budget: Budget, meter: Meter | None = None) -> Timing:
    """Time `replay`, a graph of `num_calls` calls launched on `stream`, and return the time of one call.

    The calls of a graph follow each other on the device, so the launch of the graph itself, a few µs, is shared by all
    of them; give short calls many to a graph.
    """
    return time_in_turns({"": replay}, num_calls, stream, budget, meter)[""]


def time_in_turns(
    replays: dict[str, Replay], num_calls: int, stream: Any, budget: Budget, meter: Meter | None = None
) -> dict[str, Timing]:
    """`time_replays` of several graphs by turns: a chip at its power limit slows as it heats up, and lets whoever comes
    after a pause go faster for a while. So every other round goes backwards, and a turn settles before it counts.
    `meter` is read while they run."""
    samples: dict[str, list[float]] = {name: [] for name in replays}
    readings: dict[str, list[Reading]] = {name: [] for name in replays}
    for number in range(budget.rounds):
        for name in list(replays)[:: -1 if number % 2 else 1]:
            _one_turn(replays[name], num_calls, stream, budget, meter, samples[name], readings[name])
    timings = {}
    for name, values in samples.items():
        low, median, high = np.percentile(values, (10, 50, 90))
        sm_mhz, watts = (_median([reading[i] for reading in readings[name]]) for i in range(len(Reading._fields)))
        timings[name] = Timing(float(median), float(low), float(high), len(values), sm_mhz, watts)
    return timings


def _one_turn(
    replay: Replay,
    num_calls: int,
    stream: Any,
    budget: Budget,
    meter: Meter | None,
    samples: list[float],
    readings: list[Reading],
) -> None:
    """One turn; appends a time in µs for each replay, and what the meter says once clock and power have settled."""
    import cupy

    settled = time.perf_counter() + budget.settle_seconds
    while True:
        replay()
        stream.synchronize()
        if time.perf_counter() >= settled:
            break
    begin = time.perf_counter()
    next_reading = begin + budget.seconds / 5
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    for count in range(budget.max_replays):
        if count >= budget.min_replays and time.perf_counter() >= begin + budget.seconds:
            break
        start.record(stream)
        replay()
        end.record(stream)
        asked = time.perf_counter()
        if meter is not None and asked >= next_reading:  # now: the replay is under way
            readings.append(meter())
            answered = time.perf_counter()
            next_reading = answered + max(METER_PAUSE_SECONDS, 10 * (answered - asked))
        end.synchronize()
        samples.append(cupy.cuda.get_elapsed_time(start, end) * 1e3 / num_calls)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def host_us(call: Callable[[], Any], stream: Any, repeats: int = 50, bursts: int = 5) -> float:
    """Host time of one eager call in µs: the median over short bursts, the device's queue empty before each."""
    times = []
    for _ in range(bursts):
        stream.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats * 1e6)
    stream.synchronize()
    return float(np.median(times))


class Stopwatch:
    """Wall-clock seconds of a run, by phase: where its time goes.

    Attributes
    ----------
    seconds : dict
        Seconds spent in each phase so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the ``with`` block towards `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def as_json(self) -> dict[str, float]:
        """The phases in order of first use, in seconds."""
        return {name: round(seconds, 1) for name, seconds in self.seconds.items()}
