"""Tables from measured JSON: one for the terminal, and the README's, rewritten between markers.

``python -m bench.table`` takes the newest file of each GPU in `bench/results/` and rewrites README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import figures
from bench.figures import Result, Row, Spread, gpu_name, label, share

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

Lines = list[list[str]]  # cells of a table, its titles first


# ---- what each table holds -----------------------------------------------------------------------------------------


def full_lines(result: Result) -> Lines:
    """Every case. A peer's × is its time over ours: above 1, ours is the faster one."""
    rows = result["rows"]
    num_sms = result["gpu"].get("num_sms", 0)

    def cycles(row: Row) -> str:
        value = figures.tile_cycles(row, num_sms)
        return f"{value:.0f} ({figures.TILE_CYCLES / value:.0%})" if value else "–"

    def theirs(name: str) -> Callable[[Row], str]:
        return lambda row: _versus(row, name) if name in row["peers"] else "–"

    columns: dict[str, Callable[[Row], str]] = {
        "kind": lambda row: row["kind"],
        "case": label,
        "µs": lambda row: _us(row["mlacore"]["us"]),
        "spread": lambda row: f"{(row['mlacore']['high_us'] - row['mlacore']['low_us']) / row['mlacore']['us']:.1%}",
        "TFLOP/s": lambda row: f"{figures.tflops(row, row['mlacore']['us']):.0f}",
        "GB/s": lambda row: f"{figures.gbytes_per_s(row, row['mlacore']['us']):.0f}",
        "share of floor": lambda row: f"{share(row, row['mlacore']['us']):.0%}",
    }
    optional: dict[str, Callable[[Row], str]] = {
        "batch-invariant µs (÷)": _invariant,
        "cycles a tile": cycles,
        "MHz": lambda row: _whole(row["mlacore"].get("sm_mhz")),
        "W": lambda row: _whole(row["mlacore"].get("watts")),
    }
    columns |= {title: cell for title, cell in optional.items() if any(cell(row) != "–" for row in rows)}
    columns |= {f"{name} µs (×)": theirs(name) for name in figures.peer_names(rows)}
    return [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]


def summary_lines(result: Result) -> Lines:
    """Geometric means and worst cases of each group of rows."""

    def cells(spread: Spread | None, form: str) -> list[str]:
        return [format(spread.mean, form), f"{spread.worst:{form}} at {spread.where}"] if spread else ["–", "–"]

    titles = ["group", "cases", "better peer ÷ mlacore, geomean", "worst", "share of floor, geomean", "worst"]
    return [
        titles,
        *(
            [one.group, str(one.count), *cells(one.lead, ".2f"), *cells(one.share, ".0%")]
            for one in figures.summarise(result["rows"])
        ),
    ]


def energy_lines(result: Result) -> Lines:
    """Energy of a call, where it was measured; nothing where it never was."""
    rows = [row for row in result["rows"] if row.get("energy", {}).get("mlacore")]
    if not rows:
        return []
    names = [name for name in figures.peer_names(rows) if any(name in row["energy"] for row in rows)]
    lines = [["case", "µs", "W", "mJ", *(f"{name} mJ (×)" for name in names), "product + loads, µs at the limit"]]
    for row in rows:
        ours, bound = row["energy"]["mlacore"], figures.energy_us(row, result["ceilings"])
        cells = [_us(ours["us"]), _whole(ours["watts"]), _whole(ours["millijoules"])]
        for name in names:
            theirs = row["energy"].get(name, {}).get("millijoules")
            cells.append(f"{_whole(theirs)} ({theirs / ours['millijoules']:.2f})" if theirs else "–")
        lines.append([label(row), *cells, _us(bound) if bound else "–"])
    return lines


def host_lines(rows: Sequence[Row]) -> Lines:
    """What `bench.host` measured, in µs."""
    titles = ["h", "batch", "eager call, host", "call in a graph, host", "plan.update, host", "plan.update, GPU"]
    names = ("eager_us", "graph_us", "update_us", "plan_us")
    return [titles, *([str(row["num_heads"]), str(row["batch"]), *(f"{row[n]:.1f}" for n in names)] for row in rows)]


def route_lines(rows: Sequence[Row]) -> Lines:
    """What `bench.host` measured of each way to make one call, in µs."""
    return [["one call", "host"], *([row["route"], f"{row['us']:.1f}"] for row in rows)]


def headline_lines(results: Sequence[Result]) -> Lines:
    """A few cases, every GPU side by side."""
    found = [{_key(row): row for row in result["rows"]} for result in results]
    names = _short_names(results)
    lines = [["kind", "case", *(f"{name} {what}" for name in names for what in ("µs", "of floor", "better peer (×)"))]]
    for key in HEADLINE:
        here = [rows.get(key) for rows in found]
        shown = next((row for row in here if row), None)
        if shown is None:
            continue
        line = [shown["kind"], label(shown)]
        for row in here:
            if row is None:
                line += ["–"] * 3
                continue
            name = figures.better_peer(row)
            us = row["mlacore"]["us"]
            line += [_us(us), f"{share(row, us):.0%}", f"{name} {_versus(row, name)}" if name else "–"]
        lines.append(line)
    return lines


# ---- text ----------------------------------------------------------------------------------------------------------


def align(lines: Lines) -> str:
    """A table with aligned columns, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def markdown(lines: Lines, num_words: int = 2) -> str:
    """A table in Markdown; the first `num_words` columns are words, the others figures."""
    titles, *rows = lines
    rule = "|" + "---|" * num_words + "---:|" * (len(titles) - num_words)
    return "\n".join(["| " + " | ".join(titles) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def plain(result: Result) -> str:
    """Everything in one result, for a terminal."""
    parts = [full_lines(result)] + ([summary_lines(result)] if result["rows"] else [])
    parts += [lines] if (lines := energy_lines(result)) else []
    parts += [host_lines(result["host"])] if result.get("host") else []
    parts += [route_lines(result["routes"])] if result.get("routes") else []
    return "\n\n".join(map(align, parts))


def hardware_line(result: Result) -> str:
    """GPU, driver, date and ceilings in one sentence."""
    gpu, ceilings = result["gpu"], result["ceilings"]
    how = ceilings["gemm_label"]
    if rate := ceilings["gemm_tflops"]:
        notes = [how]
        if burst := ceilings.get("gemm_burst_tflops"):
            notes.append(f"in a burst {burst:.0f}")
        if clock := ceilings.get("gemm_sm_mhz"):
            notes.append(f"{clock:.0f} MHz")
        if watts := ceilings.get("gemm_watts"):
            notes.append(f"{watts:.0f} W")
        how = f"{rate:.0f} TFLOP/s ({', '.join(notes)})"
    commit = f", commit {result['commit']}" if result.get("commit") else ""
    return (
        f"**{gpu['name']}**, driver {gpu['driver']}, {result['when'][:10]}{commit}; in the same run: "
        f"read {ceilings['read_gbs']:.0f} GB/s, matrix product {how}."
    )


def lead_line(result: Result, name: str) -> str:
    """One sentence on where we stand against the peers, kind by kind."""
    kinds = {row["kind"] for row in result["rows"]}
    parts = [
        f"{one.group} {one.lead.mean:.2f} ({one.lead.worst:.2f})"
        for one in figures.summarise(result["rows"])
        if one.lead and one.group in kinds
    ]
    return f"Better peer's time over ours on {name}, geometric mean (worst): {', '.join(parts)}." if parts else ""


def headline(results: Sequence[Result]) -> list[str]:
    """The first screen: what it was measured on, a few rows, one sentence a GPU."""
    if not results:
        return []
    leads = [lead_line(result, name) for result, name in zip(results, _short_names(results), strict=True)]
    rows = markdown(headline_lines(results))
    return ["\\\n".join(map(hardware_line, results)), rows, *filter(None, leads)]


def full(result: Result, plot: Path | None, *, has_host: bool = True) -> list[str]:
    """All of one GPU: summary, host's part if asked for, and, folded, every case and the plot."""
    name = result["gpu"]["name"]
    parts = [hardware_line(result)]
    if result["rows"]:
        parts.append(markdown(summary_lines(result), num_words=1))
    if lines := energy_lines(result):
        rest, limit = (result["ceilings"].get(name) for name in ("rest_watts", "limit_watts"))
        parts += [
            f"Energy of a call, replayed without pause; power at rest {_whole(rest)} W, limit {_whole(limit)} W:",
            markdown(lines, num_words=1),
        ]
    if has_host and result.get("host"):
        parts += [
            f"Beside the kernel, µs, on the machine of the {name}:",
            markdown(host_lines(result["host"]), num_words=0),
        ]
    if has_host and result.get("routes"):
        parts += ["One call by each route, µs:", markdown(route_lines(result["routes"]), num_words=1)]
    parts += [f"<details><summary>Every case on {name}</summary>", markdown(full_lines(result))]
    if plot is not None:
        parts.append(f"![Share of floor on {name}, case by case]({plot.as_posix()})")
    return [*parts, "</details>"]


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
    text = _between(text, "headline", headline(results))
    drawn = {path.stem: path for path in plots}
    newest = max((one["when"] for one in results), default="")  # the host's times are of the newest code, or of none
    parts = [
        part for one in results for part in full(one, drawn.get(one["gpu"]["slug"]), has_host=one["when"] == newest)
    ]
    return _between(text, "full", parts)


def newest_results(folder: Path) -> list[Result]:
    """The newest result of each GPU in `folder`, sorted by GPU name; files of other make are passed over."""
    newest: dict[str, Result] = {}
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text())
        if not isinstance(result, dict) or result.get("schema") != figures.SCHEMA:
            continue
        name = result["gpu"]["name"]
        if name not in newest or result["when"] > newest[name]["when"]:
            newest[name] = result
    return [newest[name] for name in sorted(newest)]


def _between(text: str, name: str, parts: Sequence[str]) -> str:
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no markers {begin} ... {end} in the text")
    body = "\n\n".join(parts) or "Not measured yet: `make bench` on a Hopper GPU fills this table."
    return pattern.sub(lambda _: f"{begin}\n{body}\n{end}", text)


def _short_names(results: Sequence[Result]) -> list[str]:
    """One word a GPU, or the full names where two would share one."""
    names = [gpu_name(result) for result in results]
    return names if len(set(names)) == len(names) else [result["gpu"]["name"] for result in results]


def _key(row: Row) -> tuple[str, int, int, int, int]:
    return (row["kind"], row["batch"], row["seq_len_q"], row["num_heads"], row["seq_len_k"])


def _versus(row: Row, name: str) -> str:
    theirs = row["peers"][name]["us"]
    return f"{_us(theirs)} ({theirs / row['mlacore']['us']:.2f})"


def _invariant(row: Row) -> str:
    timing = row.get("batch_invariant")
    return f"{_us(timing['us'])} ({timing['us'] / row['mlacore']['us']:.2f})" if timing else "–"


def _us(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


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
