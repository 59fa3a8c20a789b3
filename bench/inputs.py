"""Device inputs of the benches: one pool of random pages that every case shares, read through different tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cases import Case

from mlacore.arrays import bfloat16
from mlacore.params import HEAD_DIM_QK, HEAD_DIM_V, PAGE_SIZE
from mlacore.synthetic import normal

PAGE_BYTES = PAGE_SIZE * HEAD_DIM_QK * 2
TOKEN_BYTES = HEAD_DIM_QK * 2
FILL_PAGES = 2048  # pages drawn at a time, 151 MB


@dataclass(frozen=True, slots=True)
class Inputs:
    """One case on the device, with enough sets of q and pages that a set has left the L2 when its turn comes again.

    Attributes
    ----------
    case : Case
        The shape.
    lengths : numpy.ndarray
        int32 ``[b]``, on the host; the same for every set.
    cache_seqlens : cupy.ndarray
        int32 ``[b]``, `lengths` on the device.
    pool : cupy.ndarray
        bfloat16 ``[pages, 64, 1, 576]``, shared by all cases.
    q, block_table, out, lse : list of cupy.ndarray
        One of each a set.
    entries : cupy.ndarray
        int32: the used entries of a flattened block table.
    """

    case: Case
    lengths: np.ndarray
    cache_seqlens: Any
    pool: Any
    q: list[Any]
    block_table: list[Any]
    out: list[Any]
    lse: list[Any]
    entries: Any

    @property
    def softmax_scale(self) -> float:
        """The default scale."""
        return HEAD_DIM_QK**-0.5

    @property
    def flops(self) -> float:
        """FLOP of one call, causal masking not deducted: 2·b·h_q·s_q·mean length·(576 + 512)."""
        rows = self.case.num_heads * self.case.seq_len_q
        return 2.0 * rows * float(self.lengths.sum()) * (HEAD_DIM_QK + HEAD_DIM_V)

    @property
    def bytes(self) -> int:
        """Bytes that one call must move: every cached token once, q in, out back."""
        return int(self.lengths.sum()) * TOKEN_BYTES + self.q[0].nbytes + self.out[0].nbytes


class Stock:
    """Builds `Inputs`; allocates the shared pool for the largest of `cases` once.

    Parameters
    ----------
    cases : sequence of Case
        What will be asked for.
    l2_bytes : int
        The device's L2; the sets of a case cover three times as much.
    seed : int
        Of data and page order.
    """

    def __init__(self, cases: Sequence[Case], *, l2_bytes: int, seed: int = 0) -> None:
        import cupy

        self._l2_bytes = l2_bytes
        pages = max(self._num_sets(lengths) * int(_num_pages(lengths).sum()) for lengths in map(_lengths, cases))
        self._pool = cupy.empty((pages, PAGE_SIZE, 1, HEAD_DIM_QK), bfloat16)
        for first in range(0, pages, FILL_PAGES):
            part = self._pool[first : first + FILL_PAGES]
            part[...] = normal(part.shape, seed=seed + first, dtype=bfloat16, xp=cupy)
        self._page_order = np.random.default_rng(seed).permutation(pages).astype(np.int32)
        self._seed = seed

    def inputs(self, case: Case) -> Inputs:
        """The case's sets: pages shuffled over the pool, disjoint from set to set."""
        import cupy

        lengths = _lengths(case)
        used = _num_pages(lengths)
        tables, per_set = [], int(used.sum())
        for first in range(0, self._num_sets(lengths) * per_set, per_set):
            table = np.zeros((case.batch, int(used.max())), np.int32)
            table[_used_mask(used)] = self._page_order[first : first + per_set]
            tables.append(cupy.asarray(table))
        rows = (case.batch, case.seq_len_q, case.num_heads)
        q = normal((len(tables), *rows, HEAD_DIM_QK), seed=self._seed + 1, dtype=bfloat16, xp=cupy)
        out = cupy.zeros((len(tables), *rows, HEAD_DIM_V), bfloat16)
        lse = cupy.zeros((len(tables), case.batch, case.num_heads, case.seq_len_q), cupy.float32)
        entries = cupy.asarray(np.flatnonzero(_used_mask(used)).astype(np.int32))
        return Inputs(case, lengths, cupy.asarray(lengths), self._pool, list(q), tables, list(out), list(lse), entries)

    def _num_sets(self, lengths: np.ndarray) -> int:
        return -(-3 * self._l2_bytes // int(_num_pages(lengths).sum() * PAGE_BYTES))


def _lengths(case: Case) -> np.ndarray:
    return np.array(case.draw_lengths(), np.int32)


def _num_pages(lengths: np.ndarray) -> np.ndarray:
    return -(-lengths.astype(np.int64) // PAGE_SIZE)


def _used_mask(used: np.ndarray) -> np.ndarray:
    return np.arange(used.max()) < used[:, None]
