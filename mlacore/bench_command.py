"""``mlacore bench``: the repository's bench, where this package runs from a checkout."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HOW_TO_GET_IT = (
    "The bench is part of mlacore's repository, and {package} is no checkout of it: clone the repository and run "
    "`make bench` there, or `python -m mlacore bench` from its root. `python -m mlacore check` measures the share of "
    "floor of two batches without it."
)


def run(*, only: Sequence[str], quick: bool, peers: bool, json_path: Path | None, plot_path: Path | None) -> int:
    """Run `bench.decode` and, if asked, draw its result.

    Parameters
    ----------
    only : sequence of str
        Parts of the ids of the cases to measure; all if empty.
    quick, peers : bool
        Fewer replays; whether peers take part.
    json_path, plot_path : Path or None
        Files to write; without the first a complete run goes to ``bench/results``.

    Returns
    -------
    int
        Exit status: that of the bench; 1 if the plot cannot be drawn, 2 without a bench or a GPU.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "decode.py").is_file():
        print(HOW_TO_GET_IT.format(package=root / "mlacore"), file=sys.stderr)
        return 2
    if plot_path is not None and importlib.util.find_spec("matplotlib") is None:
        print("--plot needs matplotlib: pip install matplotlib", file=sys.stderr)  # before minutes of measuring
        return 1
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    decode, plot = importlib.import_module("bench.decode"), importlib.import_module("bench.plot")
    options = [part for text in only for part in ("--only", text)]
    options += ["--quick"] * quick + ["--no-peers"] * (not peers)
    with tempfile.TemporaryDirectory() as folder:
        if json_path is None and plot_path is not None and (only or quick):
            json_path = Path(folder) / "result.json"
        if json_path is not None:
            options += ["--output", str(json_path)]
        before = _results(root)
        status = decode.main(options)
        written = json_path if json_path is not None else next(iter(_results(root) - before), None)
        if plot_path is not None and written is not None and written.is_file():
            result = json.loads(written.read_text())
            if result["rows"]:
                plot.draw(result, plot_path)
                print(f"wrote {plot_path}")
    return status


def _results(root: Path) -> set[Path]:
    return set((root / "bench" / "results").glob("*.json"))
