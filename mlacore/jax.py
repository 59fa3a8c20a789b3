"""mlacore inside ``jax.jit``: the planner, attention and the cache's writes as XLA custom calls.

The cache belongs to JAX: `append` takes it and returns it, and where it is donated (``donate_argnums``, or carried
through a ``lax`` loop) its memory is updated in place. Shapes are static; block table and lengths are arrays on the
device. On a GPU the calls launch the Hopper kernels on XLA's stream; on a CPU they are the NumPy backend. No C++
compiler is needed.

Importing this module imports JAX, and registers the calls with it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from mlacore import cache_checks, shapes, xla_ffi, xla_targets
from mlacore import decode_checks as checks
from mlacore import plan as plans
from mlacore.arrays import CPU_DTYPES, GPU_DTYPES, int32
from mlacore.cache_layout import CacheLayout
from mlacore.dispatch import KernelShape
from mlacore.params import HEAD_DIM_QK, HEAD_DIM_V, KV_LORA_RANK, QK_ROPE_HEAD_DIM

__all__ = ["DecodePlan", "append", "mla_decode", "plan_decode"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["work", "splits"],
    meta_fields=[
        "batch",
        "seq_len_q",
        "num_heads",
        "num_kv_heads",
        "causal",
        "num_workers",
        "max_splits",
        "kernel",
    ],
)
@dataclasses.dataclass(frozen=True, eq=False)
class DecodePlan:
    """A split schedule for one batch shape, made by `plan_decode`: a pytree of two arrays, the rest is static.

    It holds no scratch memory, which belongs to the device's stream, so that calls may use it in any order.

    Attributes
    ----------
    work : int32 ``[num_workers + 1, 2]``
        Sequence and tile at which each worker begins; the last row is ``(batch, 0)``.
    splits : int32 ``[batch, 2]``
        First worker and number of workers of each sequence.
    batch, seq_len_q, num_heads, num_kv_heads : int
        The shape it serves; `mla_decode` refuses others.
    causal : bool
        The mask it serves.
    num_workers : int
        Workers that share the tiles, as in `mlacore.DecodePlan`.
    max_splits : int
        Most splits of a sequence, if the plan is batch-invariant; 0 for others.
    kernel : KernelShape
        The kernel that a GPU runs (`mlacore.dispatch`).
    """

    work: Any
    splits: Any
    batch: int
    seq_len_q: int
    num_heads: int
    num_kv_heads: int
    causal: bool
    num_workers: int
    max_splits: int
    kernel: KernelShape


def plan_decode(
    cache_seqlens: Any,
    *,
    num_heads: int,
    seq_len_q: int = 1,
    num_kv_heads: int = 1,
    causal: bool = False,
    max_seq_len: int | None = None,
    batch_invariant: bool = False,
    num_workers: int | None = None,
) -> DecodePlan:
    """Plan the splits of one decode step, from lengths alone; every layer of the step can share the plan.

    Parameters
    ----------
    cache_seqlens : int32 ``[batch]``
        Tokens of each sequence, the new ones included.
    num_heads, seq_len_q, num_kv_heads, causal, max_seq_len, batch_invariant
        Static; as in `mlacore.plan_decode`.
    num_workers : int, optional
        Default: as many as fill JAX's default device. Results do not depend on it but for their last bit.

    Returns
    -------
    DecodePlan

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, shape, dtype or range.
    RuntimeError
        If JAX's default device is a GPU that is not of compute capability 9.0.
    NotImplementedError
        Under ``jax.vmap``, as for `mla_decode`.
    """
    options = plans.check_plan_options(
        num_heads, seq_len_q, num_kv_heads, causal, max_seq_len, batch_invariant, num_workers
    )
    lengths = _stand_in("cache_seqlens", cache_seqlens)
    shapes.Dims().match("cache_seqlens", lengths.shape, ("batch",))
    shapes.check_dtype("cache_seqlens", lengths.dtype, [int32], "lengths are int32")
    fields = plans.plan_shape(len(lengths), _gpu(), *options)
    batch, num_workers, max_splits = fields["batch"], fields["num_workers"], fields["max_splits"]
    work, splits = _call(
        xla_targets.PLAN,
        "plan_decode",
        xla_targets.spec(batch=batch, num_workers=num_workers, max_splits=max_splits),
        (jax.ShapeDtypeStruct((num_workers + 1, 2), int32), jax.ShapeDtypeStruct((batch, 2), int32)),
        cache_seqlens,
    )
    return DecodePlan(work, splits, **fields)


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
    layer: int | None = None,
) -> tuple[Any, Any]:
    """Attend every query to its own sequence: ``softmax(scale * q @ K^T) @ V``, with ``V = K[:, :512]``.

    `mlacore.mla_decode` for JAX arrays, with the same bits for the same plan. Meant for ``jax.jit``: outside, every
    call is traced anew, which takes about a millisecond.

    Parameters
    ----------
    q : bfloat16 or float16 ``[batch, seq_len_q, num_heads, 576]``
        Absorbed queries: 512 values against the latent, then 64 against the RoPE key. On a CPU also float32.
    kv_cache : dtype of q ``[num_pages, page_size, num_kv_heads, 576]``
        Pool of pages of 16, 32, 64, 128 or 256 tokens. With `layer`:
        ``[num_layers, num_pages, page_size, num_kv_heads, 576]``.
    block_table : int32 ``[batch, max_pages]``
        Pages of each sequence, in order. Entries past a sequence's last page may hold anything.
    cache_seqlens : int32 ``[batch]``
        Tokens of each sequence, the new ones included; negative counts as 0. Cache slots past them may hold anything.
    plan : DecodePlan, optional
        From `mlacore.jax.plan_decode`, for this shape. Without one, a plan is made for this call.
    head_dim_v : int
        512.
    softmax_scale : float, optional
        Static, finite and > 0; default ``576 ** -0.5``.
    causal : bool
        Static. Bottom-right aligned: query ``i`` sees the first ``length - (seq_len_q - 1 - i)`` tokens.
    layer : int, optional
        Static: which layer of a pool that holds several. A slice in JAX would copy that layer.

    Returns
    -------
    out : dtype of q ``[batch, seq_len_q, num_heads, 512]``
        0 for a query that sees no token.
    lse : float32 ``[batch, num_heads, seq_len_q]``
        Natural logarithm of the softmax denominator; ``-inf`` for a query that sees no token.

    Raises
    ------
    TypeError, ValueError
        While tracing, if a shape, dtype, option or the plan does not fit.
    RuntimeError
        If JAX's default device is a GPU that is not of compute capability 9.0.
    NotImplementedError
        Under ``jax.vmap`` (batch is an axis of every argument already) and under ``jax.grad`` (inference only).
    """
    whole = _stand_in("kv_cache", kv_cache)
    queries, (pool, layer) = _stand_in("q", q), _layer_of(whole, layer)
    tables = _stand_in("block_table", block_table), _stand_in("cache_seqlens", cache_seqlens)
    _check_dtype("q", queries)
    if plan is not None and not isinstance(plan, DecodePlan):
        raise TypeError(
            f"plan: got {type(plan).__name__}, expected a mlacore.jax.DecodePlan (from plan_decode) or None"
        )
    planned = None if plan is None else plans.DecodePlan(**_fields(plan), device=None, work=None, splits=None)
    scale = checks.check_call(queries, pool, *tables, None, None, planned, head_dim_v, softmax_scale, causal)
    batch, seq_len_q, num_heads, _ = queries.shape
    if plan is None:
        counts = {"num_heads": num_heads, "seq_len_q": seq_len_q, "num_kv_heads": pool.shape[2]}
        plan = plan_decode(cache_seqlens, **counts, causal=bool(causal))
    else:  # a pytree, whose arrays anybody may have changed
        for name, extents in (("work", (plan.num_workers + 1, 2)), ("splits", (plan.batch, 2))):
            array = _stand_in(f"plan.{name}", getattr(plan, name))
            shapes.Dims().match(f"plan.{name}", array.shape, extents)
            shapes.check_dtype(f"plan.{name}", array.dtype, [int32], "from plan_decode")
    spec = xla_targets.spec(
        q=queries.shape,
        kv_cache=whole.shape,
        layer=layer,
        block_table=tables[0].shape,
        dtype=queries.dtype.name,
        softmax_scale=scale,
        plan=_fields(plan),
    )
    results = (
        jax.ShapeDtypeStruct((batch, seq_len_q, num_heads, HEAD_DIM_V), queries.dtype),
        jax.ShapeDtypeStruct((batch, num_heads, seq_len_q), np.float32),
    )
    arguments = q, kv_cache, block_table, cache_seqlens, plan.work, plan.splits
    out, lse = _call(xla_targets.DECODE, "mla_decode", spec, results, *arguments)
    return out, lse


def append(
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    ckv: Any,
    kpe: Any,
    *,
    layer: int | None = None,
    norm_weight: Any = None,
    norm_eps: float = 1e-6,
    rope_cos: Any = None,
    rope_sin: Any = None,
    rope_interleaved: bool = True,
) -> Any:
    """Write the rows of each sequence's last tokens into the cache; normalised and rotated on the way if asked.

    Where `kv_cache` is donated, its memory is that of the result and nothing else is copied or written. Layers of one
    step give the same block table and lengths: XLA computes their slots once.

    Parameters
    ----------
    kv_cache : bfloat16 or float16 ``[num_pages, page_size, 1, 576]``
        As for `mla_decode`, with `layer` or without. On a CPU also float32.
    block_table : int32 ``[batch, max_pages]``
        Pages of each sequence, in order.
    cache_seqlens : int32 ``[batch]``
        Tokens of each sequence, these included: the lengths that `mla_decode` gets next.
    ckv : dtype of kv_cache ``[batch, num_tokens, 512]``
        Latents of the last `num_tokens` tokens of each sequence. Of a sequence with fewer, the last ones are written;
        of one of length 0 (padding) none is. A token whose page lies outside the pool is skipped.
    kpe : dtype of kv_cache ``[batch, num_tokens, 64]``
        RoPE keys, likewise.
    layer : int, optional
        Static: which layer of a pool that holds several.
    norm_weight : dtype of kv_cache ``[512]``, optional
        RMSNorm of the latents, as in `PagedKVCache.write`, and with `norm_eps`, which is static.
    rope_cos, rope_sin : float32 ``[positions, 32]``, optional
        RoPE of the keys, as in `PagedKVCache.write`; a position past the tables makes the key NaN.
    rope_interleaved : bool
        Static: pairs of values ``(2i, 2i + 1)``, as DeepSeek has them, else ``(i, i + 32)``.

    Returns
    -------
    array
        The cache with the rows written: dtype and shape of `kv_cache`.

    Raises
    ------
    TypeError, ValueError
        While tracing, if a shape, dtype or option does not fit.
    NotImplementedError
        Under ``jax.vmap`` and ``jax.grad``, as for `mla_decode`.
    """
    whole = _stand_in("kv_cache", kv_cache)
    pool, layer = _layer_of(whole, layer)
    dims = shapes.Dims()
    dims.bind("head_dim", HEAD_DIM_QK, f"kv_lora_rank {KV_LORA_RANK} + qk_rope_head_dim {QK_ROPE_HEAD_DIM}")
    dims.match("cache_seqlens", np.shape(cache_seqlens), ("batch",))
    dims.match("block_table", np.shape(block_table), ("batch", "max_pages"))
    dims.match("kv_cache", pool.shape, ("num_pages", "page_size", 1, "head_dim"))
    num_pages, page_size = pool.shape[:2]
    checks.check_page_size(pool, page_size)
    if num_pages * page_size > np.iinfo(np.int32).max:
        raise ValueError(f"kv_cache: got {num_pages * page_size} slots, expected fewer than 2**31 (JAX's int32)")
    _check_dtype("kv_cache", pool)
    for name, table in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
        what = "page ids" if name == "block_table" else "lengths"
        shapes.check_dtype(name, _stand_in(name, table).dtype, [int32], f"{what} are int32")
    layout = CacheLayout(num_pages, page_size, KV_LORA_RANK, QK_ROPE_HEAD_DIM, pool.dtype, None, False, None)
    for name in ("kv_lora_rank", "qk_rope_head_dim"):
        dims.bind(name, getattr(layout, name), "from the cache")
    rows = _stand_in("ckv", ckv), _stand_in("kpe", kpe)
    cache_checks.check_values(*rows, layout, dims, ("batch", "num_tokens"), None, empty=False)
    given = {"norm_weight": norm_weight, "rope_cos": rope_cos, "rope_sin": rope_sin}
    given = {name: array for name, array in given.items() if array is not None}
    transform = cache_checks.check_transform(
        layout,
        0,  # only the device knows positions
        None,
        norm_eps=norm_eps,
        rope_interleaved=rope_interleaved,
        **{name: _stand_in(name, array) for name, array in given.items()},
    )
    batch, num_tokens, _ = rows[0].shape
    spec = xla_targets.spec(
        kv_cache=whole.shape,
        layer=layer,
        dtype=pool.dtype.name,
        num_tokens=batch * num_tokens,
        normalises=norm_weight is not None,
        norm_eps=transform.norm_eps,
        rope_positions=0 if rope_cos is None else len(rope_cos),
        rope_interleaved=transform.rope_interleaved,
    )
    where = _slots_and_positions(jnp.asarray(block_table), jnp.asarray(cache_seqlens), num_tokens, num_pages, page_size)
    arguments = kv_cache, where, ckv, kpe, *given.values()
    result = (jax.ShapeDtypeStruct(whole.shape, whole.dtype),)
    (written,) = _call(xla_targets.APPEND, "append", spec, result, *arguments, in_place=True)
    return written


def _slots_and_positions(block_table: Any, cache_seqlens: Any, num_tokens: int, num_pages: int, page_size: int) -> Any:
    """Where the last tokens of each sequence go, as `NewTokens.where`: int64 ``[2, batch * num_tokens]``, each in two
    int32, low half first, since JAX has no int64 unless asked for."""
    lengths = jnp.maximum(cache_seqlens, 0)
    positions = lengths[:, None] - num_tokens + jnp.arange(num_tokens, dtype=jnp.int32)
    columns = positions // page_size
    max_pages = block_table.shape[1]
    pages = jnp.take_along_axis(block_table, jnp.clip(columns, 0, max_pages - 1), axis=1)
    exists = (positions >= 0) & (columns < max_pages) & (pages >= 0) & (pages < num_pages)
    slots = jnp.where(exists, pages, 0) * page_size + positions % page_size
    where = jnp.stack([jnp.where(exists, slots, -1), positions]).reshape(2, -1)
    return jnp.stack([where, where >> 31], axis=-1)


# ---- checks while tracing ------------------------------------------------------------------------------------------


def _stand_in(argument: str, array: Any) -> np.ndarray:
    """A NumPy array of the same shape and dtype, for checks that read metadata alone: there is no memory behind it."""
    if not isinstance(array, (jax.Array, np.ndarray)):
        raise TypeError(f"{argument}: got {type(array).__name__}, expected a JAX array")
    one = np.zeros(shapes.ALIGNMENT_BYTES, array.dtype)
    strides = np.cumprod([one.itemsize, *array.shape[:0:-1]])[::-1] if array.ndim else ()
    return np.lib.stride_tricks.as_strided(one, array.shape, strides, writeable=False)


def _layer_of(kv_cache: np.ndarray, layer: Any) -> tuple[np.ndarray, int | None]:
    """One layer's pool, and which it is."""
    if layer is None:
        return kv_cache, None
    index = shapes.check_count("layer", layer, minimum=0)
    dims = shapes.Dims()
    dims.match("kv_cache", kv_cache.shape, ("num_layers", "num_pages", "page_size", "num_kv_heads", "head_dim"))
    if index >= dims["num_layers"]:
        raise ValueError(f"layer: got {index}, expected below {dims['num_layers']} (num_layers from kv_cache)")
    return kv_cache[index], index


def _check_dtype(argument: str, array: np.ndarray) -> None:
    supported = (CPU_DTYPES, "supported in NumPy") if _gpu() is None else (GPU_DTYPES, "what the GPU kernels take")
    shapes.check_dtype(argument, array.dtype, *supported)


def _fields(plan: DecodePlan) -> dict[str, Any]:
    """What is static about a plan, by name."""
    names = (field.name for field in dataclasses.fields(plan))
    return {name: getattr(plan, name) for name in names if name not in ("work", "splits")}


def _gpu() -> int | None:
    """CUDA ordinal of JAX's default device; None where that is a CPU. While tracing, nothing better is known."""
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return device.local_hardware_id if device.platform == "gpu" else None


# ---- calls ---------------------------------------------------------------------------------------------------------


def _call(
    target: xla_targets.Target, name: str, spec: str, results: tuple[Any, ...], *arguments: Any, in_place: bool = False
) -> Any:
    """The custom call; its first argument and result share their memory if `in_place`."""
    if (device := _gpu()) is not None:
        target.prepare(spec.encode(), device)  # kernels are loaded, and refused, while tracing
    aliases = {0: 0} if in_place else {}
    call = jax.ffi.ffi_call(target.name, results, input_output_aliases=aliases)
    return _guarded(name, functools.partial(call, spec=spec))(*arguments)


def _guarded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, with an error that says what to do where JAX would batch or differentiate it."""
    batched = custom_vmap(call)
    differentiable = jax.custom_jvp(batched)

    @batched.def_vmap
    def batch(*_: Any) -> Any:
        raise NotImplementedError(
            f"mlacore.jax.{name} under jax.vmap: expected a call without vmap. Sequences are the leading axis of its "
            f"arguments already: give all of them to one call, in one block_table"
        )

    @differentiable.defjvp
    def differentiate(*_: Any) -> Any:
        raise NotImplementedError(
            f"mlacore.jax.{name} under jax.grad or jvp: expected inference only, as there is no derivative. Put "
            f"jax.lax.stop_gradient around its arguments where none is needed"
        )

    return differentiable


def _register() -> None:
    for target in (xla_targets.PLAN, xla_targets.DECODE, xla_targets.APPEND):
        on_gpu = xla_ffi.handler(target.on_gpu, on_gpu=True)
        on_cpu = xla_ffi.handler(target.on_cpu, on_gpu=False)
        for platform, address in (("CUDA", on_gpu), ("cpu", on_cpu)):
            jax.ffi.register_ffi_target(target.name, jax.ffi.pycapsule(address), platform=platform)


_register()
