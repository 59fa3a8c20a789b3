"""Decode cases with readable ids, and inputs for them with poison wherever a kernel has no business reading.

Tests and benches share these lists. The grid is FlashMLA's dense one; PERF holds the shapes that peers are measured on.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mlacore.arrays import as_dtype

PAGE_SIZE = 64
HEAD_DIM = 576
HEAD_DIM_V = 512
POISON_PAGE = 2147480000  # far outside any pool, and near enough to INT32_MAX to overflow when multiplied
SPARE_COLUMNS = 2  # of the block table, past the longest sequence
SPARE_PAGES = 3  # of the pool, never used


@dataclass(frozen=True, slots=True)
class Case:
    """One decode call. `lengths` fixes the sequences; otherwise `varlen`, `shortest`, `zero_fraction` and `seed` draw
    them."""

    batch: int
    seq_len_q: int
    seq_len_k: int
    num_heads: int
    num_kv_heads: int = 1
    varlen: bool = False
    causal: bool = False
    dtype: str = "bfloat16"
    zero_fraction: float = 0.0
    seed: int = 0
    lengths: tuple[int, ...] | None = None
    num_workers: int | None = None
    kind: str = ""
    shortest: int | None = None

    @property
    def id(self) -> str:
        parts = [
            f"b{self.batch}-sq{self.seq_len_q}-sk{self.seq_len_k}-hq{self.num_heads}-hkv{self.num_kv_heads}",
            "var" if self.varlen else "",
            f"from{self.shortest}" if self.shortest else "",
            "causal" if self.causal else "",
            f"zero{self.zero_fraction:g}" if self.zero_fraction else "",
            "x".join(map(str, self.lengths)) if self.lengths else "",
            f"w{self.num_workers}" if self.num_workers else "",
            f"seed{self.seed}" if self.seed else "",
            {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[self.dtype],
        ]
        return "-".join(filter(None, [self.kind, *parts]))

    def draw_lengths(self) -> list[int]:
        """Tokens of each sequence, by Python's own generator: normal(s_k, s_k / 2) of at least s_q if `varlen`;
        log-uniform from `shortest` to s_k if that is given."""
        if self.lengths is not None:
            return list(self.lengths)
        rng = random.Random(self.seed)
        lengths = [self.seq_len_k] * self.batch
        if self.varlen:
            lengths = [max(int(rng.normalvariate(self.seq_len_k, self.seq_len_k / 2)), self.seq_len_q) for _ in lengths]
        if self.shortest:
            low, high = math.log(self.shortest), math.log(self.seq_len_k)
            lengths = [round(math.exp(rng.uniform(low, high))) for _ in lengths]
        zero = random.Random(self.seed + 1)
        return [0 if zero.random() < self.zero_fraction else length for length in lengths]

    @property
    def flops(self) -> int:
        """Multiply-adds count two; no discount for the causal mask."""
        return 2 * sum(self.draw_lengths()) * self.num_heads * self.seq_len_q * (HEAD_DIM + HEAD_DIM_V)

    @property
    def kv_bytes(self) -> int:
        """Cache rows read once."""
        return sum(self.draw_lengths()) * self.num_kv_heads * HEAD_DIM * as_dtype(self.dtype).itemsize


class Inputs(NamedTuple):
    q: Any
    kv_cache: Any
    block_table: Any
    cache_seqlens: Any


def make_inputs(case: Case, xp: Any = np) -> Inputs:
    """Arrays of a case: values randn/10 clamped to ±1, pages shuffled, the rest poisoned.

    Unused slots and pages hold NaN, block-table entries past a sequence's pages `POISON_PAGE`. NumPy arrays come
    read-only: neighbouring cases share one pool. `xp` may be ``cupy``.
    """
    pool, table, lengths = _pool(tuple(case.draw_lengths()), case.num_kv_heads, case.dtype, case.seed, xp)
    rng = np.random.default_rng([case.seed, 1])
    shape = (case.batch, case.seq_len_q, case.num_heads, HEAD_DIM)
    q = _rows(rng, math.prod(shape[:-1]), case.dtype).reshape(shape)
    return Inputs(on_module(xp, q), pool, table, lengths)


@functools.lru_cache(maxsize=1)
def _pool(lengths: tuple[int, ...], num_kv_heads: int, dtype: str, seed: int, xp: Any) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng([seed, 0])
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    num_pages = sum(counts) + SPARE_PAGES
    pages = rng.permutation(num_pages).astype(np.int32)
    table = np.full((len(lengths), max(counts) + SPARE_COLUMNS), POISON_PAGE, np.int32)
    pool = np.empty((num_pages, PAGE_SIZE, num_kv_heads, HEAD_DIM), as_dtype(dtype))
    taken = 0
    for row, length, count in zip(table, lengths, counts, strict=True):
        row[:count] = pages[taken : taken + count]
        taken += count
        tokens = _rows(rng, count * PAGE_SIZE * num_kv_heads, dtype).reshape(count, *pool.shape[1:])
        tokens.reshape(-1, *pool.shape[2:])[length:] = np.nan
        pool[row[:count]] = tokens
    pool[pages[taken:]] = np.nan
    return on_module(xp, pool), on_module(xp, table), on_module(xp, np.array(lengths, np.int32))


def _rows(rng: np.random.Generator, count: int, dtype: str) -> np.ndarray:
    """`count` rows of 576 values: windows at random places of one noise strip, a hundred times faster than drawing."""
    strip = _noise(dtype)
    return np.lib.stride_tricks.sliding_window_view(strip, HEAD_DIM)[rng.integers(0, len(strip) - HEAD_DIM, count)]


@functools.cache
def _noise(dtype: str) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(1 << 21, dtype=np.float32) / 10
    return np.clip(values, -1, 1).astype(as_dtype(dtype))


def on_module(xp: Any, array: np.ndarray) -> Any:
    """`array` as an array of `xp`, read-only in NumPy."""
    if xp is np:
        array.setflags(write=False)
        return array
    bits = array.view(np.uint16) if array.dtype.itemsize == 2 else array
    return xp.asarray(bits).view(array.dtype)


def interleave(kv_cache: np.ndarray, num_layers: int = 3, layer: int = 1) -> np.ndarray:
    """The same pool as one layer of a cache that interleaves layers: a view with a larger page stride, in NaN."""
    num_pages, *page = kv_cache.shape
    layers = np.full((num_pages, num_layers, *page), np.nan, kv_cache.dtype)
    layers[:, layer] = kv_cache
    return layers[:, layer]


def permute_pages(inputs: Inputs, seed: int = 0) -> Inputs:
    """The same sequences in other pages."""
    order = np.random.default_rng(seed).permutation(len(inputs.kv_cache)).astype(np.int32)
    kv_cache = np.empty_like(inputs.kv_cache)
    kv_cache[order] = inputs.kv_cache
    is_page = inputs.block_table != POISON_PAGE
    table = np.where(is_page, order[np.where(is_page, inputs.block_table, 0)], POISON_PAGE).astype(np.int32)
    return inputs._replace(kv_cache=kv_cache, block_table=table)


def repaged(inputs: Inputs, page_size: int, seed: int = 0) -> Inputs:
    """The same sequences in pages of another size, poisoned alike."""
    _, old_size, *row = inputs.kv_cache.shape
    lengths = inputs.cache_seqlens.tolist()
    counts = [-(-length // page_size) for length in lengths]
    pages = np.random.default_rng(seed).permutation(sum(counts) + SPARE_PAGES).astype(np.int32)
    pool = np.full((len(pages), page_size, *row), np.nan, inputs.kv_cache.dtype)
    table = np.full((len(counts), max(counts) + SPARE_COLUMNS), POISON_PAGE, np.int32)
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[b, :count], pages = pages[:count], pages[count:]
        tokens = inputs.kv_cache[inputs.block_table[b, : -(-length // old_size)]].reshape(-1, *row)[:length]
        padded = np.full((count * page_size, *row), np.nan, pool.dtype)
        padded[:length] = tokens
        pool[table[b, :count]] = padded.reshape(count, page_size, *row)
    return inputs._replace(kv_cache=pool, block_table=table)


def thin(cases: list[Case], limit: float) -> list[Case]:
    """All cases up to `limit` of cost, and of dearer ones the share that costs `limit` each on average, fixed by id."""
    return [case for case in cases if zlib.crc32(case.id.encode()) % math.ceil(cost(case) / limit) == 0]


def cost(case: Case) -> float:
    """Rough seconds of a NumPy test on one core: inputs and oracle, backend, comparison."""
    num_out = case.batch * case.seq_len_q * case.num_heads * HEAD_DIM_V
    calls = case.batch * case.num_kv_heads * (case.seq_len_q + 1)
    return 1e-3 + case.kv_bytes * 4e-9 + case.flops * 4e-11 + num_out * 3e-8 + calls * 1e-4


TINY = [
    Case(1, 1, 1, 1),
    Case(1, 1, 64, 16),
    Case(2, 1, 100, 16, varlen=True),
    Case(2, 2, 130, 16, causal=True),
    Case(3, 4, 70, 8, num_kv_heads=2, varlen=True, causal=True),
    Case(1, 1, 300, 128),
    Case(3, 1, 200, 16, lengths=(200, 0, 65)),
]

GRID = [
    Case(b, s_q, s_k, h_q, h_kv, varlen, causal)
    for b, s_q, s_k, h_kv, varlen, h_q, causal in itertools.product(
        [1, 2, 6, 64],
        [1, 2, 4],
        [20, 140, 4096],
        [1, 2, 3, 8],
        [False, True],
        [1, 3, 9, 63, 64, 126, 128],
        [False, True],
    )
    if h_q % h_kv == 0
]


def _corner(*lengths: int, s_q: int = 1, h_q: int = 16, h_kv: int = 1, causal: bool = False, **rest: Any) -> Case:
    return Case(len(lengths), s_q, max(lengths), h_q, h_kv, causal=causal, lengths=lengths, **rest)


CORNERS = [
    _corner(0),
    _corner(0, 0, 0, s_q=2, causal=True),
    _corner(1),
    _corner(63, 64, 65),
    _corner(127, 128, 129, h_q=128),
    _corner(0, 700, 0, 0, 64, 1, 0),
    # workers that come to a sequence with tiles after one without
    _corner(0, 700, 0, 0, 64, 1, 0, num_workers=1),
    _corner(0, 700, 0, 0, 64, 1, 0, h_q=128, num_workers=2),
    _corner(0, 0, 4000, 0, 3000, h_q=32, num_workers=2),
    _corner(1, 700, 64, 0, 129, s_q=2, h_q=64, causal=True),
    _corner(1, 2, 3, 4, 5, s_q=4, causal=True),  # the first queries of the short ones see nothing
    _corner(64, 65, 66, 67, s_q=4, h_q=33, causal=True),  # the mask empties or enters a last tile
    _corner(100, 0, 300, h_q=6, h_kv=3, s_q=3, causal=True),
    _corner(65, num_workers=7),
    _corner(3, 200, 0, s_q=2, causal=True, num_workers=64),
    _corner(1000, num_workers=16),
    _corner(66, s_q=4, causal=True, num_workers=2),  # a split of two tokens that the mask hides from two queries
    _corner(2000, 10, 10, 10, 10, 10, 10, num_workers=5),
    _corner(5, 130, s_q=70, causal=True),  # more queries than tokens
    *(
        Case(128, 2, 4096, h_q, varlen=varlen, causal=causal, zero_fraction=0.5)
        for h_q, varlen, causal in itertools.product([16, 128], [False, True], [False, True])
    ),
]

# The published shapes, by kind: large batch (`compute`), fewer heads as tensor parallelism leaves them (`tp`, `few`),
# small batch (`latency`), one very long sequence (`long`), several query tokens (`mtp`).
PERF_LISTED = [
    *(
        Case(128, s_q, s_k, 128, varlen=True, causal=s_q > 1, kind="compute")
        for s_q, s_k in itertools.product([1, 2], [4096, 16384, 32768])
    ),
    *(Case(128, 1, s_k, h_q, varlen=True, kind="tp") for h_q, s_k in itertools.product([64, 16], [4096, 16384])),
    *(
        Case(128, 1, s_k, h_q, varlen=True, kind="few")
        for h_q, s_k in itertools.product([8, 12, 16, 24, 32], [4096, 16384])
    ),
    *(
        Case(b, 1, s_k, h_q, kind="latency")
        for h_q in [128, 16]
        for b, s_k in [(1, 1024), (1, 4096), (1, 32768), (1, 131072), (4, 4096), (16, 1024)]
    ),
    *(Case(1, 1, 1 << 20, h_q, kind="long") for h_q in [128, 16]),
    *(Case(b, s_q, 8192, 16, causal=True, kind="mtp") for b, s_q in itertools.product([32, 128], [2, 3, 4])),
]

# Shapes beside the listed ones: a kernel tuned to those alone would fall off a cliff here.
PERF_SWEEP = [
    *(Case(b, 1, s_k, 128, varlen=True, kind="sweep") for b, s_k in [(48, 4096), (96, 16384), (200, 4096)]),
    *(Case(128, 1, s_k, h_q, varlen=True, kind="sweep") for h_q, s_k in [(96, 4096), (112, 16384), (126, 4096)]),
    *(Case(b, 3, 8192, h_q, varlen=True, causal=True, kind="sweep") for b, h_q in [(48, 128), (96, 64)]),
    *(
        Case(b, s_q, 100_000, h_q, causal=s_q > 1, shortest=100, kind="sweep")
        for b, s_q, h_q in [(96, 1, 128), (48, 1, 64), (200, 2, 112), (200, 1, 16)]
    ),
    *(
        Case(b, 1, s_k, h_q, varlen=True, dtype="float16", kind="sweep")
        for b, s_k, h_q in [(128, 16384, 128), (96, 4096, 64), (128, 4096, 16)]
    ),
]

PERF = [*PERF_LISTED, *PERF_SWEEP]
