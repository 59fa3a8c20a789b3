"""Paged MLA decode, and the merge of partial results: validation, then the backend that the arrays live on."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlacore import arrays, cpu, shapes, switches
from mlacore.params import HEAD_DIM_QK, HEAD_DIM_V, KV_LORA_RANK, PAGE_SIZES, QK_ROPE_HEAD_DIM
from mlacore.plan import DecodePlan, plan_decode


def mla_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    plan: DecodePlan | None = None,
    head_dim_v: int = HEAD_DIM_V,
    softmax_scale: float | None = None,
    causal: bool = False,
    out: Any = None,
    lse: Any = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Attend every query to its own sequence: ``softmax(scale * q @ K^T) @ V``, with ``V = K[:, :512]``.

    NumPy arrays are computed on the CPU and give NumPy arrays; GPU arrays (CuPy, or anything with ``__dlpack__`` or
    ``__cuda_array_interface__``) go through the Hopper kernels and give CuPy arrays. The same call twice gives the same
    bits. On a GPU nothing waits for the device, and with `plan`, `out` and `lse` given nothing is allocated.

    Parameters
    ----------
    q : bfloat16 or float16 ``[batch, seq_len_q, num_heads, 576]``
        Absorbed queries: 512 values against the latent, then 64 against the RoPE key. NumPy may also be float32, for
        all arguments that share this dtype.
    kv_cache : dtype of q ``[num_pages, page_size, num_kv_heads, 576]``
        Pool of pages of 16, 32, 64, 128 or 256 tokens. Strides but the last are free multiples of 16 bytes, so one
        layer of an interleaved pool will do.
    block_table : int32 ``[batch, max_pages]``
        Pages of each sequence, in order. Entries past a sequence's last page may hold anything.
    cache_seqlens : int32 ``[batch]``
        Tokens of each sequence, the new ones included; negative counts as 0. Cache slots past them may hold anything.
    plan : DecodePlan, optional
        From `plan_decode`, for this shape. Without one, a plan is made for this call.
    head_dim_v : int
        512.
    softmax_scale : float, optional
        Finite and > 0; default ``576 ** -0.5``. Models that extend RoPE (YaRN) pass their own.
    causal : bool
        Bottom-right aligned: query ``i`` sees the first ``length - (seq_len_q - 1 - i)`` tokens.
    out : dtype of q ``[batch, seq_len_q, num_heads, 512]``, optional
        C-contiguous buffer for the result.
    lse : float32 ``[batch, num_heads, seq_len_q]``, optional
        C-contiguous buffer for the result.
    stream : CuPy stream, int or object with ``__cuda_stream__``, optional
        Stream of the launches; CuPy's current stream if None.

    Returns
    -------
    out : dtype of q ``[batch, seq_len_q, num_heads, 512]``
        The buffer passed as `out`, if any. 0 for a query that sees no token.
    lse : float32 ``[batch, num_heads, seq_len_q]``
        Natural logarithm of the softmax denominator; ``-inf`` for a query that sees no token.

    Raises
    ------
    TypeError
        If an array is of the wrong kind or dtype, or NumPy and GPU arrays are mixed.
    ValueError
        If a shape, stride, alignment, device, the scale or the plan does not fit.
    IndexError
        With ``MLACORE_CHECK=1`` only (waits for the device): a length is negative or exceeds the block table, or a page
        that a sequence uses lies outside the pool. Without it such tokens read as zeros.
    RuntimeError
        If the GPU is not of compute capability 9.0.

    See Also
    --------
    mlacore.reference.mla_decode_reference : the same in float64, as the definition.
    """
    given_out, given_lse = out, lse
    named = {"q": q, "kv_cache": kv_cache, "block_table": block_table, "cache_seqlens": cache_seqlens}
    named |= {name: buffer for name, buffer in (("out", out), ("lse", lse)) if buffer is not None}
    on_numpy = arrays.on_numpy(**named)
    if on_numpy:
        arrays.check_no_stream(stream)
    else:
        named = _to_device(named, stream)
        q, kv_cache, block_table, cache_seqlens = (named[n] for n in ("q", "kv_cache", "block_table", "cache_seqlens"))
        out, lse = named.get("out"), named.get("lse")

    dims = _check_arguments(q, kv_cache, block_table, cache_seqlens, head_dim_v, out, lse)
    scale = shapes.resolve_scale(softmax_scale, HEAD_DIM_QK)
    if not isinstance(causal, (bool, np.bool_)):
        raise TypeError(f"causal: got {type(causal).__name__}, expected a bool")
    causal = bool(causal)
    if plan is not None:
        _check_plan(plan, dims, causal, arrays.device_of(q))
    if switches.checks_indices():
        _check_indices(block_table, cache_seqlens, dims["num_pages"], dims["page_size"], stream)

    if plan is None:
        counts = {name: dims[name] for name in ("num_heads", "seq_len_q", "num_kv_heads")}
        plan = plan_decode(cache_seqlens, **counts, causal=causal, stream=stream)
    batch, seq_len_q, num_heads, _ = q.shape
    out_shape, lse_shape = (batch, seq_len_q, num_heads, HEAD_DIM_V), (batch, num_heads, seq_len_q)
    if on_numpy:
        out = np.empty(out_shape, q.dtype) if out is None else out
        lse = np.empty(lse_shape, np.float32) if lse is None else lse
        cpu.decode(q, kv_cache, block_table, cache_seqlens, plan, out, lse, scale, causal)
    else:
        from mlacore import driver

        stream = arrays.as_stream(stream, q.data.device_id)
        if out is None or lse is None:
            with arrays.on_device(q.data.device_id, stream) as cupy:
                out = cupy.empty(out_shape, q.dtype) if out is None else out
                lse = cupy.empty(lse_shape, cupy.float32) if lse is None else lse
        driver.launch_decode(q, kv_cache, block_table, cache_seqlens, plan, out, lse, scale, causal, stream)
    return (out if given_out is None else given_out), (lse if given_lse is None else given_lse)


def merge_states(outs: Any, lses: Any, *, stream: Any = None) -> tuple[Any, Any]:
    """Merge attention over parts of the keys into attention over all: the mean of `outs` weighted by ``exp(lses)``.

    For context parallelism (each rank holds part of a sequence) and shared prefixes (attended to once, apart from what
    follows). Sums run in float32 in the order given.

    Parameters
    ----------
    outs : sequence of arrays ``[batch, seq_len_q, num_heads, head_dim_v]``, or one array with a leading axis
        Partial outputs in bfloat16, float16 or float32.
    lses : sequence of float32 arrays ``[batch, num_heads, seq_len_q]``, or one array with a leading axis
        Their natural-log denominators; ``-inf`` where a part holds no key for a query (its output is not looked at).
    stream : CuPy stream, int or object with ``__cuda_stream__``, optional
        Stream of the merge; CuPy's current stream if None.

    Returns
    -------
    out : dtype of outs ``[batch, seq_len_q, num_heads, head_dim_v]``
        0 where no part holds a key.
    lse : float32 ``[batch, num_heads, seq_len_q]``
        ``-inf`` where no part holds a key.

    Raises
    ------
    TypeError, ValueError
        If the parts differ in number, shape, dtype or device, or there is none.
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        if not hasattr(parts, "__iter__"):
            raise TypeError(f"{name}: got {type(parts).__name__}, expected a sequence of arrays")
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"lses: got {len(lses)} parts, expected as many as outs has ({len(outs)}), and at least 1")
    named = {f"outs[{i}]": part for i, part in enumerate(outs)} | {f"lses[{i}]": part for i, part in enumerate(lses)}
    if arrays.on_numpy(**named):
        arrays.check_no_stream(stream)
        context: Any = contextlib.nullcontext(np)
    else:
        named = _to_device(named, stream)
    outs, lses = list(named.values())[: len(outs)], list(named.values())[len(outs) :]

    dims = shapes.Dims()
    for i, (part, part_lse) in enumerate(zip(outs, lses, strict=True)):
        dims.match(f"outs[{i}]", part.shape, ("batch", "seq_len_q", "num_heads", "head_dim_v"))
        dims.match(f"lses[{i}]", part_lse.shape, ("batch", "num_heads", "seq_len_q"))
        allowed, source = (arrays.CPU_DTYPES, "a result of mla_decode") if i == 0 else ([outs[0].dtype], "from outs[0]")
        shapes.check_dtype(f"outs[{i}]", part.dtype, allowed, source)
        shapes.check_dtype(f"lses[{i}]", part_lse.dtype, [arrays.float32], "lse is float32")
        _check_device(f"outs[{i}]", part, outs[0], "outs[0]")
        _check_device(f"lses[{i}]", part_lse, outs[0], "outs[0]")
    if not arrays.is_numpy(outs[0]):
        context = _on_device_of(outs[0], stream)
    with context as xp, np.errstate(divide="ignore"):
        return _merge(xp, outs, lses)


def _merge(xp: Any, outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
    largest = lses[0]
    for part_lse in lses[1:]:
        largest = xp.maximum(largest, part_lse)
    base = xp.where(largest == -np.inf, xp.float32(0), largest)  # -inf - -inf would be NaN
    weights = [xp.exp(part_lse - base) for part_lse in lses]
    total = sum(weights[1:], start=weights[0])
    norm = xp.where(total == 0, xp.float32(1), total)
    merged = xp.zeros(outs[0].shape, xp.float32)
    for part, weight in zip(outs, weights, strict=True):
        share = (weight / norm).transpose(0, 2, 1)[..., None]  # [batch, seq_len_q, num_heads, 1]
        merged += xp.where(share == 0, xp.float32(0), part.astype(xp.float32) * share)
    return merged.astype(outs[0].dtype), base + xp.log(total)


def _on_device_of(array: Any, stream: Any) -> Any:
    device = array.data.device_id
    return arrays.on_device(device, arrays.as_stream(stream, device))


def _to_device(named: dict[str, Any], stream: Any) -> dict[str, Any]:
    importer = None if stream is None else arrays.as_stream(stream)
    return {name: arrays.to_device(name, array, importer) for name, array in named.items()}


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
    if dims["page_size"] not in PAGE_SIZES:
        raise ValueError(
            f"kv_cache: got page_size={dims['page_size']} (shape {tuple(kv_cache.shape)}), expected one of "
            f"{', '.join(map(str, PAGE_SIZES))} (the page sizes supported)"
        )
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
        _check_device(name, array, q, "q")

    if out is not None:
        dims.match("out", out.shape, ("batch", "seq_len_q", "num_heads", "head_dim_v"))
        _check_buffer("out", out, q.dtype, "from q", q)
    if lse is not None:
        dims.match("lse", lse.shape, ("batch", "num_heads", "seq_len_q"))
        _check_buffer("lse", lse, arrays.float32, "lse is float32", q)
    return dims


def _check_buffer(argument: str, buffer: Any, dtype: Any, source: str, q: Any) -> None:
    shapes.check_dtype(argument, buffer.dtype, [dtype], source)
    shapes.check_contiguous(argument, buffer)
    _check_device(argument, buffer, q, "q")
    if arrays.is_numpy(buffer) and not buffer.flags.writeable:
        raise ValueError(f"{argument}: got a read-only array, expected a writable one")
    if argument == "out":
        shapes.check_rows(argument, buffer)


def _check_device(argument: str, array: Any, model: Any, model_name: str) -> None:
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


def _check_indices(table: Any, lengths: Any, num_pages: int, page_size: int, stream: Any) -> None:
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
