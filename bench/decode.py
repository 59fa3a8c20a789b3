"""Paged MLA decode on this GPU, against its ceilings and the peers found: ``python -m bench.decode``.

Every case is checked against the float64 reference, then timed by CUDA-graph replay over sets of q and pages that
cover three times the L2: the whole operation, everything launched per call, on normally distributed data. We, the
load-only kernel and the peers take turns, since a chip at its power limit slows as it heats up. Planning is
timed apart, as is the host's part of an eager call. A complete run is written to `bench/results/`, from where
`bench.table` and `bench.plot` take it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cases import PERF, Case
from compare import LSE_RULE, OUT_RULE, assert_close

import mlacore
from bench import ceilings, table
from bench.inputs import Inputs, Stock
from bench.peers import Peer, Peers
from bench.timing import QUICK, Budget, Replay, capture, host_us, time_in_turns, time_replays
from mlacore import driver, info
from mlacore.params import PAGE_SIZE

SCHEMA = 1
GRAPH_US = 1000  # a graph holds calls for about this long, so that launching it weighs nothing
CHECK_FLOP = 2e10  # what the float64 check of one case may cost on the host, its first sequence aside
SMI_FIELDS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


References = list[tuple[int, np.ndarray, np.ndarray]]  # sequence, its out and its lse in float64


@dataclass(frozen=True, slots=True)
class Bench:
    """What every measurement of a run shares."""

    stream: Any
    budget: Budget
    ceilings: dict[str, Any]
    peers: Peers

    def row(self, case: Case, inputs: Inputs) -> table.Row:
        """Check one case, then time it, the load-only kernel and the peers by turns."""
        plan, calls = _our_calls(inputs, self.stream)
        references = _references(inputs)
        errors = _check(inputs, calls[0], references, self.stream)
        num_calls = self._num_calls(inputs)
        graphs = {
            "mlacore": capture(_cycle(calls, num_calls), self.stream),
            "load only": ceilings.load_only(inputs, num_calls, self.stream),
        }
        peers: dict[str, dict[str, Any]] = {}
        for peer in self.peers.found:
            for variant, (replay, facts) in self._peer(peer, inputs, num_calls, references).items():
                graphs[variant], peers[variant] = replay, facts
        timings = time_in_turns(graphs, num_calls, self.stream, self.budget)
        best: dict[str, dict[str, Any]] = {}
        for variant, facts in peers.items():
            timing = timings[variant].as_json() | facts
            name = facts["name"]
            if name not in best or timing["us"] < best[name]["us"]:
                best[name] = timing
        load_only = timings["load only"]
        compute_us = inputs.flops / (self.ceilings["gemm_tflops"] * 1e6) if self.ceilings["gemm_tflops"] else 0.0
        update = functools.partial(plan.update, inputs.cache_seqlens, stream=self.stream)
        planning = time_replays(capture([update] * 100, self.stream), 100, self.stream, self.budget)
        eager = max(5, min(50, int(20_000 / timings["mlacore"].us)))
        return {
            "id": case.id,
            "kind": case.kind,
            "batch": case.batch,
            "seq_len_q": case.seq_len_q,
            "num_heads": case.num_heads,
            "seq_len_k": case.seq_len_k,
            "varlen": case.varlen,
            "causal": case.causal,
            "tokens": int(inputs.lengths.sum()),
            "flops": inputs.flops,
            "bytes": inputs.bytes,
            "input_sets": len(inputs.q),
            "num_workers": plan.num_workers,
            "load_only": load_only.as_json(),
            "floor_us": round(max(load_only.us, compute_us), 3),
            "mlacore": timings["mlacore"].as_json(),
            "host_us": round(host_us(calls[0], self.stream, eager), 2),
            "plan": planning.as_json(),
            "plan_host_us": round(host_us(update, self.stream), 2),
            "error": errors,
            "peers": best,
        }

    def _peer(
        self, peer: Peer, inputs: Inputs, num_calls: int, references: References
    ) -> dict[str, tuple[Replay, dict[str, Any]]]:
        """A graph of each of the peer's variants, and its error against the same references as ours."""
        graphs: dict[str, tuple[Replay, dict[str, Any]]] = {}
        try:
            with self.peers.on(self.stream):
                for number, calls in enumerate(peer.variants(inputs)):
                    first = self.peers.to_cupy(calls[0]())
                    self.stream.synchronize()
                    out = first.reshape(inputs.out[0].shape)
                    error = max(_relative_l2(out[seq].get(), reference) for seq, reference, _ in references)
                    replay = self.peers.capture(_cycle(calls, num_calls), self.stream)
                    facts = {"name": peer.name, "variant": number, "relative_l2": error}
                    graphs[f"{peer.name} {number}"] = replay, facts
        except RuntimeError as error:  # torch's, from a shape that the peer does not take
            print(f"  {peer.name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
        return graphs

    def _num_calls(self, inputs: Inputs) -> int:
        """Calls a graph: every set at least once, and about GRAPH_US of them at the memory's rate."""
        estimate_us = 10 + inputs.bytes / (self.ceilings["read_gbs"] * 1e3)
        return max(len(inputs.q), math.ceil(GRAPH_US / estimate_us))


def _our_calls(inputs: Inputs, stream: Any) -> tuple[mlacore.DecodePlan, list[Callable[[], Any]]]:
    case, lengths = inputs.case, inputs.cache_seqlens
    plan = mlacore.plan_decode(
        lengths, num_heads=case.num_heads, seq_len_q=case.seq_len_q, causal=case.causal, stream=stream
    )
    options = {"plan": plan, "causal": case.causal, "stream": stream}
    sets = zip(inputs.q, inputs.block_table, inputs.out, inputs.lse, strict=True)
    return plan, [
        functools.partial(mlacore.mla_decode, q, inputs.pool, block_table, lengths, out=out, lse=lse, **options)
        for q, block_table, out, lse in sets
    ]


def _cycle(calls: Sequence[Callable[[], Any]], count: int) -> list[Callable[[], Any]]:
    return [calls[i % len(calls)] for i in range(count)]


def _references(inputs: Inputs) -> References:
    """float64 results of the first set's shortest, median and longest sequence, as far as CHECK_FLOP goes."""
    order = np.argsort(inputs.lengths, kind="stable")
    references: References = []
    cost = 0.0
    for seq in dict.fromkeys(int(order[place]) for place in (0, len(order) // 2, -1)):
        cost += inputs.flops * float(inputs.lengths[seq]) / float(inputs.lengths.sum())
        if references and cost > CHECK_FLOP:
            continue
        length = int(inputs.lengths[seq])
        num_pages = -(-length // PAGE_SIZE)
        pages = inputs.pool.view(np.uint16)[inputs.block_table[0][seq, :num_pages]].get().view(inputs.pool.dtype)
        in_order = np.arange(num_pages, dtype=np.int32)[None]
        out, lse = mlacore.mla_decode_reference(
            inputs.q[0][seq : seq + 1].get(), pages, in_order, np.array([length]), causal=inputs.case.causal
        )
        references.append((seq, out[0], lse[0]))
    return references


def _check(inputs: Inputs, call: Callable[[], Any], references: References, stream: Any) -> dict[str, Any]:
    """Run our call on the first set and compare with the references."""
    inputs.out[0].view(np.uint16).fill(0x7FFF)  # NaN
    inputs.lse[0].fill(math.nan)
    stream.synchronize()
    call()
    stream.synchronize()
    reports = []
    for seq, out, lse in references:
        # Each sequence by itself: outputs shrink with the length, and a short one's would drown the others' errors.
        what = f"{inputs.case.id}: sequence {seq} of {inputs.lengths[seq]} tokens"
        assert_close(inputs.lse[0][seq], lse, LSE_RULE, f"{what}: lse")
        reports.append(assert_close(inputs.out[0][seq], out, OUT_RULE, f"{what}: out"))
    return {
        "sequences": len(reports),
        "max_abs": max(report.max_abs for report in reports),
        "relative_l2": max(report.relative_l2 for report in reports),
    }


def _relative_l2(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


def describe_gpu() -> dict[str, Any]:
    """The current device as JSON."""
    import cupy

    env = info.collect()
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    name = properties["name"].decode()
    return {
        "name": name,
        "slug": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "driver": env.driver_version or _smi("driver_version").get("driver_version", "?"),
        "cuda": ".".join(map(str, env.driver_cuda or ())),
        "num_sms": properties["multiProcessorCount"],
        "l2_bytes": properties["l2CacheSize"],
        "memory_bytes": properties["totalGlobalMem"],
    }


def _smi(*fields: str) -> dict[str, str]:
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (cell.strip() for cell in text.strip().split(",")), strict=False))


def _versions(torch: Any) -> dict[str, str]:
    env = info.collect()
    versions = {"mlacore": mlacore.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("numpy", "ml_dtypes")}
    versions |= {"cupy": env.cupy.version or "", "nvrtc": env.nvrtc.version or ""}
    return versions | ({"torch": torch.__version__} if torch else {})


def _commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(table.ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    return None


def run(cases: Sequence[Case], *, budget: Budget, use_peers: bool, command: str) -> tuple[table.Result, list[str]]:
    """Measure `cases`; the result as JSON, and what went wrong."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    peers = Peers() if use_peers else Peers.none()
    gpu = describe_gpu() | {"before": _smi(*SMI_FIELDS)}
    print(f"{gpu['name']}, driver {gpu['driver']}; peers: {', '.join(p.name for p in peers.found) or 'none'}")
    for name, why in peers.missing.items():
        print(f"  {name} left out: {why}")
    measured = ceilings.measure(peers.torch, stream, budget)
    print("  " + ", ".join(f"{name} {value}" for name, value in measured.items()))
    stock = Stock(cases, l2_bytes=gpu["l2_bytes"])
    cupy.cuda.Device().synchronize()
    bench = Bench(stream, budget, measured, peers)
    rows, failures = [], []
    for case in cases:
        try:
            inputs = stock.inputs(case)
            cupy.cuda.Device().synchronize()
            rows.append(bench.row(case, inputs))
        except Exception as error:  # reported, and the exit status; the other rows must not be lost with this one
            failures.append(f"{case.id}: {type(error).__name__}: {error}")
            print(f"  FAILED {failures[-1]}")
            continue
        print(f"  {case.id}: {rows[-1]['mlacore']['us']:.1f} µs, floor {rows[-1]['floor_us']:.1f} µs", flush=True)
    result = {
        "schema": SCHEMA,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": _commit(),
        "gpu": gpu | {"after": _smi(*SMI_FIELDS)},
        "versions": _versions(peers.torch),
        "ceilings": measured,
        "peers_missing": peers.missing,
        "rows": rows,
    }
    return result, failures


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the JSON of a complete run."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases with TEXT in their id; repeatable")
    parser.add_argument("--quick", action="store_true", help="fewer replays: a first look, not a figure to report")
    parser.add_argument("--no-peers", action="store_true", help="leave the peers out, and torch with them")
    parser.add_argument("--output", type=Path, help="JSON file (complete runs: bench/results/GPU-DATE.json)")
    arguments = parser.parse_args(argv)
    env = info.collect()
    if not (driver.hopper_devices() and env.cupy.version and env.nvrtc.version):
        print(f"The bench measures the SM90 kernels.\n\n{info.report(env)}", file=sys.stderr)
        return 2

    wanted = arguments.only or [""]
    cases = [case for case in PERF if any(text in case.id for text in wanted)]
    if not cases:
        parser.error(f"--only {' '.join(wanted)}: no such case; ids are {', '.join(case.id for case in PERF)}")
    command = shlex.join(["python", "-m", "bench.decode", *(sys.argv[1:] if argv is None else argv)])
    budget = QUICK if arguments.quick else Budget()
    result, failures = run(cases, budget=budget, use_peers=not arguments.no_peers, command=command)
    print("\n" + table.plain(result))
    path = arguments.output
    if path is None and not (arguments.only or arguments.quick or failures):
        path = table.RESULTS / f"{result['gpu']['slug']}-{result['when'][:10]}.json"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nwrote {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
