"""Share of floor per case, ours beside the peers': ``python -m bench.plot`` draws one PNG for each GPU measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.figures import Result, Row, label, peer_names, share
from bench.table import RESULTS, newest_results

# Colour-blind safe, ours darkest.
COLOURS = {"mlacore": "#1b4f8a", "FlashMLA": "#d98c3f", "FA3": "#9aa5b1"}
BAR_HEIGHT = 0.26


def draw(result: Result, path: Path) -> None:
    """Write the plot of one result to `path`: a panel a kind, a group of bars a case.

    Parameters
    ----------
    result : dict
        What `bench.decode` writes.
    path : Path
        PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = ["mlacore", *peer_names(result["rows"])]
    kinds = list(dict.fromkeys(row["kind"] for row in result["rows"]))
    groups = [[row for row in result["rows"] if row["kind"] == kind] for kind in kinds]
    heights = [len(rows) + 0.8 for rows in groups]
    figure = Figure(figsize=(8.5, 1.2 + 0.36 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, kind, rows in zip(panels, kinds, groups, strict=True):
        for place, name in enumerate(names):
            times = [(y, row, _time(row, name)) for y, row in enumerate(rows)]
            drawn = [(y + (place - (len(names) - 1) / 2) * BAR_HEIGHT, share(row, us)) for y, row, us in times if us]
            bars = panel.barh(
                [y for y, _ in drawn],
                [100 * value for _, value in drawn],
                BAR_HEIGHT,
                color=COLOURS.get(name, "#777777"),
                label=name,
            )
            if name == "mlacore":
                panel.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
        panel.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.set_ylabel(kind, fontsize=9)
        panel.axvline(100, color="black", linewidth=0.8)
        panel.grid(axis="x", linewidth=0.4, alpha=0.6)
        panel.set_axisbelow(True)
    best = max(share(row, us) for row in result["rows"] for name in names if (us := _time(row, name)))
    panels[-1].set_xlim(0, 100 * max(1.0, best) + 8)
    panels[-1].set_xlabel("share of floor, % (100 = load-only kernel or matrix rate, whichever is slower)", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(names), frameon=False, fontsize=9)
    figure.suptitle(f"{result['gpu']['name']}, {result['when'][:10]}", x=0.01, ha="left", fontsize=10)
    FigureCanvasAgg(figure).print_png(str(path))


def _time(row: Row, name: str) -> float | None:
    entry = row["mlacore"] if name == "mlacore" else row["peers"].get(name)
    return entry["us"] if entry else None


def main(argv: Sequence[str] | None = None) -> int:
    """Draw every GPU's newest result."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files (default: bench/results)")
    arguments = parser.parse_args(argv)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return 0
    for result in newest_results(arguments.results):
        path = arguments.results / f"{result['gpu']['slug']}.png"
        draw(result, path)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
