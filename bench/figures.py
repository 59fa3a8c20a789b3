"""What follows from the measured JSON: rates, shares, ratios to the peers, and their summary by kind. No I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SCHEMA = 2  # of the JSON that `bench.decode` writes
TILE_CYCLES = 2176  # tensor cycles of 64 rows by 64 tokens: QKᵀ 1152 and PV 1024, at 2048 multiply-adds a cycle and SM
TILE_ROWS = 64
MANY_ROWS = "compute + tp h=64"  # the group of every case with 64 query rows or more at large batch
LONG = 16384  # tokens; from here on a case counts as long in the summary

Result = dict[str, Any]
Row = dict[str, Any]


def label(row: Row) -> str:
    """The shape in words: ``b=128 s_q=1 h=128 4K var``."""
    length = _tokens(row["seq_len_k"])
    if row.get("shortest"):
        length = f"{_tokens(row['shortest'])}..{length}"
    words = [f"b={row['batch']} s_q={row['seq_len_q']} h={row['num_heads']}", length]
    words += ["var"] if row["varlen"] else []
    words += ["fp16"] if row.get("dtype") == "float16" else []
    return " ".join(words)


def _tokens(count: int) -> str:
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def gpu_name(result: Result) -> str:
    """The GPU in one word: ``H100``."""
    words = result["gpu"]["name"].removeprefix("NVIDIA ").split()
    return words[0] if words else "GPU"


def tflops(row: Row, us: float) -> float:
    """Rate in TFLOP/s of a call that takes `us`."""
    return row["flops"] / us * 1e-6


def gbytes_per_s(row: Row, us: float) -> float:
    """Rate in GB/s (1e9) of a call that takes `us`."""
    return row["bytes"] / us * 1e-3


def share(row: Row, us: float) -> float:
    """Share of floor: 1 is what loading the pages takes, or the matrix product's rate where that is slower."""
    return row["floor_us"] / us


def tile_cycles(row: Row, num_sms: int) -> float | None:
    """SM cycles that one tile of 64 rows by 64 tokens takes us; None where no clock was read or rows are fewer."""
    clock = row["mlacore"].get("sm_mhz")
    if not clock or "tiles" not in row or row["num_heads"] * row["seq_len_q"] < TILE_ROWS:
        return None
    return row["mlacore"]["us"] * clock * num_sms / row["tiles"]


def energy_us(row: Row, ceilings: dict[str, Any]) -> float | None:
    """Time in which the power limit yields what matrix product and load-only kernel take, above rest, for the call's
    FLOP and pages; None where something of it was not measured."""
    product, rest, limit = (ceilings.get(name) for name in ("gemm_energy", "rest_watts", "limit_watts"))
    loads = row.get("energy", {}).get("load only")
    if not (product and loads and rest and limit):
        return None

    def above_rest(one: dict[str, float]) -> float:
        return one["millijoules"] - rest * one["us"] * 1e-3

    millijoules = above_rest(product) * row["flops"] / product["flops"] + above_rest(loads)
    return millijoules / (limit - rest) * 1e3


def peer_names(rows: Sequence[Row]) -> list[str]:
    """Peers measured in any row, in order of first sight."""
    return list(dict.fromkeys(name for row in rows for name in row["peers"]))


def better_peer(row: Row) -> str | None:
    """The fastest peer measured beside us."""
    return min(row["peers"], key=lambda name: row["peers"][name]["us"], default=None)


def lead(row: Row) -> float | None:
    """The better peer's time over ours: above 1, we are faster."""
    name = better_peer(row)
    return row["peers"][name]["us"] / row["mlacore"]["us"] if name else None


@dataclass(frozen=True, slots=True)
class Spread:
    """Geometric mean of a figure over some rows, its lowest value, and the row that has it."""

    mean: float
    worst: float
    where: str


@dataclass(frozen=True, slots=True)
class Summary:
    """A group of rows: how many, their `lead` (None where no peer ran) and their share of floor."""

    group: str
    count: int
    lead: Spread | None
    share: Spread


def has_many_rows(kind: str, num_heads: int) -> bool:
    """Whether a case of this kind belongs to the group MANY_ROWS."""
    return kind == "compute" or (kind == "tp" and num_heads == TILE_ROWS)


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One summary a kind; beside it short and long cases apart where they differ most."""
    groups = {kind: [row for row in rows if row["kind"] == kind] for kind in dict.fromkeys(row["kind"] for row in rows)}
    groups[MANY_ROWS] = [row for row in rows if has_many_rows(row["kind"], row["num_heads"])]
    for name in (MANY_ROWS, "few"):
        members = groups.get(name, [])
        groups[f"{name}, below 16K"] = [row for row in members if row["seq_len_k"] < LONG]
        groups[f"{name}, from 16K"] = [row for row in members if row["seq_len_k"] >= LONG]
    return [_summary(name, members) for name, members in groups.items() if members]


def _summary(group: str, rows: Sequence[Row]) -> Summary:
    leads = [(value, label(row)) for row in rows if (value := lead(row)) is not None]
    shares = [(share(row, row["mlacore"]["us"]), label(row)) for row in rows]
    return Summary(group, len(rows), _spread(leads) if leads else None, _spread(shares))


def _spread(values: Sequence[tuple[float, str]]) -> Spread:
    mean = math.exp(math.fsum(math.log(value) for value, _ in values) / len(values))
    return Spread(mean, *min(values))
