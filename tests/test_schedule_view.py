"""A plan's schedule as text and as a picture: every tile is shown once, and the figures are those of the schedule."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlacore import plan_decode
from mlacore.params import ITEM_COST_TILES, TILE_TOKENS

ITEM = re.compile(r"seq (\d+) \((?:tiles (\d+)-(\d+)|no tile)(?:, split (\d+) of (\d+))?\)")


def rows_of(text: str) -> list[tuple[int, int, list[tuple[str, ...]]]]:
    """(worker, load, items) of every line."""
    _, _, table = text.partition("worker  load  items\n")
    rows = []
    for line in table.splitlines():
        worker, load, items = line.split(maxsplit=2)
        rows.append((int(worker), int(load), ITEM.findall(items)))
    return rows


def test_worked_example() -> None:
    """The schedule that test_plan.py derives by hand: tiles 3, 0, 5 on two workers, packed."""
    plan = plan_decode(np.array([150, 0, 300], np.int32), num_heads=128, seq_len_q=2, causal=True, num_workers=2)
    assert plan.describe().splitlines() == [
        "plan on NumPy: 3 sequences, 2 query tokens, 128 heads, 1 KV head, causal; 2 workers, "
        "1 worker is a task of a thread",
        "lengths: 450 tokens, 0 to 300 a sequence; 8 tiles of 64 tokens",
        "splits: no sequence is split",
        "balance: 86% (mean load 6.0 tiles, largest 7 in worker 0; a worker's every further item counts 4 tiles); "
        "0 of 2 workers have nothing to do",
        "worker  load  items",
        "     0     7  seq 0 (tiles 0-2), seq 1 (no tile)",
        "     1     5  seq 2 (tiles 0-4)",
    ]


@given(st.lists(st.integers(-5, 20_000), min_size=1, max_size=40), st.integers(1, 70))
def test_every_tile_once_and_loads_add_up(lengths: list[int], num_workers: int) -> None:
    rows = rows_of(plan_decode(np.array(lengths, np.int32), num_heads=16, num_workers=num_workers).describe())
    assert [worker for worker, _, _ in rows] == list(range(num_workers))
    tiles: list[list[int]] = [[] for _ in lengths]
    shares: list[list[tuple[str, str]]] = [[] for _ in lengths]
    for _, load, items in rows:
        walked = 0
        for sequence, first, last, split, num_splits in items:
            span = range(int(first), int(last) + 1) if first else range(0)
            tiles[int(sequence)].extend(span)
            shares[int(sequence)].append((split, num_splits))
            walked += len(span)
        assert load == walked + ITEM_COST_TILES * max(len(items) - 1, 0)
    for length, seen, splits in zip(lengths, tiles, shares, strict=True):
        assert seen == list(range(-(-max(length, 0) // TILE_TOKENS)))
        count = len(splits)
        assert splits == ([("", "")] if count == 1 else [(str(i + 1), str(count)) for i in range(count)])


def test_splits_are_summed_up() -> None:
    text = plan_decode(np.array([64, 6400, 128], np.int32), num_heads=16, num_workers=6).describe()
    assert "splits: 1 of 3 sequences are split, into at most 6 parts" in text


def test_workers_without_work_are_counted() -> None:
    text = plan_decode(np.array([64], np.int32), num_heads=16, num_workers=4).describe()
    assert "balance: 25% (mean load 0.2 tiles, largest 1 in worker 0" in text
    assert "3 of 4 workers have nothing to do" in text
    assert text.splitlines()[-1] == "     3     0  -"
    assert "balance: 100%" in plan_decode(np.array([0], np.int32), num_heads=16, num_workers=2).describe()


def test_it_shows_the_lengths_as_they_are_now() -> None:
    lengths = np.array([6400, 640], np.int32)
    plan = plan_decode(lengths, num_heads=16, num_workers=2)
    balanced = plan.describe()
    lengths[:] = 64, 6400
    moved_on = plan.describe()
    assert "6,464 tokens" in moved_on
    assert balanced != moved_on
    plan.update(lengths)
    assert rows_of(plan.describe()) != rows_of(moved_on)
    other = np.array([128, 128], np.int32)
    plan.update(other)
    assert "256 tokens" in plan.describe()


def test_plan_on_numpy_has_no_stream() -> None:
    plan = plan_decode(np.array([64], np.int32), num_heads=16)
    for call in (lambda: plan.describe(stream=0), lambda: plan.plot("plan.png", stream=0)):
        with pytest.raises(TypeError, match=r"^stream: got int, expected None"):
            call()


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.parametrize("lengths", [[0], [3000, 0, 5, 70_000], [500] * 600])
def test_plot(tmp_path: Path, lengths: list[int], ending: str) -> None:
    pytest.importorskip("matplotlib", reason="needs the bench extra")
    path = tmp_path / f"plan.{ending}"
    plan_decode(np.array(lengths, np.int32), num_heads=16, num_workers=12).plot(path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert len(content) > 5000


def test_plot_has_a_piece_for_every_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = pytest.importorskip("matplotlib.axes", reason="needs the bench extra")
    pieces: list[tuple] = []
    barh = axes.Axes.barh

    def note(self: Any, y: Any, width: Any, height: Any, left: Any, **options: Any) -> Any:
        pieces.append((y, left, width))
        return barh(self, y, width, height, left, **options)

    monkeypatch.setattr(axes.Axes, "barh", note)
    plan_decode(np.array([150, 0, 300], np.int32), num_heads=16, num_workers=2).plot(tmp_path / "plan.png")
    assert pieces == [(0, 0, 3), (0, 3 + ITEM_COST_TILES, 0), (1, 0, 5)]


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # type: ignore[arg-type]
    plan = plan_decode(np.array([64], np.int32), num_heads=16)
    with pytest.raises(ImportError, match=r"^a plan's plot needs matplotlib, .*: pip install matplotlib$"):
        plan.plot(tmp_path / "plan.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same_schedule(tmp_path: Path) -> None:
    import cupy

    lengths = np.array([150, 0, 30_000, 7], np.int32)
    plan = plan_decode(cupy.asarray(lengths), num_heads=128, num_workers=9)
    text, expected = plan.describe(), plan_decode(lengths, num_heads=128, num_workers=9).describe()
    assert text.splitlines()[1:] == expected.splitlines()[1:]
    assert text.startswith("plan on cuda:0: 4 sequences, 1 query token, 128 heads, 1 KV head; 9 workers, 1 worker is 2")
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    assert plan.describe(stream=stream) == text
