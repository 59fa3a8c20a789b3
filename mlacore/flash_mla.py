"""FlashMLA's call names over `mlacore.mla_decode`, so that code written for that package changes one import line.

Dense decode with FlashMLA's semantics: its signatures, old and new, and ``lse = +inf`` for a query that sees no token.
Results come back in the library of `q`: torch tensors for torch tensors, and so on. torch is never imported.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from mlacore import arrays, decode_checks, shapes
from mlacore.attention import mla_decode
from mlacore.params import HEAD_DIM_V
from mlacore.plan import DecodePlan, plan_decode


class FlashMLASchedMeta:
    """What `get_mla_metadata` returns and `flash_mla_with_kvcache` takes: a plan, made at the latest by the first call.

    It serves every layer of a step. Lengths that have moved on leave the result right and the work out of balance, so
    make a new one each step, or call ``meta.plan.update(cache_seqlens, stream=...)``. Calls that share one run one
    after another, as on one stream. A CUDA graph needs it, and one call with it, before the capture, and as long as it
    is replayed.

    Attributes
    ----------
    plan : DecodePlan or None
        The plan; None before the first call, unless `get_mla_metadata` was given lengths and heads.
    """

    __slots__ = ("_views", "plan")

    def __init__(self, plan: DecodePlan | None = None) -> None:
        self.plan = plan
        self._views: dict[tuple, DecodePlan] = {}  # by what a call looks like: the plan under that call's shape

    def _plan_for(
        self,
        arguments: tuple[Any, Any, Any, Any],
        head_dim_v: Any,
        softmax_scale: Any,
        causal: Any,
        stream: Any,
    ) -> DecodePlan:
        q, k_cache, block_table, cache_seqlens = arguments
        key = (q.shape, k_cache.shape, cache_seqlens.shape, arrays.device_of(q), bool(causal))
        if (view := self._views.get(key)) is not None:
            return view
        decode_checks.check_call(
            q, k_cache, block_table, cache_seqlens, None, None, None, head_dim_v, softmax_scale, causal
        )
        _, seq_len_q, num_heads, _ = q.shape
        num_kv_heads = k_cache.shape[2]
        rows = seq_len_q * num_heads // num_kv_heads
        if self.plan is None:
            self.plan = _plan(cache_seqlens, rows, num_kv_heads, stream)
        self._check_shape(len(q), rows, num_kv_heads, arrays.device_of(q))
        # A plan depends on query tokens and heads through the rows of a KV head alone, and on no mask.
        view = dataclasses.replace(self.plan, seq_len_q=seq_len_q, num_heads=num_heads, causal=bool(causal))
        self._views[key] = view
        return view

    def _check_shape(self, batch: int, rows: int, num_kv_heads: int, device: int | None) -> None:
        plan = self.plan
        assert plan is not None
        planned_rows = plan.seq_len_q * plan.num_heads // plan.num_kv_heads
        for name, got, expected in (
            ("batch", plan.batch, batch),
            ("num_kv_heads", plan.num_kv_heads, num_kv_heads),
            ("seq_len_q * num_heads / num_kv_heads", planned_rows, rows),
            ("device", arrays.device_name(plan.device), arrays.device_name(device)),
        ):
            if got != expected:
                raise ValueError(
                    f"tile_scheduler_metadata: got a plan for {name}={got}, expected {expected} (from q and k_cache)"
                )


def get_mla_metadata(
    cache_seqlens: Any = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    num_heads_per_head_k: int | None = None,
) -> tuple[FlashMLASchedMeta, None]:
    """Schedule of a decode step, by any of FlashMLA's signatures.

    With lengths and both counts (its older signatures) the plan is made here, from the lengths on their device; with
    less (its newest takes nothing) by the first `flash_mla_with_kvcache`.

    Parameters
    ----------
    cache_seqlens : int32 ``[batch]``, optional
        Tokens of each sequence.
    num_q_tokens_per_head_k : int, optional
        Query rows of a KV head: ``seq_len_q * num_heads / num_kv_heads``. Its first release says
        `num_heads_per_head_k`.
    num_heads_k : int, optional
        KV heads; MLA has 1.
    num_heads_q : int, optional
        Query heads. Not needed.
    is_fp8_kvcache, topk
        Not served: False and None only.

    Returns
    -------
    tile_scheduler_metadata : FlashMLASchedMeta
        For `flash_mla_with_kvcache`.
    num_splits : None
        As FlashMLA's newest signature has it; the plan holds the splits.

    Raises
    ------
    NotImplementedError
        For arguments not served.
    TypeError, ValueError
        If lengths or counts do not fit, as in `mlacore.plan_decode`.
    """
    _refuse(is_fp8_kvcache=is_fp8_kvcache, topk=topk)
    rows = num_q_tokens_per_head_k if num_heads_per_head_k is None else num_heads_per_head_k
    if cache_seqlens is None or rows is None or num_heads_k is None:
        return FlashMLASchedMeta(), None
    rows = shapes.check_count("num_q_tokens_per_head_k", rows)
    num_heads_k = shapes.check_count("num_heads_k", num_heads_k)
    stream = None if arrays.is_numpy(cache_seqlens) else arrays.current_stream_of(cache_seqlens)
    return FlashMLASchedMeta(_plan(cache_seqlens, rows, num_heads_k, stream)), None


def flash_mla_with_kvcache(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Any = None,
    attn_sink: Any = None,
    extra_k_cache: Any = None,
    extra_indices_in_kvcache: Any = None,
    topk_length: Any = None,
    extra_topk_length: Any = None,
    *,
    descale_q: Any = None,
    descale_k: Any = None,
) -> tuple[Any, Any]:
    """Dense paged MLA decode by FlashMLA's signature: `mlacore.mla_decode`, but for ``lse`` of empty rows.

    Everything runs on the stream that is current in q's library for torch, CuPy's current stream for others (which
    DLPack then orders). Nothing waits for the device.

    Parameters
    ----------
    q : bfloat16 or float16 ``[batch, seq_len_q, num_heads, 576]``
        torch tensor, CuPy, NumPy or other array (`mlacore.mla_decode` says which).
    k_cache : dtype of q ``[num_pages, page_size, num_kv_heads, 576]``
        Pages of 64 tokens, or 16, 32, 128, 256.
    block_table : int32 ``[batch, max_pages]``
        Pages of each sequence; anything past a sequence's last page.
    cache_seqlens : int32 ``[batch]``
        Tokens of each sequence.
    head_dim_v : int
        512.
    tile_scheduler_metadata : FlashMLASchedMeta
        From `get_mla_metadata`, for this batch size and these heads.
    num_splits : object, optional
        What `get_mla_metadata` returned beside it; not looked at.
    softmax_scale : float, optional
        Default ``576 ** -0.5``.
    causal : bool
        Bottom-right aligned.
    is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length
        Not served: False and None only, as are the keywords `descale_q` and `descale_k` of FP8 forks.

    Returns
    -------
    out : dtype of q ``[batch, seq_len_q, num_heads, 512]``
        In the library of q (CuPy where that library has no ``from_dlpack``). 0 for a query that sees no token.
    lse : float32 ``[batch, num_heads, seq_len_q]``
        Natural logarithm of the softmax denominator; ``+inf`` for a query that sees no token.

    Raises
    ------
    NotImplementedError
        For arguments not served.
    TypeError, ValueError, IndexError, RuntimeError
        As in `mlacore.mla_decode`, and ValueError if the metadata is for another shape or device.
    """
    _refuse(
        is_fp8_kvcache=is_fp8_kvcache,
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
        descale_q=descale_q,
        descale_k=descale_k,
    )
    if not isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        raise TypeError(
            f"tile_scheduler_metadata: got {type(tile_scheduler_metadata).__name__}, expected a FlashMLASchedMeta "
            f"(from mlacore.flash_mla.get_mla_metadata)"
        )
    views, is_host = (q, k_cache, block_table, cache_seqlens), False
    if {*map(type, views)} == {arrays.cupy_type()}:
        stream = arrays.current_stream_of(q)
    else:
        named = {"q": q, "k_cache": k_cache, "block_table": block_table, "cache_seqlens": cache_seqlens}
        is_host = arrays.on_numpy(**named)
        stream = None if is_host else arrays.current_stream_of(q)
        if not is_host:
            named = arrays.all_to_device(named, stream)
        views = (named["q"], named["k_cache"], named["block_table"], named["cache_seqlens"])
    plan = tile_scheduler_metadata._plan_for(views, head_dim_v, softmax_scale, causal, stream)
    batch, seq_len_q, num_heads, _ = q.shape
    # torch's own memory: its allocator then knows of it, in a graph's private pool too.
    torch = arrays.torch_of(q)
    out = None if torch is None else q.new_empty((batch, seq_len_q, num_heads, HEAD_DIM_V))
    lse = None if torch is None else q.new_empty((batch, num_heads, seq_len_q), dtype=torch.float32)
    out_view, lse_view = mla_decode(
        *views,
        plan=plan,
        head_dim_v=head_dim_v,
        softmax_scale=softmax_scale,
        causal=causal,
        out=None if out is None else arrays.to_device("out", out, stream),
        lse=None if lse is None else arrays.to_device("lse", lse, stream),
        stream=stream,
    )
    if is_host:
        np.copyto(lse_view, np.inf, where=np.isneginf(lse_view))
        return out_view, lse_view
    with arrays.on_device(lse_view.data.device_id, stream):
        _empty_rows_to_plus_inf()(lse_view, lse_view)
        if torch is not None:
            return out, lse
        return arrays.to_library_of(q, out_view), arrays.to_library_of(q, lse_view)


@functools.cache
def _empty_rows_to_plus_inf() -> Any:
    cupy = arrays.import_cupy()
    operation = "flipped = isinf(lse) ? fabsf(lse) : lse"
    return cupy.ElementwiseKernel("float32 lse", "float32 flipped", operation, "mlacore_empty_rows_to_plus_inf")


def _plan(cache_seqlens: Any, rows: int, num_kv_heads: int, stream: Any) -> DecodePlan:
    """A plan for `rows` query rows of each KV head, whatever tokens and heads they are."""
    return plan_decode(cache_seqlens, num_heads=rows * num_kv_heads, num_kv_heads=num_kv_heads, stream=stream)


def _refuse(**arguments: Any) -> None:
    """NotImplementedError naming the arguments that ask for what is not served."""
    asked = [name for name, value in arguments.items() if value is not None and value is not False]
    if asked:
        raise NotImplementedError(
            f"{', '.join(asked)}: not served; mlacore.flash_mla decodes densely over bfloat16 and float16 caches "
            f"(no FP8, no sparse indices, no attention sinks)"
        )
