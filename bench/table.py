"""Tables from measured JSON: one for the terminal, and the README's, rewritten between markers.

``python -m bench.table`` takes the newest file of each GPU in `bench/results/` and rewrites README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

# Rows of the README's first screen, by kind and shape (batch, seq_len_q, num_heads, seq_len_k); the rest stand below.
HEADLINE = (
    ("compute", 128, 1, 128, 4096),
    ("compute", 128, 1, 128, 16384),
    ("compute", 128, 2, 128, 16384),
    ("tp", 128, 1, 16, 16384),
    ("latency", 1, 1, 128, 4096),
    ("latency", 1, 1, 128, 131072),
    ("latency", 1, 1, 16, 4096),
    ("mtp", 32, 4, 16, 8192),
)

Result = dict[str, Any]
Row = dict[str, Any]


def label(row: Row) -> str:
    """The shape in words: ``b=128 s_q=1 h=128 4K var``."""
    tokens = row["seq_len_k"]
    length = f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
    varied = " var" if row["varlen"] else ""
    return f"b={row['batch']} s_q={row['seq_len_q']} h={row['num_heads']} {length}{varied}"


def tflops(row: Row, us: float) -> float:
    """Rate in TFLOP/s of a call that takes `us`."""
    return row["flops"] / us * 1e-6


def gbytes_per_s(row: Row, us: float) -> float:
    """Rate in GB/s (1e9) of a call that takes `us`."""
    return row["bytes"] / us * 1e-3


def share(row: Row, us: float) -> float:
    """Share of floor: 1 is the fastest that this machine's memory and matrix units allow."""
    return row["floor_us"] / us


def peer_names(result: Result) -> list[str]:
    """Peers measured in any row, in order of first sight."""
    return list(dict.fromkeys(name for row in result["rows"] for name in row["peers"]))


def columns(peers: Sequence[str]) -> list[str]:
    """Column titles of a table with these peers."""
    return ["kind", "case", "µs", "spread", "TFLOP/s", "GB/s", "share of floor", *(f"{name} µs (×)" for name in peers)]


def cells(row: Row, peers: Sequence[str]) -> list[str]:
    """One row as text. A peer's × is its time over ours: above 1, ours is the faster one."""
    ours = row["mlacore"]
    us = ours["us"]
    spread = (ours["high_us"] - ours["low_us"]) / us
    fixed = [
        row["kind"],
        label(row),
        _us(us),
        f"{spread:.1%}",
        f"{tflops(row, us):.0f}",
        f"{gbytes_per_s(row, us):.0f}",
        f"{share(row, us):.0%}",
    ]
    theirs = [row["peers"].get(name) for name in peers]
    return fixed + [f"{_us(one['us'])} ({one['us'] / us:.2f})" if one else "–" for one in theirs]


def plain(result: Result) -> str:
    """The table with aligned columns, for a terminal."""
    peers = peer_names(result)
    lines = [columns(peers), *(cells(row, peers) for row in result["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def markdown(result: Result, only: Iterable[tuple[str, int, int, int, int]] | None = None) -> str:
    """The table in Markdown under a line that says what it was measured on; `only` picks rows by `HEADLINE`'s key."""
    wanted = None if only is None else set(only)
    rows = [row for row in result["rows"] if wanted is None or _key(row) in wanted]
    peers = peer_names({"rows": rows})
    titles = columns(peers)
    lines = [
        "| " + " | ".join(titles) + " |",
        "|---|---|" + "---:|" * (len(titles) - 2),
        *("| " + " | ".join(cells(row, peers)) + " |" for row in rows),
    ]
    return hardware_line(result) + "\n\n" + "\n".join(lines)


def hardware_line(result: Result) -> str:
    """GPU, driver, date and ceilings in one sentence."""
    gpu, ceilings = result["gpu"], result["ceilings"]
    rate, how = ceilings["gemm_tflops"], ceilings["gemm_label"]
    return (
        f"**{gpu['name']}**, driver {gpu['driver']}, {result['when'][:10]}; in the same run: "
        f"read {ceilings['read_gbs']:.0f} GB/s, matrix product {f'{rate:.0f} TFLOP/s ({how})' if rate else how}."
    )


def newest_results(folder: Path) -> list[Result]:
    """The newest result of each GPU in `folder`, sorted by GPU name."""
    newest: dict[str, Result] = {}
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text())
        name = result["gpu"]["name"]
        if name not in newest or result["when"] > newest[name]["when"]:
            newest[name] = result
    return [newest[name] for name in sorted(newest)]


def rewrite(text: str, results: Sequence[Result], plots: Sequence[Path] = ()) -> str:
    """README text with both tables replaced.

    Parameters
    ----------
    text : str
        With the markers ``<!-- bench:headline -->`` and ``<!-- bench:full -->`` and their closing twins.
    results : sequence of dict
        What to show.
    plots : sequence of Path
        Plots that exist, relative to the README; each follows the full table of its GPU.

    Raises
    ------
    ValueError
        If a marker pair is missing from `text`.
    """
    text = _between(text, "headline", [markdown(result, HEADLINE) for result in results])
    drawn = {path.stem: path for path in plots}
    full = []
    for result in results:
        full.append(markdown(result))
        if path := drawn.get(result["gpu"]["slug"]):
            full.append(f"![Share of floor on {result['gpu']['name']}, case by case]({path.as_posix()})")
    return _between(text, "full", full)


def _between(text: str, name: str, tables: Sequence[str]) -> str:
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no markers {begin} ... {end} in the text")
    body = "\n\n".join(tables) or "Not measured yet: `make bench` on a Hopper GPU fills this table."
    return pattern.sub(lambda _: f"{begin}\n{body}\n{end}", text)


def _key(row: Row) -> tuple[str, int, int, int, int]:
    return (row["kind"], row["batch"], row["seq_len_q"], row["num_heads"], row["seq_len_k"])


def _us(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the README's tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files (default: bench/results)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to rewrite (default: README.md)")
    arguments = parser.parse_args(argv)
    results = newest_results(arguments.results)
    before = arguments.readme.read_text()
    home = arguments.readme.resolve().parent
    plots = [Path(os.path.relpath(path, home)) for path in sorted(arguments.results.resolve().glob("*.png"))]
    after = rewrite(before, results, plots)
    if after != before:
        arguments.readme.write_text(after)
    print(f"{arguments.readme.name}: {len(results)} GPU(s), {'rewritten' if after != before else 'unchanged'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
