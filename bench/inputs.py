"""Device inputs of the benches: one pool of random pages a dtype, which cases share through different tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cases import Case

from mlacore.arrays import as_dtype
from mlacore.params import HEAD_DIM_QK, HEAD_DIM_V, PAGE_SIZE, TILE_ROWS, TILE_TOKENS
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
        bfloat16 or float16 ``[pages, 64, 1, 576]``, shared by all cases of the dtype.
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
    def tiles(self) -> int:
        """Tiles of 64 query rows by 64 tokens that one call takes, rows and tokens padded to whole ones."""
        row_blocks = -(-self.case.num_heads * self.case.seq_len_q // TILE_ROWS)
        return row_blocks * int((-(-self.lengths.astype(np.int64) // TILE_TOKENS)).sum())

    @property
    def bytes(self) -> int:
        """Bytes that one call must move: every cached token once, q in, out back."""
        return int(self.lengths.sum()) * TOKEN_BYTES + self.q[0].nbytes + self.out[0].nbytes


class Stock:
    """Builds `Inputs`; allocates the pool of each dtype once, for the largest of `cases` that read it.

    Parameters
    ----------
    cases : sequence of Case
        What will be asked for.
    l2_bytes : int
        The device's L2; the sets of a case cover three times as much.
    xp : module
        ``cupy``, or ``numpy`` to look at the inputs without a GPU.
    seed : int
        Of data and page order.
    """

    def __init__(self, cases: Sequence[Case], *, l2_bytes: int, xp: Any, seed: int = 0) -> None:
        self._l2_bytes, self._xp, self._seed = l2_bytes, xp, seed
        pages: dict[str, int] = {}
        for case in cases:
            lengths = _lengths(case)
            needed = self._num_sets(lengths) * int(_num_pages(lengths).sum())
            pages[case.dtype] = max(pages.get(case.dtype, 0), needed)
        self._pools = {dtype: self._make_pool(dtype, count) for dtype, count in pages.items()}
        self._page_orders = {
            dtype: np.random.default_rng(seed).permutation(count).astype(np.int32) for dtype, count in pages.items()
        }

    def inputs(self, case: Case) -> Inputs:
        """The case's sets: pages shuffled over the pool, disjoint from set to set."""
        xp, dtype = self._xp, as_dtype(case.dtype)
        lengths = _lengths(case)
        used = _num_pages(lengths)
        tables, per_set = [], int(used.sum())
        for first in range(0, self._num_sets(lengths) * per_set, per_set):
            table = np.zeros((case.batch, int(used.max())), np.int32)
            table[_used_mask(used)] = self._page_orders[case.dtype][first : first + per_set]
            tables.append(xp.asarray(table))
        rows = (case.batch, case.seq_len_q, case.num_heads)
        q = normal((len(tables), *rows, HEAD_DIM_QK), seed=self._seed + 1, dtype=dtype, xp=xp)
        out = xp.zeros((len(tables), *rows, HEAD_DIM_V), dtype)
        lse = xp.zeros((len(tables), case.batch, case.num_heads, case.seq_len_q), xp.float32)
        entries = xp.asarray(np.flatnonzero(_used_mask(used)).astype(np.int32))
        pool = self._pools[case.dtype]
        return Inputs(case, lengths, xp.asarray(lengths), pool, list(q), tables, list(out), list(lse), entries)

    def _make_pool(self, dtype: str, pages: int) -> Any:
        pool = self._xp.empty((pages, PAGE_SIZE, 1, HEAD_DIM_QK), as_dtype(dtype))
        for first in range(0, pages, FILL_PAGES):
            part = pool[first : first + FILL_PAGES]
            part[...] = normal(part.shape, seed=self._seed + first, dtype=pool.dtype, xp=self._xp)
        return pool

    def _num_sets(self, lengths: np.ndarray) -> int:
        return -(-3 * self._l2_bytes // int(_num_pages(lengths).sum() * PAGE_BYTES))


def _lengths(case: Case) -> np.ndarray:
    return np.array(case.draw_lengths(), np.int32)


def _num_pages(lengths: np.ndarray) -> np.ndarray:
    return -(-lengths.astype(np.int64) // PAGE_SIZE)


def _used_mask(used: np.ndarray) -> np.ndarray:
    return np.arange(used.max()) < used[:, None]
