"""The parts of the benches that touch the device, each for a moment."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cases import Case

from bench import ceilings, check, decode, environment, host, nvml, timing
from bench.inputs import Stock
from bench.peers import import_torch

pytestmark = pytest.mark.gpu

BRIEF = timing.Budget(rounds=1, seconds=0.05, min_replays=3, max_replays=50, settle_seconds=0)
CASES = [
    Case(2, 2, 1000, 16, causal=True, varlen=True),
    Case(2, 1, 3000, 128, shortest=100),
    Case(1, 1, 500, 80, dtype="float16"),
]


def wait() -> None:
    """For every stream: inputs are made on the default one, the benches run on their own."""
    import cupy

    cupy.cuda.Device().synchronize()


@pytest.fixture(scope="module")
def stock():
    import cupy

    return Stock(CASES, l2_bytes=1, xp=cupy)


@pytest.fixture(scope="module")
def stream():
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_case_passes_its_check_on_either_side(case, stock, stream, monkeypatch):
    inputs = stock.inputs(case)
    wait()
    _, calls = decode.our_calls(inputs, stream)
    monkeypatch.setattr(check, "CHECK_FLOP", 1e6)  # a part of the heads
    on_device = check.references(inputs)
    errors = check.check(inputs, calls[0], on_device, wait)
    assert errors["relative_l2"] < 0.01
    monkeypatch.setattr(check, "_module", lambda array: np)
    for one, other in zip(on_device, check.references(inputs), strict=True):
        assert (one.sequence, one.heads) == (other.sequence, other.heads)
        np.testing.assert_allclose(one.out, other.out, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(one.lse, other.lse, rtol=1e-9)


def test_replays_are_timed_and_metered(stock, stream):
    inputs = stock.inputs(CASES[0])
    wait()
    _, calls = decode.our_calls(inputs, stream)
    calls[0]()
    graphs = {"ours": timing.capture(calls * 20, stream), "load only": ceilings.load_only(inputs, 20, stream)}
    meter = nvml.open_meter(environment.pci_bus_id())
    measured = timing.time_in_turns(graphs, 20, stream, BRIEF, meter)
    assert all(1 < one.us < 1000 and math.isfinite(one.high_us) for one in measured.values())
    if meter is not None:
        sm_mhz, watts = meter()
        assert sm_mhz is None or 200 < sm_mhz < 3000
        assert watts is None or 20 < watts < 1500


def test_host_row(stream):
    row = host._row(2, 16, stream)
    assert all(0 < row[name] < 10_000 for name in ("eager_us", "graph_us", "update_us", "plan_us"))


def test_routes(stream):
    rows = {row["route"]: row["us"] for row in host.routes(stream, import_torch()[0])}
    assert {"CuPy arrays", "in a CUDA graph"} <= set(rows)
    assert all(0 < us < 10_000 for us in rows.values()), rows
