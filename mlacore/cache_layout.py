"""How a cache lies in memory, and what happens to rows on their way into it: the words that its parts share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mlacore import shapes
from mlacore.block_tables import TableChanges


@dataclass(frozen=True, slots=True, eq=False)
class CacheLayout:
    """Sizes of a pool, and where it is.

    Attributes
    ----------
    num_layers : int or None
        None for a pool of one layer without an axis for it.
    interleaved : bool
        Whether the layers of a page lie next to each other, instead of the pages of a layer.
    device : int or None
        CUDA ordinal; None for NumPy.
    """

    num_pages: int
    page_size: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    dtype: np.dtype
    num_layers: int | None
    interleaved: bool
    device: int | None

    @property
    def row(self) -> int:
        """Values of a token in one layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def pool_shape(self) -> tuple[int, ...]:
        """``[num_pages, page_size, 1, row]``, with the layers in front, or behind the pages if interleaved."""
        layers = () if self.num_layers is None else (self.num_layers,)
        outer = (self.num_pages, *layers) if self.interleaved else (*layers, self.num_pages)
        return (*outer, self.page_size, 1, self.row)

    def by_layer(self, pool: Any) -> Any:
        """A view of the pool, ``[num_layers, num_pages, page_size, 1, row]``."""
        if self.num_layers is None:
            return pool[None]
        return pool.swapaxes(0, 1) if self.interleaved else pool

    def dims(self) -> shapes.Dims:
        """Sizes for the checks of one call, with the widths of a row bound."""
        dims = shapes.Dims()
        dims.bind("kv_lora_rank", self.kv_lora_rank, "from the cache")
        dims.bind("qk_rope_head_dim", self.qk_rope_head_dim, "from the cache")
        return dims


@dataclass(frozen=True, slots=True)
class RowTransform:
    """What happens to rows on their way into the cache; see `PagedKVCache.write`.

    Attributes
    ----------
    norm_weight : array or None
        dtype of the cache ``[kv_lora_rank]``; None for no RMSNorm.
    norm_eps : float
        Added to the mean square.
    rope_cos, rope_sin : array or None
        float32 ``[positions, qk_rope_head_dim / 2]``; None for no RoPE.
    rope_interleaved : bool
        Pairs ``(2i, 2i + 1)``, else ``(i, i + qk_rope_head_dim / 2)``.
    """

    norm_weight: Any = None
    norm_eps: float = 1e-6
    rope_cos: Any = None
    rope_sin: Any = None
    rope_interleaved: bool = True


PLAIN = RowTransform()


@dataclass(frozen=True, slots=True, eq=False)
class NewTokens:
    """Where new tokens go; made by `PagedKVCache.create`, `extend`, `append` and `step_tokens`.

    They are to be written before any call that may move, share or give back their pages: `fork`, `truncate`, `free` and
    `compact`.

    Attributes
    ----------
    where : int64 ``[2, n]``, on the cache's device
        Slots and positions, the tokens of the first sequence, then those of the second, and so on.
    changes : TableChanges or None
        The change of the tables that made room for them; None where only the device knows it.
    """

    where: Any
    changes: TableChanges | None

    def __len__(self) -> int:
        return self.where.shape[1]

    @property
    def end(self) -> int:
        """One past the largest position, 0 where only the device knows it."""
        return 0 if self.changes is None else self.changes.end

    @property
    def slots(self) -> Any:
        """int64 ``[n]``: ``page * page_size + offset`` of each token; -1 for one that goes nowhere."""
        return self.where[0]

    @property
    def positions(self) -> Any:
        """int64 ``[n]``: place of each token in its sequence."""
        return self.where[1]


@dataclass(frozen=True, slots=True, eq=False)
class StepTokens(NewTokens):
    """Where the tokens of a step go that the device makes by itself: `num_tokens` for each of the first `num_seqs` rows
    of the block table."""

    num_seqs: int
    num_tokens: int


class Created(NamedTuple):
    """New sequences; from `PagedKVCache.create`.

    Attributes
    ----------
    seqs : numpy.ndarray
        int32 ``[num_seqs]``: their rows of the block table, the lowest free ones.
    num_cached : numpy.ndarray
        int64 ``[num_seqs]``: tokens that were found by `prefix` and need not be written.
    tokens : NewTokens
        Where the remaining tokens go, sequence by sequence.
    """

    seqs: np.ndarray
    num_cached: np.ndarray
    tokens: NewTokens
