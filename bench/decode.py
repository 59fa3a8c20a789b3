"""Paged MLA decode on this GPU, against its ceilings and the peers found: ``python -m bench.decode``.

Every case is checked against the float64 definition, then timed by CUDA-graph replay over sets of q and pages that
cover three times the L2: the whole operation, everything launched per call, on normally distributed data. We and the
peers take turns, since a chip at its power limit slows as it heats up; SM clock and power are read meanwhile. The
load-only kernel and batch-invariant calls are timed apart, as are planning and the host's part of an eager call; a few
cases are weighed by energy, too. A complete run is written to `bench/results/`, from where `bench.table` and
`bench.plot` take it.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cases import PERF, Case

import mlacore
from bench import ceilings, energy, environment, host, table
from bench.check import Reference, check, references, relative_l2
from bench.figures import LONG, SCHEMA, Result, Row, has_many_rows
from bench.inputs import Inputs, Stock
from bench.nvml import Meter, open_meter
from bench.peers import Peer, Peers
from bench.timing import QUICK, Budget, Replay, Stopwatch, Timing, capture, host_us, time_in_turns, time_replays

GRAPH_US = 1000  # a graph holds calls for about this long, so that launching it weighs nothing
PEER_ERROR = 0.02  # relative L2 from which a peer's answer is wrong; rounding the output alone gives 0.0017


@dataclass(frozen=True, slots=True)
class Bench:
    """What every measurement of a run shares."""

    stream: Any
    budget: Budget
    ceilings: dict[str, Any]
    peers: Peers
    meter: Meter | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)

    def row(self, case: Case, inputs: Inputs) -> Row:
        """Check one case, then time it and the peers by turns, and what else belongs to it."""
        import cupy

        with self.watch.phase("check"):
            plan, calls = our_calls(inputs, self.stream)
            expected = references(inputs)
            errors = check(inputs, calls[0], expected, cupy.cuda.Device().synchronize)
        with self.watch.phase("capture"):
            num_calls = self._num_calls(inputs)
            graphs = {"mlacore": capture(_cycle(calls, num_calls), self.stream)}
            apart = {"load only": ceilings.load_only(inputs, num_calls, self.stream)}
            if _is_timed_batch_invariant(case):
                _, invariant = our_calls(inputs, self.stream, batch_invariant=True)
                check(inputs, invariant[0], expected, cupy.cuda.Device().synchronize)
                apart["batch-invariant"] = capture(_cycle(invariant, num_calls), self.stream)
            peers: dict[str, dict[str, Any]] = {}
            left_out: dict[str, str] = {}
            for peer in self.peers.found:
                found, why = self._peer(peer, inputs, num_calls, expected)
                for variant, (replay, facts) in found.items():
                    graphs[variant], peers[variant] = replay, facts
                if why:
                    left_out[peer.name] = why
                    print(f"  {case.id}: {peer.name} left out: {why}", file=sys.stderr)
        timings: dict[str, Timing] = {}
        with self.watch.phase("timing"):
            # What needs less power than the contenders would leave some to the one that follows it.
            for together in (apart, graphs):
                timings |= time_in_turns(together, num_calls, self.stream, self.budget, self.meter)
        with self.watch.phase("plan and host"):
            update = functools.partial(plan.update, inputs.cache_seqlens, stream=self.stream)
            planning = time_replays(capture([update] * 100, self.stream), 100, self.stream, QUICK)
            eager_us = host_us(calls[0], self.stream, max(5, min(50, int(20_000 / timings["mlacore"].us))))
        fastest: dict[str, str] = {}  # variant of each peer
        for variant, facts in peers.items():
            so_far = fastest.setdefault(facts["name"], variant)
            if timings[variant].us < timings[so_far].us:
                fastest[facts["name"]] = variant
        spent = {}
        if self.meter and _is_weighed(case):
            replays = {"load only": apart["load only"], "mlacore": graphs["mlacore"]}
            replays |= {name: graphs[variant] for name, variant in fastest.items()}
            with self.watch.phase("energy"):
                for name, replay in replays.items():
                    if one := energy.measure(replay, num_calls, self.stream, self.meter):
                        spent[name] = one.as_json()
        load_only = timings["load only"]
        compute_us = inputs.flops / (self.ceilings["gemm_tflops"] * 1e6) if self.ceilings["gemm_tflops"] else 0.0
        return {
            "id": case.id,
            "kind": case.kind,
            "batch": case.batch,
            "seq_len_q": case.seq_len_q,
            "num_heads": case.num_heads,
            "seq_len_k": case.seq_len_k,
            "shortest": case.shortest,
            "varlen": case.varlen,
            "causal": case.causal,
            "dtype": case.dtype,
            "tokens": int(inputs.lengths.sum()),
            "tiles": inputs.tiles,
            "flops": inputs.flops,
            "bytes": inputs.bytes,
            "input_sets": len(inputs.q),
            "num_workers": plan.num_workers,
            "load_only": load_only.as_json(),
            "floor_us": round(max(load_only.us, compute_us), 3),
            "mlacore": timings["mlacore"].as_json(),
            "batch_invariant": timings["batch-invariant"].as_json() if "batch-invariant" in timings else None,
            "energy": spent,
            "host_us": round(eager_us, 2),
            "plan": planning.as_json(),
            "error": errors,
            "peers": {name: timings[variant].as_json() | peers[variant] for name, variant in fastest.items()},
            "left_out": left_out,
        }

    def _peer(
        self, peer: Peer, inputs: Inputs, num_calls: int, expected: Sequence[Reference]
    ) -> tuple[dict[str, tuple[Replay, dict[str, Any]]], str]:
        """A graph of each of the peer's variants with its error, and why one is missing ("" if none is)."""
        graphs: dict[str, tuple[Replay, dict[str, Any]]] = {}
        why = ""
        try:
            with self.peers.on(self.stream):
                for number, calls in enumerate(peer.variants(inputs)):
                    first = self.peers.to_cupy(calls[0]())
                    self.stream.synchronize()
                    error = relative_l2(first.reshape(inputs.out[0].shape), expected)
                    if not error < PEER_ERROR:  # NaN included
                        why = f"variant {number}: wrong by {error:.2g} in relative L2"
                        continue
                    replay = self.peers.capture(_cycle(calls, num_calls), self.stream)
                    facts = {"name": peer.name, "variant": number, "relative_l2": error}
                    graphs[f"{peer.name} {number}"] = replay, facts
        except RuntimeError as error:  # torch's, from a shape that the peer does not take
            why = f"after {len(graphs)} variants: {(str(error) or type(error).__name__).splitlines()[0]}"
        return graphs, why

    def _num_calls(self, inputs: Inputs) -> int:
        """Calls a graph: every set at least once, and about GRAPH_US of them at the memory's rate."""
        estimate_us = 10 + inputs.bytes / (self.ceilings["read_gbs"] * 1e3)
        return max(len(inputs.q), math.ceil(GRAPH_US / estimate_us))


def our_calls(
    inputs: Inputs, stream: Any, *, batch_invariant: bool = False
) -> tuple[mlacore.DecodePlan, list[Callable[[], Any]]]:
    """A plan, and a call of ours for each input set."""
    case, lengths = inputs.case, inputs.cache_seqlens
    plan = mlacore.plan_decode(
        lengths,
        num_heads=case.num_heads,
        seq_len_q=case.seq_len_q,
        causal=case.causal,
        max_seq_len=int(inputs.lengths.max()),
        batch_invariant=batch_invariant,
        stream=stream,
    )
    options = {"plan": plan, "causal": case.causal, "stream": stream}
    sets = zip(inputs.q, inputs.block_table, inputs.out, inputs.lse, strict=True)
    return plan, [
        functools.partial(mlacore.mla_decode, q, inputs.pool, block_table, lengths, out=out, lse=lse, **options)
        for q, block_table, out, lse in sets
    ]


def _is_timed_batch_invariant(case: Case) -> bool:
    """Where its scratch memory, a state for each split, stays in the low gigabytes."""
    return case.kind in ("latency", "few", "mtp") or (case.kind in ("compute", "tp") and case.seq_len_k <= LONG)


def _is_weighed(case: Case) -> bool:
    """Whose energy is measured: long cases that run at the power limit."""
    return has_many_rows(case.kind, case.num_heads) and case.seq_len_k == LONG


def _cycle(calls: Sequence[Callable[[], Any]], count: int) -> list[Callable[[], Any]]:
    return [calls[i % len(calls)] for i in range(count)]


def _with_progress(cases: Sequence[Case]) -> tuple[Iterable[Case], Callable[[str], Any]]:
    """The cases, behind a progress bar where there is a terminal and tqdm, and what prints a line above it."""
    plain = functools.partial(print, flush=True)
    try:
        from tqdm import tqdm
    except ImportError:
        return cases, plain
    bar = tqdm(cases, desc="bench", unit="case", disable=None)
    return bar, plain if bar.disable else bar.write


def run(
    cases: Sequence[Case], *, budget: Budget, use_peers: bool, with_host: bool, command: str
) -> tuple[Result, list[str]]:
    """Measure `cases`, and the host's part if `with_host`; the result as JSON, and what went wrong."""
    import cupy

    watch = Stopwatch()
    with watch.phase("start"):
        stream = cupy.cuda.Stream(non_blocking=True)
        peers = Peers() if use_peers else Peers.none()
        gpu = environment.describe_gpu() | {"before": environment.gpu_state()}
        meter = open_meter(environment.pci_bus_id())
    print(f"{gpu['name']}, driver {gpu['driver']}; peers: {', '.join(p.name for p in peers.found) or 'none'}")
    for name, why in peers.missing.items():
        print(f"  {name} left out: {why}")
    if meter is None:
        print("  no NVML: clock and power stay unknown")
    with watch.phase("ceilings"):
        measured = ceilings.measure(peers.torch, stream, budget, meter)
        peers.free_memory()
    print("  " + ", ".join(f"{name} {value}" for name, value in measured.items()))
    with watch.phase("inputs"):
        cupy.get_default_memory_pool().free_all_blocks()
        stock = Stock(cases, l2_bytes=gpu["l2_bytes"], xp=cupy)
        cupy.cuda.Device().synchronize()
    bench = Bench(stream, budget, measured, peers, meter, watch)
    rows: list[Row] = []
    failures: list[str] = []
    bar, say = _with_progress(cases)
    for case in bar:
        try:
            with watch.phase("inputs"):
                peers.free_memory()
                inputs = stock.inputs(case)
                cupy.cuda.Device().synchronize()
            rows.append(bench.row(case, inputs))
        except Exception as error:  # reported, and the exit status; the other rows must not be lost with this one
            failures.append(f"{case.id}: {type(error).__name__}: {error}")
            say(f"  FAILED {failures[-1]}")
            continue
        say(f"  {case.id}: {rows[-1]['mlacore']['us']:.1f} µs, floor {rows[-1]['floor_us']:.1f} µs")
    host_rows: list[dict[str, Any]] = []
    routes: list[dict[str, Any]] = []
    if with_host:
        try:
            with watch.phase("host"):
                host_rows = host.measure(stream)
                routes = host.routes(stream, peers.torch)
        except Exception as error:
            failures.append(f"host: {type(error).__name__}: {error}")
            print(f"  FAILED {failures[-1]}", flush=True)
    result = {
        "schema": SCHEMA,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": environment.commit(),
        "seconds": watch.as_json(),
        "gpu": gpu | {"after": environment.gpu_state()},
        "versions": environment.versions(peers.torch),
        "ceilings": measured,
        "peers_missing": peers.missing,
        "rows": rows,
        "host": host_rows,
        "routes": routes,
    }
    return result, failures


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the JSON of a complete run."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="cases with TEXT in their id, which begins with the kind"
    )
    parser.add_argument("--quick", action="store_true", help="fewer replays: a first look, not a figure to report")
    parser.add_argument("--no-peers", action="store_true", help="leave the peers out, and torch with them")
    parser.add_argument("--output", type=Path, help="JSON file (complete runs: bench/results/GPU-DATE-TIME.json)")
    arguments = parser.parse_args(argv)
    if why := environment.why_not():
        print(why, file=sys.stderr)
        return 2

    cases = [case for case in PERF if any(text in case.id for text in arguments.only or [""])]
    if not cases:
        parser.error(f"--only {' '.join(arguments.only)}: no such case; ids are {', '.join(case.id for case in PERF)}")
    command = shlex.join(["python", "-m", "bench.decode", *(sys.argv[1:] if argv is None else argv)])
    budget = QUICK if arguments.quick else Budget()
    result, failures = run(
        cases, budget=budget, use_peers=not arguments.no_peers, with_host=not arguments.only, command=command
    )
    print("\n" + table.plain(result))
    print("\nseconds: " + ", ".join(f"{name} {seconds}" for name, seconds in result["seconds"].items()))
    path = arguments.output
    if path is None and not (arguments.only or arguments.quick or failures):
        path = table.RESULTS / f"{result['gpu']['slug']}-{result['when'][:16].replace('T', '-').replace(':', '')}.json"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nwrote {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
