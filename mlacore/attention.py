"""Paged MLA decode, and the merge of partial results: validation, then the backend that the arrays live on."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlacore import arrays, cpu, shapes, switches
from mlacore import decode_checks as checks
from mlacore.params import HEAD_DIM_V
from mlacore.plan import DecodePlan, plan_decode
from mlacore.ranges import marked

if TYPE_CHECKING:
    from mlacore.driver import DecodeLaunch


@marked("mla_decode")
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
        C-contiguous, writable buffer for the result.
    lse : float32 ``[batch, num_heads, seq_len_q]``, optional
        C-contiguous, writable buffer for the result.
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
    if not (
        type(q)
        is type(kv_cache)
        is type(block_table)
        is type(cache_seqlens)
        is type(q if out is None else out)
        is type(q if lse is None else lse)
        is arrays.cupy_type()
    ):
        named = {"q": q, "kv_cache": kv_cache, "block_table": block_table, "cache_seqlens": cache_seqlens}
        named |= {name: buffer for name, buffer in (("out", out), ("lse", lse)) if buffer is not None}
        if arrays.on_numpy(**named):
            arrays.check_no_stream(stream)
            return _decode_numpy(
                q, kv_cache, block_table, cache_seqlens, out, lse, plan, head_dim_v, softmax_scale, causal
            )
        for name, buffer in (("out", out), ("lse", lse)):
            if buffer is not None:
                arrays.check_writable(name, buffer)
        named = _to_device(named, stream)
        q, kv_cache, block_table, cache_seqlens = (named[n] for n in ("q", "kv_cache", "block_table", "cache_seqlens"))
        out, lse = named.get("out"), named.get("lse")

    # Types too, since True == 1 == 1.0, of which a call takes one. They come first: a value is compared with one of its
    # own type alone, as an array would answer with an array.
    call = _all_checked(
        (
            type(head_dim_v),
            type(softmax_scale),
            type(causal),
            head_dim_v,
            softmax_scale,
            causal,
            out is None,
            lse is None,
        ),
        q,
        kv_cache,
        block_table,
        cache_seqlens,
        q if out is None else out,
        q if lse is None else lse,
    )
    q_at, pool_at = q.data.ptr, kv_cache.data.ptr
    is_aligned = (q_at | pool_at | (0 if out is None else out.data.ptr)) % shapes.ALIGNMENT_BYTES == 0
    # A serving loop repeats its calls but for addresses, and checking takes longer than launching.
    try:
        last = plan._last_decode  # type: ignore[union-attr]
    except AttributeError:  # the plan's first call; None; or no plan, which the checks name
        last = None
    if last is None or last.call != call or not is_aligned:
        last = _prepared_before(call, plan) if is_aligned else None
    if last is None:
        scale = checks.check_call(
            q, kv_cache, block_table, cache_seqlens, out, lse, plan, head_dim_v, softmax_scale, causal
        )
    if switches.checks_indices():
        checks.check_indices(block_table, cache_seqlens, len(kv_cache), kv_cache.shape[1], stream)
    if last is None:
        if plan is None:
            plan = _plan_for(q, kv_cache, cache_seqlens, causal, stream)
        last = _prepared_before(call, plan) or _prepare(call, q, kv_cache, block_table, plan, scale, bool(causal))
    device = q.data.device_id
    stream = arrays.as_stream(stream, device)
    if out is None or lse is None:
        with arrays.on_device(device, stream) as cupy:
            out, lse = _results(cupy, q, out, lse)
    addresses = (
        q_at,
        pool_at,
        block_table.data.ptr,
        cache_seqlens.data.ptr,
        last.schedule,
        out.data.ptr,
        lse.data.ptr,
        last.scratch,
    )
    last.launch.at(stream.ptr, addresses)
    return (out if given_out is None else given_out), (lse if given_lse is None else given_lse)


class _Checked(NamedTuple):
    """A call that was found right, as its plan remembers it, and what such a call launches. It keeps no array.

    Attributes
    ----------
    call : tuple
        As `_all_checked`.
    launch : DecodeLaunch
        What it launches.
    schedule, scratch : bytes
        Addresses that are the plan's, for `launch`.
    """

    call: tuple
    launch: DecodeLaunch
    schedule: bytes
    scratch: bytes


def _all_checked(
    options: tuple, q: Any, kv_cache: Any, block_table: Any, cache_seqlens: Any, out: Any, lse: Any
) -> tuple:
    """All that is checked of a call with CuPy arrays but their addresses."""
    # Read on every call, since CuPy's arrays can be reshaped in place; written out, in half the time of a loop. That an
    # array is contiguous says enough of its strides, and CuPy knows it, while it makes a new tuple to tell them.
    return (
        options,
        q.shape,
        q._c_contiguous or q.strides,
        q.dtype,
        q.data.device_id,
        kv_cache.shape,
        kv_cache._c_contiguous or kv_cache.strides,
        kv_cache.dtype,
        kv_cache.data.device_id,
        block_table.shape,
        block_table._c_contiguous or block_table.strides,
        block_table.dtype,
        block_table.data.device_id,
        cache_seqlens.shape,
        cache_seqlens._c_contiguous or cache_seqlens.strides,
        cache_seqlens.dtype,
        cache_seqlens.data.device_id,
        out.shape,
        out._c_contiguous or out.strides,
        out.dtype,
        out.data.device_id,
        lse.shape,
        lse._c_contiguous or lse.strides,
        lse.dtype,
        lse.data.device_id,
    )


# Call and shape of the plan -> launch: for a step's new plan, and where calls with one plan differ.
_prepared: dict[tuple, DecodeLaunch] = {}
_MAX_PREPARED = 256
_plan_shape = operator.attrgetter(*(field.name for field in dataclasses.fields(DecodePlan) if field.type != "Any"))


def _prepared_before(call: tuple, plan: Any) -> _Checked | None:
    """The call, if one like it was prepared, for this plan or another of its shape."""
    if not isinstance(plan, DecodePlan):
        return None
    try:
        launch = _prepared.get((call, _plan_shape(plan)))
    except TypeError:  # a scalar that cannot be hashed is a mistake, which the checks name
        return None
    return None if launch is None else _remember(call, plan, launch)


def _prepare(
    call: tuple, q: Any, kv_cache: Any, block_table: Any, plan: DecodePlan, scale: float, causal: bool
) -> _Checked:
    from mlacore import driver

    launch = driver.prepare_decode(q, kv_cache, block_table, plan, scale, causal)
    if len(_prepared) >= _MAX_PREPARED:
        _prepared.clear()
    _prepared[call, _plan_shape(plan)] = launch
    return _remember(call, plan, launch)


def _remember(call: tuple, plan: DecodePlan, launch: DecodeLaunch) -> _Checked:
    checked = _Checked(call, launch, *launch.addresses_of(plan))
    object.__setattr__(plan, "_last_decode", checked)  # frozen for callers
    return checked


def _decode_numpy(
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
) -> tuple[Any, Any]:
    scale = checks.check_call(
        q, kv_cache, block_table, cache_seqlens, out, lse, plan, head_dim_v, softmax_scale, causal
    )
    if switches.checks_indices():
        checks.check_indices(block_table, cache_seqlens, len(kv_cache), kv_cache.shape[1], None)
    if plan is None:
        plan = _plan_for(q, kv_cache, cache_seqlens, causal, None)
    out, lse = _results(np, q, out, lse)
    cpu.decode(q, kv_cache, block_table, cache_seqlens, plan, out, lse, scale, bool(causal))
    return out, lse


def _results(xp: Any, q: Any, out: Any, lse: Any) -> tuple[Any, Any]:
    """`out` and `lse`, made where they are None."""
    batch, seq_len_q, num_heads, _ = q.shape
    out = xp.empty((batch, seq_len_q, num_heads, HEAD_DIM_V), q.dtype) if out is None else out
    lse = xp.empty((batch, num_heads, seq_len_q), xp.float32) if lse is None else lse
    return out, lse


def _plan_for(q: Any, kv_cache: Any, cache_seqlens: Any, causal: Any, stream: Any) -> DecodePlan:
    _, seq_len_q, num_heads, _ = q.shape
    counts = {"num_heads": num_heads, "seq_len_q": seq_len_q, "num_kv_heads": kv_cache.shape[2]}
    return plan_decode(cache_seqlens, **counts, causal=bool(causal), stream=stream)


@marked("merge_states")
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
        checks.check_device(f"outs[{i}]", part, outs[0], "outs[0]")
        checks.check_device(f"lses[{i}]", part_lse, outs[0], "outs[0]")
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
    return arrays.all_to_device(named, None if stream is None else arrays.as_stream(stream))
