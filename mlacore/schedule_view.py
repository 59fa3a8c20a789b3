"""A split schedule for people: as text, and as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlacore.params import ITEM_COST_TILES, TILE_TOKENS

MAX_LABELS = 400  # items with their sequence's number in the picture; more could not be read
MIN_LABEL_SHARE = 0.02  # of the picture's width that an item needs for it


class Item(NamedTuple):
    """Tiles ``[begin, end)`` of one sequence: split `split` of `num_splits`, from 0."""

    sequence: int
    begin: int
    end: int
    split: int
    num_splits: int

    def __str__(self) -> str:
        tiles = f"tiles {self.begin}-{self.end - 1}" if self.end > self.begin else "no tile"
        share = f", split {self.split + 1} of {self.num_splits}" if self.num_splits > 1 else ""
        return f"seq {self.sequence} ({tiles}{share})"


@dataclass(frozen=True, slots=True)
class ScheduleView:
    """A schedule with the lengths that it meets.

    Attributes
    ----------
    heading : str
        What the plan is for, and what one worker is.
    lengths : int array ``[batch]``
        Tokens of each sequence.
    workers : list of list of Item
        What each worker does, in order.
    """

    heading: str
    lengths: npt.NDArray[np.integer]
    workers: list[list[Item]]

    @classmethod
    def of(
        cls,
        heading: str,
        lengths: npt.NDArray[np.integer],
        splits: npt.NDArray[np.int32],
        workers: Sequence[Sequence[tuple[int, int, int | None]]],
    ) -> ScheduleView:
        """From (sequence, first tile, end tile or None for the sequence's own) of each worker's items."""
        tiles = (-(-np.maximum(lengths.astype(np.int64), 0) // TILE_TOKENS)).tolist()

        def item(worker: int, sequence: int, begin: int, end: int | None) -> Item:
            last = tiles[sequence]  # a sequence that was longer when it was planned may have lost all of an item
            first_worker, num_splits = splits[sequence].tolist()
            end = last if end is None else min(end, last)
            return Item(sequence, min(begin, end), end, worker - first_worker, num_splits)

        return cls(heading, lengths, [[item(w, *one) for one in items] for w, items in enumerate(workers)])

    def loads(self) -> list[int]:
        """Of each worker in tiles: those it walks, and what its further items cost."""
        return [
            sum(item.end - item.begin for item in items) + ITEM_COST_TILES * max(len(items) - 1, 0)
            for items in self.workers
        ]

    def balance(self) -> float:
        """Mean load over the largest one: 1 if all workers finish together."""
        loads = self.loads()
        return sum(loads) / len(loads) / max(loads) if max(loads) else 1.0

    def describe(self) -> str:
        """The schedule as text: totals, then a line a worker."""
        loads = self.loads()
        tiles = sum(item.end - item.begin for items in self.workers for item in items)
        num_splits = {item.sequence: item.num_splits for items in self.workers for item in items}
        num_shared = sum(count > 1 for count in num_splits.values())
        tokens = np.maximum(self.lengths.astype(np.int64), 0)
        lines = [
            self.heading,
            f"lengths: {tokens.sum():,} tokens, {tokens.min():,} to {tokens.max():,} a sequence; "
            f"{tiles:,} tiles of {TILE_TOKENS} tokens",
            f"splits: {num_shared} of {len(self.lengths)} sequences are split, into at most {most} parts"
            if (most := max(num_splits.values())) > 1
            else "splits: no sequence is split",
            f"balance: {self.balance():.0%} (mean load {sum(loads) / len(loads):.1f} tiles, largest {max(loads)} in "
            f"worker {loads.index(max(loads))}; a worker's every further item counts {ITEM_COST_TILES} tiles); "
            f"{sum(not items for items in self.workers)} of {len(loads)} workers have nothing to do",
            "worker  load  items",
        ]
        for worker, (load, items) in enumerate(zip(loads, self.workers, strict=True)):
            lines.append(f"{worker:6}  {load:4}  {', '.join(map(str, items)) or '-'}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw it to a file: a bar a worker, a piece an item, coloured by sequence."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                f"a plan's plot needs matplotlib, which cannot be imported ({error}): pip install matplotlib"
            ) from error
        from matplotlib import colormaps

        colours = colormaps["tab20"]
        loads = self.loads()
        width = max(*loads, 1)
        figure = Figure(figsize=(10, min(max(2.5, 1.4 + 0.16 * len(loads)), 40)), layout="constrained")
        axes = figure.subplots()
        num_items = sum(map(len, self.workers))
        for worker, items in enumerate(self.workers):
            left = 0
            for item in items:
                tiles = item.end - item.begin
                colour = colours(item.sequence % colours.N)
                axes.barh(worker, tiles, 0.84, left, color=colour, edgecolor="white", linewidth=0.4)
                if num_items <= MAX_LABELS and tiles >= MIN_LABEL_SHARE * width:
                    axes.text(left + tiles / 2, worker, str(item.sequence), ha="center", va="center", fontsize=6)
                left += tiles + ITEM_COST_TILES
        axes.axvline(sum(loads) / len(loads), color="black", linewidth=0.8, linestyle="--", label="mean load")
        axes.set_xlim(0, 1.02 * width)
        axes.set_ylim(len(loads) - 0.4, -0.6)
        axes.set_xlabel(f"tiles of {TILE_TOKENS} tokens; gaps: what a further item costs")
        axes.set_ylabel("worker")
        axes.set_title(f"{self.heading}\nbalance {self.balance():.0%}", fontsize=8, loc="left")
        figure.legend(loc="outside upper right", frameon=False, fontsize=8)
        figure.savefig(path)
