"""The benches themselves, as far as no GPU is needed: their parts one by one, and a whole run over a pretended CuPy."""

from __future__ import annotations

import contextlib
import json
import lzma
import math
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from cases import PERF, Case

import mlacore
from bench import ceilings, check, decode, energy, environment, host, nvml, peers, timing
from bench.inputs import PAGE_BYTES, Stock
from mlacore.plan import DecodePlan

# ---- a pretended CuPy: NumPy's arrays, host time for device time, launches that do nothing -------------------------


class Event:
    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        pass


class Graph:
    """Holds the calls that were recorded, and repeats none: they ran while they were recorded."""

    def upload(self, stream):
        pass

    def launch(self, stream):
        stream.launches += 1
        time.sleep(1e-3)


class Stream:
    ptr = 0
    launches = 0

    def __init__(self, non_blocking=False):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def begin_capture(self):
        pass

    def end_capture(self):
        return Graph()

    def synchronize(self):
        pass


class RawKernel:
    def __init__(self, source, name, options=()):
        pass

    def __call__(self, grid, block, arguments, shared_mem=0):
        assert all(size >= 1 for size in grid + block)


def pretended_cupy() -> types.ModuleType:
    module = types.ModuleType("cupy")
    module.ndarray = type("ndarray", (), {})  # which none here is
    for name in ("zeros", "empty", "full", "arange", "asarray", "empty_like", "matmul", "int32", "float32", "float16"):
        setattr(module, name, getattr(np, name))
    properties = {"name": b"NVIDIA H100 80GB HBM3", "multiProcessorCount": 132, "l2CacheSize": 1, "totalGlobalMem": 8}
    module.RawKernel = RawKernel
    module.get_default_memory_pool = lambda: types.SimpleNamespace(free_all_blocks=lambda: None)
    module.cuda = types.SimpleNamespace(
        Event=Event,
        Stream=Stream,
        get_elapsed_time=lambda start, end: (end.at - start.at) * 1e3,
        Device=lambda: types.SimpleNamespace(id=0, synchronize=lambda: None),
        runtime=types.SimpleNamespace(
            deviceGetPCIBusId=lambda device: "0000:01:00.0", getDeviceProperties=lambda device: properties
        ),
    )
    return module


class OnePeer:
    """Computes the definition in two variants; takes no float16, as a peer may."""

    name = "One"

    def variants(self, inputs):
        if inputs.case.dtype == "float16":
            raise RuntimeError("no float16\nfor you")
        for _ in range(2):
            yield [
                lambda q=q, table=table: self._attend(inputs, q, table)
                for q, table in zip(inputs.q, inputs.block_table, strict=True)
            ]

    def _attend(self, inputs, q, table):
        out, lse = mlacore.mla_decode_reference(q, inputs.pool, table, inputs.lengths, causal=inputs.case.causal)
        return out.reshape(out.shape[0], 1, -1, out.shape[-1]), lse


class WrongPeer(OnePeer):
    """Forgets the last sequence in its first variant."""

    name = "Wrong"

    def variants(self, inputs):
        first, second = super().variants(inputs)

        def forgetful(call):
            out, lse = call()
            out[-1] = np.nan
            return out, lse

        yield [lambda call=call: forgetful(call) for call in first]
        yield second


class PretendedPeers(peers.Peers):
    def __init__(self):
        self.found, self.missing, self.torch = [OnePeer(), WrongPeer()], {"Two": "not there"}, None

    def on(self, stream):
        return contextlib.nullcontext()

    def capture(self, calls, stream):
        return timing.capture(calls, stream)

    def to_cupy(self, result):
        return result[0]


class PretendedMeter:
    """600 W at 1500 MHz, on a counter that moves with every reading."""

    def __init__(self, bus_id="", counts=True):
        self.counts = counts
        self.begin = time.perf_counter()

    def __call__(self):
        return nvml.Reading(1500.0, 600.0)

    def joules(self):
        return 600.0 * (time.perf_counter() - self.begin) if self.counts else None

    def limit_watts(self):
        return 700.0


CASES = [
    Case(3, 2, 200, 16, causal=True, varlen=True, kind="mtp"),
    Case(2, 1, 130, 64, kind="sweep", shortest=10),
    Case(1, 1, 70, 80, dtype="float16", kind="sweep"),
]


@pytest.fixture
def gpu(monkeypatch):
    """Benches that believe in a GPU; decode and plan are NumPy's, which take no stream."""
    attend, plan, update = mlacore.mla_decode, mlacore.plan_decode, DecodePlan.update
    cupy = pretended_cupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(mlacore, "mla_decode", lambda *a, stream, **options: attend(*a, **options))
    monkeypatch.setattr(mlacore, "plan_decode", lambda *a, stream, **options: plan(*a, **options))
    monkeypatch.setattr(DecodePlan, "update", lambda self, lengths, stream: update(self, lengths))
    monkeypatch.setattr(decode, "PERF", CASES)
    monkeypatch.setattr(decode, "Peers", PretendedPeers)
    monkeypatch.setattr(decode, "Stock", lambda cases, l2_bytes, xp: Stock(cases, l2_bytes=l2_bytes, xp=np))
    monkeypatch.setattr(decode, "open_meter", PretendedMeter)
    monkeypatch.setattr(decode, "_is_weighed", lambda case: case.kind == "mtp")
    monkeypatch.setattr(energy, "SECONDS", 0.02)
    monkeypatch.setattr(energy, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(timing, "QUICK", timing.Budget(1, 0.01, 3, 10, 0))
    monkeypatch.setattr(environment, "why_not", lambda: None)
    monkeypatch.setattr(environment, "_smi", lambda *fields: {})
    monkeypatch.setattr(ceilings, "_num_sms", lambda: 132)
    monkeypatch.setattr(ceilings, "_copy_bandwidth", lambda: 2e12)
    monkeypatch.setattr(ceilings.ceilings, "read_bandwidth", lambda: 3e12)
    monkeypatch.setattr(ceilings, "normal", lambda shape, seed, dtype, xp, scale: np.ones(shape, dtype))
    monkeypatch.setattr(ceilings, "GEMM_SIZE", 64)
    monkeypatch.setattr(host, "BATCHES", (1, 3))
    monkeypatch.setattr(host, "host_us", lambda call, stream, **_: timing.host_us(call, stream, 2, 1))
    monkeypatch.setattr(decode, "host_us", lambda call, stream, _: timing.host_us(call, stream, 2, 1))
    caches = (ceilings._empty_kernel, ceilings._load_only_kernel, environment.pci_bus_id)
    for cached in caches:
        cached.cache_clear()
    yield cupy
    for cached in caches:
        cached.cache_clear()


def test_a_whole_run(gpu, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert decode.main(["--quick", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    first, second, third = result["rows"]
    assert [one["id"] for one in result["rows"]] == [case.id for case in CASES]
    assert first["tiles"] == sum(-(-length // 64) for length in CASES[0].draw_lengths())  # 32 rows: one block
    assert third["tiles"] == 2 * 2  # 80 rows are two blocks, 70 tokens two tiles
    assert first["peers"]["One"]["relative_l2"] < 1e-6
    assert first["error"]["sequences"] == 3
    assert first["mlacore"]["sm_mhz"] == 1500.0
    assert first["mlacore"]["watts"] == 600.0
    assert second["shortest"] == 10
    assert third["peers"] == {}
    assert third["left_out"] == dict.fromkeys(("One", "Wrong"), "after 0 variants: no float16")
    assert first["peers"]["Wrong"]["variant"] == 1
    assert first["left_out"] == {"Wrong": "variant 0: wrong by nan in relative L2"}
    assert first["floor_us"] >= first["load_only"]["us"]
    assert set(first["energy"]) == {"load only", "mlacore", "One", "Wrong"}
    assert all(one["watts"] == pytest.approx(600, rel=0.05) for one in first["energy"].values())
    assert second["energy"] == {}
    assert result["ceilings"]["rest_watts"] == pytest.approx(600, rel=0.05)
    assert result["ceilings"]["gemm_energy"]["flops"] == 2 * 64**3
    assert result["ceilings"]["gemm_label"] == "CuPy 64³ float16"
    assert result["ceilings"]["gemm_sm_mhz"] == 1500.0
    assert result["ceilings"]["gemm_tflops"] is not None
    assert len(result["host"]) == len(host.BATCHES) * len(host.NUM_HEADS)
    assert [row["route"] for row in result["routes"]] == ["CuPy arrays", "in a CUDA graph"]
    assert all(row["us"] > 0 for row in result["routes"])
    assert set(result["seconds"]) >= {"start", "ceilings", "inputs", "check", "capture", "timing", "host"}
    assert result["peers_missing"] == {"Two": "not there"}
    printed = capsys.readouterr().out
    assert "better peer" in printed
    assert "One mJ (×)" in printed
    assert "b=3 s_q=2 h=16 200 var" in printed


def test_a_complete_run_goes_to_the_results_under_its_minute(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(decode.table, "RESULTS", tmp_path)
    monkeypatch.setattr(decode, "Budget", lambda: timing.QUICK)
    assert decode.main([]) == 0
    (path,) = tmp_path.iterdir()
    when = json.loads(path.read_text())["when"]
    assert path.name == f"nvidia-h100-80gb-hbm3-{when[:10]}-{when[11:13]}{when[14:16]}.json"


def test_only_picks_cases_and_leaves_the_host_out(gpu, tmp_path):
    path = tmp_path / "result.json"
    assert decode.main(["--only", "mtp", "--quick", "--no-peers", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert [one["kind"] for one in result["rows"]] == ["mtp"]
    assert result["host"] == result["routes"] == []
    assert result["rows"][0]["peers"] == {}
    with pytest.raises(SystemExit):
        decode.main(["--only", "no such case"])


def test_a_failed_row_does_not_lose_the_others(gpu, tmp_path, monkeypatch, capsys):
    attend = mlacore.mla_decode

    def broken(q, *rest, **options):
        out, lse = attend(q, *rest, **options)
        if q.shape[2] == 64:
            out[...] = 0
        return out, lse

    monkeypatch.setattr(mlacore, "mla_decode", broken)
    monkeypatch.setattr(decode.table, "RESULTS", tmp_path)
    monkeypatch.setattr(decode, "Budget", lambda: timing.QUICK)
    monkeypatch.setattr(host, "measure", lambda stream: 1 / 0)
    assert decode.main([]) == 1
    assert list(tmp_path.iterdir()) == []  # not a complete run
    printed = capsys.readouterr().out
    assert f"FAILED {CASES[1].id}: AssertionError" in printed
    assert "FAILED host: ZeroDivisionError" in printed
    assert "b=1 s_q=1 h=80 70 fp16" in printed


def test_host_prints_a_line_a_shape(gpu, capsys):
    assert host.main() == 0
    lines = capsys.readouterr().out.splitlines()
    shapes = len(host.BATCHES) * len(host.NUM_HEADS)
    assert lines[shapes + 1] == ""
    assert [line.split("  ")[0] for line in lines[shapes + 2 :]] == ["one call", "CuPy arrays", "in a CUDA graph"]


def test_a_call_in_jit_is_timed_by_the_calls_there_are_more(monkeypatch):
    jax = pytest.importorskip("jax", reason="needs the jax extra")
    monkeypatch.setattr(host, "JIT_RUNS", 5)
    with jax.default_device(jax.devices("cpu")[0]):
        assert 5 < host.jit_us(1, 2, 9) < 50_000  # the NumPy backend's time of a call
        pool = np.zeros((4, 1, 64, 1, 576), np.float16)
        given = pool[0, :, :1, :, :], pool, np.zeros((1, 1), np.int32), np.ones(1, np.int32)
        lowered = host._step(4).lower(*given).compile().as_text()
    assert lowered.count('custom_call_target="mlacore_decode"') == 4, "none is dropped, or taken for another"
    times = iter([99.0, 99.0, 99.0, 10.0, 30.0, 20.0, 40.0, 50.0])
    clock = [0.0]

    def call() -> None:
        clock[0] += next(times)

    monkeypatch.setattr(host.time, "perf_counter", lambda: clock[0] * 1e-6)
    assert host._wall_us(call) == pytest.approx(30.0)


def test_every_route_that_there_is(gpu, monkeypatch):
    """torch and JAX by stand-ins, whose arrays are CuPy's."""
    given: list[set[str]] = []

    def library(name):
        return lambda array: given.append({name}) or array

    streams = types.SimpleNamespace(stream=lambda _: contextlib.nullcontext(), ExternalStream=lambda handle: handle)
    torch = types.SimpleNamespace(from_dlpack=library("torch"), cuda=streams)
    jax = types.SimpleNamespace(device_put=library("jax"))
    monkeypatch.setattr(host, "_jax_on_gpu", lambda: jax)
    monkeypatch.setattr(host, "jit_us", lambda batch, num_heads, layers: 7.0 if layers == host.LAYERS else 0.0)
    rows = {row["route"]: row["us"] for row in host.routes(gpu.cuda.Stream(), torch)}
    assert list(rows) == ["CuPy arrays", "torch tensors", "JAX arrays", "in jax.jit", "in a CUDA graph"]
    assert rows["in jax.jit"] == 7.0
    assert given == [{"torch"}] * 6 + [{"jax"}] * 4


@pytest.mark.parametrize("command", [lambda: decode.main([]), host.main])
def test_without_a_gpu_the_benches_say_what_is_missing(command, monkeypatch, capsys):
    monkeypatch.setattr(environment, "why_not", lambda: "no GPU here")
    assert command() == 2
    assert "no GPU here" in capsys.readouterr().err


def test_gemm_without_cublas_is_said_to_be_unmeasured(gpu, monkeypatch):
    def no_cublas(*arguments, **options):
        raise ImportError("libcublas")

    monkeypatch.setattr(gpu, "matmul", no_cublas)
    rates = ceilings._gemm_rates(None, Stream(), timing.QUICK, None)
    assert rates["gemm_tflops"] is None
    assert rates["gemm_label"] == "not measured (ImportError: libcublas)"


# ---- parts ---------------------------------------------------------------------------------------------------------


def test_sets_of_a_case_are_disjoint_and_cover_the_l2():
    case = Case(2, 1, 130, 16)
    stock = Stock([case, Case(1, 1, 64, 16, dtype="float16")], l2_bytes=5 * PAGE_BYTES, xp=np)
    inputs = stock.inputs(case)
    assert len(inputs.q) == 3  # 15 pages of 6 a set
    used = np.concatenate([np.sort(table[:, :3].ravel()) for table in inputs.block_table])
    assert len(set(used.tolist())) == len(used) == len(inputs.pool)
    other = stock.inputs(Case(1, 1, 64, 16, dtype="float16"))
    assert {str(array.dtype) for array in (other.pool, other.q[0], other.out[0])} == {"float16"}
    assert len(other.pool) == 15


def test_pools_of_the_published_cases_fit_an_80_gb_gpu():
    l2_bytes = 50 << 20
    needed = {}
    for case in PERF:
        per_set = sum(-(-length // 64) for length in case.draw_lengths()) * PAGE_BYTES
        needed[case.dtype] = max(needed.get(case.dtype, 0), per_set * math.ceil(3 * l2_bytes / per_set))
    assert sum(needed.values()) < 10e9  # beside torch, peers' scratch and q, out


def test_check_takes_part_of_the_heads_where_the_definition_is_dear(monkeypatch):
    monkeypatch.setattr(check, "CHECK_FLOP", 2.0 * 300 * 1088 * 4)  # four heads of 300 tokens
    case = Case(3, 1, 300, 16, lengths=(300, 100, 200))
    inputs = Stock([case], l2_bytes=1, xp=np).inputs(case)
    expected = check.references(inputs)
    assert [one.sequence for one in expected] == [1, 2, 0]  # shortest, median, longest
    assert [len(one.out[0]) for one in expected] == [8, 6, 4]
    plan, calls = decode.our_calls(inputs, None)
    assert plan.num_workers >= 1
    errors = check.check(inputs, calls[0], expected, lambda: None)
    assert errors["sequences"] == 3
    assert check.relative_l2(inputs.out[0], expected) == pytest.approx(errors["relative_l2"])
    with pytest.raises(AssertionError, match="sequence 1 of 100 tokens"):
        check.check(inputs, lambda: None, expected, lambda: None)  # buffers still full of NaN


class Nvml:
    """NVML's functions, on ctypes' own arguments."""

    known = b"0000:01:00.0"
    power_status = 0

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus_id, handle):
        handle._obj.value = 42
        return 0 if bus_id == self.known else 6

    def nvmlDeviceGetClockInfo(self, handle, clock_type, value):
        assert (handle.value, clock_type) == (42, 1)
        value._obj.value = 1665
        return 0

    def nvmlDeviceGetFieldValues(self, handle, count, field):
        assert (handle.value, count, field._obj.field_id) == (42, 1, 186)
        field._obj.value, field._obj.status = 650_400, self.power_status
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, value):
        assert handle.value == 42
        value._obj.value = 12_345_678
        return self.power_status

    def nvmlDeviceGetEnforcedPowerLimit(self, handle, value):
        assert handle.value == 42
        value._obj.value = 700_000
        return self.power_status


def test_meter_reads_clock_and_power():
    library = Nvml()
    meter = nvml.Meter("0000:01:00.0", library)
    assert meter() == nvml.Reading(1665.0, 650.4)
    library.power_status = 3  # not supported
    assert meter() == nvml.Reading(1665.0, None)
    with pytest.raises(OSError, match="NVML error 6"):
        nvml.Meter("0000:02:00.0", library)


def test_meter_reads_the_energy_counter_and_the_limit():
    library = Nvml()
    meter = nvml.Meter("0000:01:00.0", library)
    assert meter.joules() == 12_345.678
    assert meter.limit_watts() == 700.0
    library.power_status = 3
    assert meter.joules() is meter.limit_watts() is None


def test_energy_is_taken_between_two_steps_of_the_counter(monkeypatch):
    clock = _clocked(monkeypatch)
    monkeypatch.setattr(energy, "SECONDS", 0.8)
    monkeypatch.setattr(energy, "SETTLE_SECONDS", 0.3)

    class Stepping(PretendedMeter):
        def joules(self):  # 900 W while it settles, 500 W later, seen every 0.1 s
            seconds = int(clock["s"] * 10 + 1e-6) / 10
            return 900 * min(seconds, 0.3) + 500 * max(seconds - 0.3, 0)

    def replay() -> None:  # two calls of 0.5 ms
        clock["s"] += 1e-3

    measured = energy.measure(replay, 2, Stream(), Stepping())
    assert measured.us == pytest.approx(500.0)
    assert measured.watts == pytest.approx(500.0, rel=0.02)
    assert measured.millijoules == pytest.approx(250.0, rel=0.02)
    assert energy.measure(replay, 2, Stream(), PretendedMeter(counts=False)) is None


def test_a_counter_that_stands_still_is_given_up(monkeypatch):
    clock = _clocked(monkeypatch)

    class Still(PretendedMeter):
        def joules(self):
            return 1.0 if clock["s"] < 1 else None  # and then it is gone

    def replay() -> None:
        clock["s"] += 1e-2

    assert energy.measure(replay, 2, Stream(), Still()) is None
    assert energy.LIMIT_SECONDS <= clock["s"] < energy.LIMIT_SECONDS + 1


def test_long_cases_of_many_rows_are_weighed():
    weighed = [case for case in PERF if decode._is_weighed(case)]
    assert {(case.kind, case.num_heads * case.seq_len_q) for case in weighed} == {
        ("compute", 128),
        ("compute", 256),
        ("tp", 64),
    }


def test_field_value_has_nvmls_layout():
    assert nvml.ctypes.sizeof(nvml._FieldValue) == 40
    assert nvml._FieldValue.status.offset == 28
    assert nvml._FieldValue.value.offset == 32


def test_no_meter_without_nvml(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(nvml.ctypes, "CDLL", missing)
    assert nvml.open_meter("0000:01:00.0") is None


def _clocked(monkeypatch):
    """A device and a host clock that move only when a graph runs or a meter is read."""
    clock = {"s": 0.0}

    class Clocked(Event):
        def record(self, stream=None):
            self.at = clock["s"]

    cuda = types.SimpleNamespace(Event=Clocked, get_elapsed_time=lambda start, end: (end.at - start.at) * 1e3)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["s"])
    return clock


def test_graphs_take_turns(monkeypatch):
    clock = _clocked(monkeypatch)
    order: list[str] = []

    def graph(name: str, seconds: float):
        def replay() -> None:
            order.append(name)
            clock["s"] += seconds

        return replay

    budget = timing.Budget(rounds=2, seconds=0, min_replays=3, max_replays=5, settle_seconds=0)
    graphs = {"ours": graph("ours", 1e-3), "theirs": graph("theirs", 3e-3)}
    measured = timing.time_in_turns(graphs, 10, Stream(), budget)
    assert order == ["ours"] * 4 + ["theirs"] * 8 + ["ours"] * 4  # one to settle, three that count; and backwards
    assert measured["ours"].us == pytest.approx(100.0)
    assert measured["ours"].replays == 6
    assert measured["ours"].sm_mhz is measured["ours"].watts is None
    assert measured["theirs"].us == pytest.approx(300.0)


def test_a_turn_settles_before_it_counts(monkeypatch):
    clock = _clocked(monkeypatch)

    def replay() -> None:  # slower from the tenth millisecond on
        clock["s"] += 1e-3 if clock["s"] < 10e-3 else 2e-3

    budget = timing.Budget(rounds=1, seconds=0, min_replays=3, settle_seconds=10e-3)
    measured = timing.time_replays(replay, 1, Stream(), budget)
    assert [measured.low_us, measured.high_us] == pytest.approx([2000.0, 2000.0])


def test_meter_is_read_late_in_a_turn_and_not_too_often(monkeypatch):
    clock = _clocked(monkeypatch)
    asked: list[float] = []

    def replay() -> None:
        clock["s"] += 1e-3

    def meter() -> nvml.Reading:
        asked.append(clock["s"])
        clock["s"] += 1e-3  # slow: ten of these must pass before the next
        return nvml.Reading(1000.0 + len(asked), None)

    budget = timing.Budget(rounds=1, seconds=0.1, max_replays=200, settle_seconds=0)
    measured = timing.time_replays(replay, 1, Stream(), budget, meter)
    assert asked[0] >= 0.02
    assert 6 <= len(asked) <= 8
    assert min(np.diff(asked)) >= 0.011 - 1e-9
    assert measured.us == pytest.approx(1000.0)  # reading it costs the device nothing
    assert 1001 < measured.sm_mhz < 1000 + len(asked)
    assert measured.watts is None
    assert measured.as_json()["watts"] is None


def test_stopwatch_adds_up(monkeypatch):
    clock = _clocked(monkeypatch)
    watch = timing.Stopwatch()
    for seconds in (1.0, 2.0):
        with watch.phase("inputs"):
            clock["s"] += seconds
    with contextlib.suppress(ValueError), watch.phase("check"):
        clock["s"] += 0.5
        raise ValueError
    assert watch.as_json() == {"inputs": 3.0, "check": 0.5}


def test_load_only_kernel_compiles_and_takes_the_shared_memory_we_pass():
    bindings = pytest.importorskip("cuda.bindings.nvrtc", reason="needs the cu13 extra")
    source = Path(ceilings.__file__).with_name("load_only.cu").read_text()
    source += f'\nstatic_assert(sizeof(SharedPlan) == {ceilings.LOAD_ONLY_SHARED_BYTES}, "as the host passes");\n'
    _, program = bindings.nvrtcCreateProgram(source.encode(), b"load_only.cu", 0, None, None)
    options = [b"-arch=sm_90", b"-std=c++17"]
    (status,) = bindings.nvrtcCompileProgram(program, len(options), options)
    _, size = bindings.nvrtcGetProgramLogSize(program)
    log = bytes(size)
    bindings.nvrtcGetProgramLog(program, log)
    assert int(status) == 0, log.decode()


def test_peers_are_unpacked_and_absent_ones_explained(tmp_path):
    (tmp_path / "one.so.xz").write_bytes(lzma.compress(b"library"))
    unpacked = peers._find(tmp_path, "one.so")
    assert unpacked is not None
    assert unpacked.read_bytes() == b"library"
    assert peers._find(tmp_path, "other.so") is None
    found = peers.Peers(tmp_path)
    assert found.found == []
    assert set(found.missing) == {"FlashMLA", "FA3"}
