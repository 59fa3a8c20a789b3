"""What `mla_decode` demands of its arguments."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlacore import arrays, shapes
from mlacore.params import HEAD_DIM_QK, HEAD_DIM_V, KV_LORA_RANK, PAGE_SIZES, QK_ROPE_HEAD_DIM
from mlacore.plan import DecodePlan


def check_call(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    out: Any,
    lse: Any,
    plan: Any,
    head_dim_v: Any,
    softmax_scale: Any,
    causal: Any,
) -> float:
    """All checks of one decode call that look at no array's values; returns the scale."""
    dims = _check_arguments(q, kv_cache, block_table, cache_seqlens, head_dim_v, out, lse)
    scale = shapes.resolve_scale(softmax_scale, HEAD_DIM_QK)
    causal = shapes.check_bool("causal", causal)
    if plan is not None:
        _check_plan(plan, dims, causal, arrays.device_of(q))
    return scale


def _check_arguments(
    q: Any, kv_cache: Any, block_table: Any, cache_seqlens: Any, head_dim_v: Any, out: Any, lse: Any
) -> shapes.Dims:
    """Shapes, dtypes, devices and strides of one decode call; returns its dimensions."""
    dims = shapes.Dims()
    dims.bind("head_dim", HEAD_DIM_QK, f"kv_lora_rank {KV_LORA_RANK} + qk_rope_head_dim {QK_ROPE_HEAD_DIM}")
    dims.bind("head_dim_v", HEAD_DIM_V, "kv_lora_rank")
    dims.match("cache_seqlens", cache_seqlens.shape, ("batch",))
    dims.match("block_table", block_table.shape, ("batch", "max_pages"))
    dims.match("q", q.shape, ("batch", "seq_len_q", "num_heads", "head_dim"))
    dims.match("kv_cache", kv_cache.shape, ("num_pages", "page_size", "num_kv_heads", "head_dim"))
    check_page_size(kv_cache, dims["page_size"])
    if dims["num_heads"] % dims["num_kv_heads"]:
        raise ValueError(
            f"kv_cache: got num_kv_heads={dims['num_kv_heads']}, expected a divisor of "
            f"num_heads={dims['num_heads']} (from q)"
        )
    if not isinstance(head_dim_v, (int, np.integer)) or head_dim_v != HEAD_DIM_V:
        raise ValueError(f"head_dim_v: got {head_dim_v!r}, expected {HEAD_DIM_V} (kv_lora_rank)")

    if arrays.is_numpy(q):
        shapes.check_dtype("q", q.dtype, arrays.CPU_DTYPES, "supported in NumPy")
    else:
        shapes.check_dtype("q", q.dtype, arrays.GPU_DTYPES, "what the GPU kernels take")
    shapes.check_dtype("kv_cache", kv_cache.dtype, [q.dtype], "from q")
    shapes.check_dtype("block_table", block_table.dtype, [arrays.int32], "page ids are int32")
    shapes.check_dtype("cache_seqlens", cache_seqlens.dtype, [arrays.int32], "lengths are int32")

    shapes.check_rows("q", q)
    shapes.check_rows("kv_cache", kv_cache)
    shapes.check_last_axis("block_table", block_table)
    shapes.check_contiguous("cache_seqlens", cache_seqlens)
    for name, array in {"kv_cache": kv_cache, "block_table": block_table, "cache_seqlens": cache_seqlens}.items():
        check_device(name, array, q, "q")

    if out is not None:
        dims.match("out", out.shape, ("batch", "seq_len_q", "num_heads", "head_dim_v"))
        _check_buffer("out", out, q.dtype, "from q", q)
    if lse is not None:
        dims.match("lse", lse.shape, ("batch", "num_heads", "seq_len_q"))
        _check_buffer("lse", lse, arrays.float32, "lse is float32", q)
    return dims


def check_page_size(kv_cache: Any, page_size: int) -> None:
    """Raise ValueError unless `page_size`, of `kv_cache`, is one that the kernels know."""
    if page_size not in PAGE_SIZES:
        raise ValueError(
            f"kv_cache: got page_size={page_size} (shape {tuple(kv_cache.shape)}), expected one of "
            f"{', '.join(map(str, PAGE_SIZES))} (the page sizes supported)"
        )


def _check_buffer(argument: str, buffer: Any, dtype: Any, source: str, q: Any) -> None:
    shapes.check_dtype(argument, buffer.dtype, [dtype], source)
    shapes.check_contiguous(argument, buffer)
    check_device(argument, buffer, q, "q")
    arrays.check_writable(argument, buffer)
    if argument == "out":
        shapes.check_rows(argument, buffer)


def check_device(argument: str, array: Any, model: Any, model_name: str) -> None:
    """Raise ValueError unless `array` lives where `model` does."""
    got, expected = arrays.device_of(array), arrays.device_of(model)
    if got != expected:
        raise ValueError(
            f"{argument}: got an array on {arrays.device_name(got)}, expected {arrays.device_name(expected)} "
            f"(from {model_name})"
        )


def _check_plan(plan: Any, dims: shapes.Dims, causal: bool, device: int | None) -> None:
    if not isinstance(plan, DecodePlan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected a DecodePlan (from plan_decode) or None")
    if plan.device != device:
        got, expected = arrays.device_name(plan.device), arrays.device_name(device)
        raise ValueError(f"plan: got a plan for {got}, expected one for {expected} (from q)")
    for name in ("batch", "seq_len_q", "num_heads", "num_kv_heads"):
        size = getattr(plan, name)
        if size != dims[name]:
            raise ValueError(f"plan: got a plan for {name}={size}, expected {name}={dims[name]} ({dims.source(name)})")
    if plan.causal != causal:
        raise ValueError(f"plan: got a plan for causal={plan.causal}, expected causal={causal} (from this call)")


def check_indices(table: Any, lengths: Any, num_pages: int, page_size: int, stream: Any) -> None:
    """The checking mode: every length fits its row of the table, every page that is used lies in the pool."""
    if not arrays.is_numpy(table):
        table, lengths = (
            array.get(stream=arrays.as_stream(stream, table.data.device_id)) for array in (table, lengths)
        )
    lengths = lengths.astype(np.int64)
    max_pages = table.shape[1]
    columns = -(-lengths // page_size)
    bad_lengths = np.flatnonzero((lengths < 0) | (columns > max_pages))
    if bad_lengths.size:
        sequence = bad_lengths[0]
        needs = f", which needs column {columns[sequence] - 1} of block_table" if lengths[sequence] > 0 else ""
        raise IndexError(
            f"cache_seqlens: sequence {sequence} got length {lengths[sequence]}{needs}, expected "
            f"0 <= length <= {max_pages * page_size} (max_pages={max_pages} from block_table, page_size={page_size})"
        )
    used = np.arange(max_pages) < columns[:, None]
    bad_pages = np.argwhere(used & ((table < 0) | (table >= num_pages)))
    if bad_pages.size:
        sequence, column = bad_pages[0]
        raise IndexError(
            f"block_table: sequence {sequence}, column {column} got page {table[sequence, column]}, expected "
            f"0 <= page < {num_pages} (num_pages from kv_cache)"
        )
