"""Constants shared by the planner, both backends and the kernels, and the structs of `cuda/params.cuh` as NumPy dtypes.

The kernels receive the constants as compile-time definitions (`mlacore.jit`), so that each figure is written down once.
"""

from __future__ import annotations

import numpy as np

PAGE_SIZE = 64  # tokens of a cache page, where nothing else is asked for
PAGE_SIZES = (16, 32, 64, 128, 256)
TILE_TOKENS = 64  # tokens of a tile, the kernels' unit of work along a sequence
TILE_ROWS = 64  # query rows of one CTA

KV_LORA_RANK = 512
QK_ROPE_HEAD_DIM = 64
HEAD_DIM_QK = KV_LORA_RANK + QK_ROPE_HEAD_DIM
HEAD_DIM_V = KV_LORA_RANK
CHUNK_COLUMNS = 64  # of a cache row, 128 bytes: how wide the swizzle of shared memory is
PART_CHUNKS = 3  # chunks of a part, in which tiles arrive

# What one more item on a worker costs (prologue, epilogue, its share of the merge), in tiles.
ITEM_COST_TILES = 4
# Tiles of a batch that the planner tells apart, the same share for each sequence: 32-bit positions, twice over.
MAX_PLANNED_TILES = 1 << 29
# Most tiles of a split in a batch-invariant schedule, until a sequence has the most splits. More splits are faster at
# batch 1, fewer at large batches, and the batch must not decide.
INVARIANT_SPLIT_TILES = 16
MAX_INVARIANT_SPLITS = 64

MAX_QUERY_ROWS = 1 << 20  # of a sequence: kernels find its partial states by 32-bit offsets

WARP_THREADS = 32
DECODE_THREADS = 384  # two consumer warpgroups and one of producers
DECODE_SHARED_BYTES = 232448  # all that an SM90 block may have
CLUSTER_CTAS = (1, 2)  # row blocks that share every tile they load
SWAPPED_VARIANTS = ((16, 1), (32, 1), (16, 2))  # query rows of a CTA, CTAs of a cluster
STATE_MARKS = 254  # that tell partial states of one launch from those of others, until they come again
CLEAR_TURNS = 128  # launches in which an unused slot of partial states is cleared; fewer than marks
MERGE_PATIENCE_CYCLES = 1 << 17  # 70 µs: longer than balanced workers differ, short if the others cannot run
PLAN_THREADS = 512
WRITE_ROWS = 4  # tokens, one warp each, of a block that writes cache rows
GATHER_ROWS = 8  # the same of one that gathers them
UPDATE_ROWS = 4  # changes, one warp each, of a block that updates block tables
UPDATE_WORDS = (960, 8128)  # int32 of changes that go into a launch by value: parameters of 4 KB, of 32 KB
COPY_THREADS = 256  # of a block that copies its share of a page


def pool_box(page_size: int, cluster_ctas: int) -> tuple[int, int, int, int, int]:
    """What one load of the decode kernels brings of a pool ``[chunk columns, page_size, chunks, KV heads, pages]``,
    innermost dimension first: a part of a tile, or one chunk of a CTA's share or of a smaller page."""
    chunks = PART_CHUNKS if page_size >= TILE_TOKENS and cluster_ctas == 1 else 1
    return CHUNK_COLUMNS, min(page_size, TILE_TOKENS // cluster_ctas), chunks, 1, 1


def _struct(*fields: tuple[str, str]) -> np.dtype:
    return np.dtype(list(fields), align=True)


_POINTER, _I64, _I32, _F32 = "u8", "i8", "i4", "f4"

DECODE_PARAMS = _struct(
    ("q", _POINTER),
    ("kv", _POINTER),
    ("block_table", _POINTER),
    ("cache_seqlens", _POINTER),
    ("work", _POINTER),
    ("splits", _POINTER),
    ("out", _POINTER),
    ("lse", _POINTER),
    ("partial_out", _POINTER),
    ("partial_lse", _POINTER),
    ("merge_counters", _POINTER),
    ("merge_abandoned", _POINTER),
    ("launches", _POINTER),
    ("q_stride_batch", _I64),
    ("q_stride_seq", _I64),
    ("q_stride_head", _I64),
    ("block_table_stride", _I64),
    ("kv_stride_page", _I64),
    ("num_pages", _I32),
    ("prefetches_next", _I32),
    ("prefetches_first", _I32),
    ("batch", _I32),
    ("max_pages", _I32),
    ("seq_len_q", _I32),
    ("num_heads", _I32),
    ("num_kv_heads", _I32),
    ("heads_per_kv", _I32),
    ("row_blocks", _I32),
    ("blocks_per_worker", _I32),
    ("page_size_log2", _I32),
    ("causal", _I32),
    ("merge_patience_cycles", _I32),
    ("softmax_scale_log2", _F32),
)

PLAN_PARAMS = _struct(
    ("cache_seqlens", _POINTER),
    ("work", _POINTER),
    ("splits", _POINTER),
    ("batch", _I32),
    ("num_workers", _I32),
    ("max_splits", _I32),
)

WRITE_PARAMS = _struct(
    ("pool", _POINTER),
    ("ckv", _POINTER),
    ("kpe", _POINTER),
    ("where", _POINTER),
    ("norm_weight", _POINTER),
    ("rope_cos", _POINTER),
    ("rope_sin", _POINTER),
    ("pool_stride_page", _I64),
    ("pool_stride_row", _I64),
    ("ckv_stride", _I64),
    ("kpe_stride", _I64),
    ("num_slots", _I64),
    ("page_size_log2", _I32),
    ("num_tokens", _I32),
    ("rope_positions", _I32),
    ("rope_interleaved", _I32),
    ("norm_eps", _F32),
)

UPDATE_PARAMS = _struct(
    ("block_table", _POINTER),
    ("cache_seqlens", _POINTER),
    ("limits", _POINTER),
    ("where", _POINTER),
    ("block_table_stride", _I64),
    ("num_changes", _I32),
    ("num_tokens", _I32),
    ("page_size_log2", _I32),
)

COPY_PARAMS = _struct(
    ("pool", _POINTER),
    ("pages", _POINTER),
    ("pool_stride_layer", _I64),
    ("pool_stride_page", _I64),
    ("page_elems", _I64),
    ("num_layers", _I32),
    ("num_pages", _I32),
)

GATHER_PARAMS = _struct(
    ("pool", _POINTER),
    ("rows", _POINTER),
    ("block_table", _POINTER),
    ("spans", _POINTER),
    ("pool_stride_page", _I64),
    ("pool_stride_row", _I64),
    ("block_table_stride", _I64),
    ("max_pages", _I32),
    ("num_pages", _I32),
    ("page_size_log2", _I32),
)

# By their names in `cuda/params.cuh`.
STRUCTS = {
    "DecodeParams": DECODE_PARAMS,
    "PlanParams": PLAN_PARAMS,
    "WriteParams": WRITE_PARAMS,
    "UpdateParams": UPDATE_PARAMS,
    "CopyParams": COPY_PARAMS,
    "GatherParams": GATHER_PARAMS,
}
