"""What `PagedKVCache` asks of its arguments, worded as in `mlacore.shapes`: argument, got, expected, where from.

Every check comes before anything changes. Values are looked at only on the host: sequences and numbers of tokens.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlacore import arrays, shapes
from mlacore.cache_layout import PLAIN, CacheLayout, NewTokens, RowTransform, StepTokens
from mlacore.params import KV_LORA_RANK, PAGE_SIZES, QK_ROPE_HEAD_DIM

_INT32_MAX, _INT64_MAX = 2**31 - 1, 2**63 - 1


# ---- the constructor's ---------------------------------------------------------------------------------------------


def check_int32_count(argument: str, value: Any) -> int:
    """`value` as an int that is at least 1 and fits an int32."""
    count = shapes.check_count(argument, value)
    if count > _INT32_MAX:
        raise ValueError(f"{argument}: got {count}, expected at most {_INT32_MAX} (an int32)")
    return count


def resolve_device(device: Any) -> int | None:
    """CUDA ordinal of a Hopper GPU, or None for NumPy.

    Raises
    ------
    ValueError
        If `device` names none.
    RuntimeError
        If it names a GPU that is not there, or one that is not a Hopper GPU.
    """
    if device == "cpu":
        return None
    from mlacore import driver

    hopper = driver.hopper_devices()
    if device is None and not hopper:
        return None
    if device is None or device == "cuda":
        ordinal = int(arrays.import_cupy().cuda.Device().id) if hopper else 0
        if device is None and ordinal not in hopper:
            ordinal = hopper[0]
    elif isinstance(device, str) and device.startswith("cuda:") and device[5:].isdecimal():
        ordinal = int(device[5:])
    elif isinstance(device, int) and not isinstance(device, bool) and device >= 0:
        ordinal = device
    else:
        raise ValueError(f"device: got {device!r}, expected 'cpu', 'cuda', 'cuda:<ordinal>', an ordinal or None")
    try:
        driver.require_hopper(ordinal)
    except RuntimeError as error:
        raise RuntimeError(
            f"device: got {device!r} and found {_found(ordinal)}, expected a Hopper GPU (H100, H200, H800, H20); "
            f'device="cpu" works without one, and `python -m mlacore info` tells more'
        ) from error
    return ordinal


def _found(ordinal: int) -> str:
    """The GPU of that ordinal, in words."""
    from mlacore import driver

    try:
        major, minor = driver.compute_capability(ordinal)
        return f"{driver.device_name(ordinal)} (device {ordinal}, compute capability {major}.{minor})"
    except RuntimeError:
        return f"no CUDA device {ordinal}"


def check_kernels_fit(layout: CacheLayout) -> None:
    """Raise TypeError or ValueError unless the GPU kernels take pages and rows like these."""
    if layout.dtype not in arrays.GPU_DTYPES:
        raise TypeError(f"dtype: got {layout.dtype.name}, expected bfloat16 or float16 (what the GPU kernels take)")
    for name, size, expected in (
        ("page_size", layout.page_size, PAGE_SIZES),
        ("kv_lora_rank", layout.kv_lora_rank, (KV_LORA_RANK,)),
        ("qk_rope_head_dim", layout.qk_rope_head_dim, (QK_ROPE_HEAD_DIM,)),
    ):
        if size not in expected:
            allowed = ", ".join(map(str, expected))
            raise ValueError(f"{name}: got {size}, expected {allowed} (what the GPU kernels take)")


# ---- sequences and numbers of tokens -------------------------------------------------------------------------------


def check_seqs(seqs: Any, alive: np.ndarray, *, distinct: bool = True) -> np.ndarray:
    """`seqs` as rows of the table, alive and, unless they may repeat, distinct."""
    rows = _host_integers("seqs", seqs)
    if rows.ndim != 1:
        raise ValueError(f"seqs: got shape {rows.shape}, expected (num_seqs,)")
    if not len(rows):
        return rows
    # As unsigned numbers, negative ones are too large.
    if rows.view(np.uint64).max() >= len(alive) or not alive.take(rows).all():
        lives = (rows >= 0) & (rows < len(alive))
        lives[lives] = alive[rows[lives]]
        i = int(np.argmin(lives))
        raise ValueError(f"seqs: got {rows[i]} at {i}, expected a live sequence (from create or fork, not freed since)")
    if distinct and len(rows) > 1:
        named = np.bincount(rows)
        if named.max() > 1:
            raise ValueError(f"seqs: got {np.argmax(named)} {named.max()} times, expected distinct sequences")
    return rows


def check_counts(rows: np.ndarray, num_tokens: Any) -> np.ndarray | int:
    """`num_tokens` as one number for each row, or one for all, none negative."""
    if type(num_tokens) is int and 0 <= num_tokens <= _INT64_MAX:
        # As in most calls; to make it an array for the checks below would take them longer.
        return num_tokens if len(rows) else 0
    counts = _host_integers("num_tokens", num_tokens)
    if counts.shape not in ((), rows.shape):
        raise ValueError(
            f"num_tokens: got shape {counts.shape}, expected (num_seqs,) with num_seqs={len(rows)} (from seqs)"
        )
    if counts.size and counts.min() < 0 and len(rows):
        i = int(np.argmin(counts))
        raise ValueError(f"num_tokens: got {counts.flat[i]} for sequence {rows[i]}, expected at least 0")
    return counts if counts.ndim else int(counts)


def check_lengths(rows: np.ndarray, lengths: Any, seq_lens: np.ndarray) -> np.ndarray:
    """`lengths` as one for each row, none above the row's own."""
    kept = _host_integers("lengths", lengths)
    if kept.shape not in ((), rows.shape):
        raise ValueError(f"lengths: got shape {kept.shape}, expected (num_seqs,) with num_seqs={len(rows)} (from seqs)")
    kept = np.full(rows.shape, kept) if kept.ndim == 0 else kept
    wrong = (kept < 0) | (kept > seq_lens[rows])
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"lengths: got {kept[i]} for sequence {rows[i]}, expected 0 to {seq_lens[rows[i]]} (the tokens it holds)"
        )
    return kept


def check_prompts(lengths: np.ndarray, num_ids: Sequence[int], max_seq_len: int) -> None:
    """ValueError unless prompts of `lengths` tokens fit, and hold the `num_ids` tokens that their prefixes name."""
    for i, (length, ids) in enumerate(zip(lengths.tolist(), num_ids, strict=False)):
        if length < ids:
            raise ValueError(
                f"num_tokens: got {length} for prompt {i}, expected at least {ids} (the ids in prefix[{i}])"
            )
    if lengths.max(initial=0) > max_seq_len:
        i = int(np.argmax(lengths))
        raise ValueError(f"num_tokens: got {lengths[i]} for prompt {i}, expected at most max_seq_len={max_seq_len}")


def _host_integers(argument: str, values: Any) -> np.ndarray:
    """`values` as int64; TypeError unless integers on the host (a GPU array would have to be waited for)."""
    if arrays.is_gpu(values):
        raise TypeError(f"{argument}: got a GPU array, expected integers on the host (where the books are kept)")
    try:
        integers = np.asarray(values)
    except ValueError as error:  # parts of unequal length
        raise ValueError(f"{argument}: got {reprlib.repr(values)}, expected integers along one axis") from error
    if integers.dtype == np.int64:
        return integers
    if integers.size and integers.dtype.kind not in "iu":
        raise TypeError(f"{argument}: got dtype {integers.dtype}, expected integers")
    if integers.dtype == np.uint64 and integers.max(initial=0) > _INT64_MAX:
        raise ValueError(f"{argument}: got {integers.max()}, expected at most {_INT64_MAX} (an int64)")
    return integers.astype(np.int64, copy=False)


# ---- arrays of tokens ----------------------------------------------------------------------------------------------


def bind_tokens(
    dims: shapes.Dims, rows: np.ndarray, ckv: Any, num_tokens: Any
) -> tuple[np.ndarray | int, int, tuple[str, ...]]:
    """The number of tokens for each row, of all of them, and the axes in front of a token's values, which are bound in
    `dims`."""
    dims.bind("num_seqs", len(rows), "from seqs")
    if num_tokens is None:
        shape = tuple(getattr(ckv, "shape", ()))
        each = shape[1] if len(shape) == 3 else 1  # another rank fails in check_values
        return each, each * len(rows), ("num_seqs", "num_tokens")
    counts = check_counts(rows, num_tokens)
    total = counts * len(rows) if isinstance(counts, int) else int(counts.sum())
    dims.bind("total_tokens", total, "the sum of num_tokens")
    return counts, total, ("total_tokens",)


def check_tokens(tokens: Any, layout: CacheLayout, dims: shapes.Dims) -> NewTokens:
    """`tokens` that a cache like this one has made, their number bound in `dims`."""
    if not isinstance(tokens, NewTokens):
        raise TypeError(
            f"tokens: got {type(tokens).__name__}, expected NewTokens (from create, extend, append or step_tokens)"
        )
    got = arrays.device_of(tokens.where)
    if got != layout.device:
        raise ValueError(
            f"tokens: got tokens on {arrays.device_name(got)}, expected {arrays.device_name(layout.device)} "
            f"(from the cache)"
        )
    dims.bind("num_tokens", len(tokens), "from tokens")
    return tokens


def check_step(tokens: Any, layout: CacheLayout) -> StepTokens:
    """`tokens` of a step that a cache like this one has made."""
    if not isinstance(tokens, StepTokens):
        raise TypeError(f"tokens: got {type(tokens).__name__}, expected StepTokens (from step_tokens)")
    check_tokens(tokens, layout, layout.dims())
    return tokens


def check_layer(layer: Any, layout: CacheLayout) -> int:
    """`layer` as an int below the number of layers."""
    count = layout.num_layers or 1
    index = shapes.check_count("layer", layer, minimum=0)
    if index >= count:
        raise ValueError(f"layer: got {index}, expected below {count} (num_layers of the cache)")
    return index


def check_values(
    ckv: Any,
    kpe: Any,
    layout: CacheLayout,
    dims: shapes.Dims,
    leading: tuple[str, ...],
    stream: Any,
    *,
    empty: bool,
) -> tuple[Any, Any]:
    """Latents and RoPE keys of the same tokens: device, shape, dtype, and rows that a GPU can load.

    Where there are no tokens (`empty`), sizes may be 0 and there is no row to load.
    """
    ckv = _on_cache_device("ckv", ckv, layout.device, stream)
    kpe = _on_cache_device("kpe", kpe, layout.device, stream)
    # Step after step brings the same shapes; once they have passed, only addresses can be wrong.
    seen = (
        empty,
        layout,
        leading,
        dims[leading[0]],
        ckv.shape,
        ckv.strides,
        ckv.dtype,
        kpe.shape,
        kpe.strides,
        kpe.dtype,
    )
    if seen in _passed and (shapes.address_of(ckv) | shapes.address_of(kpe)) % shapes.ALIGNMENT_BYTES == 0:
        return ckv, kpe
    for argument, array, width in (("ckv", ckv, "kv_lora_rank"), ("kpe", kpe, "qk_rope_head_dim")):
        dims.match(argument, array.shape, (*leading, width), minimum=0 if empty else 1)
        shapes.check_dtype(argument, array.dtype, (layout.dtype,), "from the cache")
        if not empty:
            shapes.check_rows(argument, array)
    if len(_passed) >= _MOST_PASSED:
        _passed.clear()
    _passed.add(seen)
    return ckv, kpe


_passed: set[tuple[Any, ...]] = set()
_MOST_PASSED = 1024


def _on_cache_device(argument: str, array: Any, device: int | None, stream: Any) -> Any:
    """`array` as a NumPy or CuPy array, whichever the cache is made of."""
    if arrays.is_cupy(array) and array.data.device_id == device:
        return array
    if not (arrays.is_numpy(array) if device is None else arrays.is_gpu(array)):
        kind = "NumPy" if device is None else "GPU"
        raise TypeError(
            f"{argument}: got {type(array).__module__}.{type(array).__name__}, expected a {kind} array "
            f"(the cache is on {arrays.device_name(device)})"
        )
    if device is None:
        return array
    array = arrays.to_device(argument, array, stream)
    if arrays.device_of(array) != device:
        raise ValueError(
            f"{argument}: got an array on {arrays.device_name(arrays.device_of(array))}, "
            f"expected {arrays.device_name(device)} (from the cache)"
        )
    return array


# ---- what happens to rows ------------------------------------------------------------------------------------------


def check_transform(
    layout: CacheLayout,
    end: int,
    stream: Any,
    *,
    norm_weight: Any = None,
    norm_eps: Any = 1e-6,
    rope_cos: Any = None,
    rope_sin: Any = None,
    rope_interleaved: Any = True,
) -> RowTransform:
    """The options of `PagedKVCache.write` for tokens at positions below `end`."""
    if norm_weight is None and rope_cos is None and rope_sin is None:
        return PLAIN
    dims = layout.dims()
    if norm_weight is not None:
        norm_weight = _on_cache_device("norm_weight", norm_weight, layout.device, stream)
        dims.match("norm_weight", norm_weight.shape, ("kv_lora_rank",))
        shapes.check_dtype("norm_weight", norm_weight.dtype, (layout.dtype,), "from the cache")
        shapes.check_rows("norm_weight", norm_weight)
    if not isinstance(norm_eps, numbers.Real) or not 0 <= float(norm_eps) < math.inf:
        raise ValueError(f"norm_eps: got {norm_eps!r}, expected a finite number of at least 0")
    if (rope_cos is None) != (rope_sin is None):
        missing, given = ("rope_cos", "rope_sin") if rope_cos is None else ("rope_sin", "rope_cos")
        raise ValueError(f"{missing}: got None, expected a table (as {given} is given)")
    if rope_cos is not None:
        if layout.qk_rope_head_dim % 2:
            raise ValueError(f"rope_cos: got a table, expected None with qk_rope_head_dim={layout.qk_rope_head_dim}")
        dims.bind("pairs", layout.qk_rope_head_dim // 2, "qk_rope_head_dim / 2 of the cache")
        tables = []
        for argument, table in (("rope_cos", rope_cos), ("rope_sin", rope_sin)):
            table = _on_cache_device(argument, table, layout.device, stream)
            dims.match(argument, table.shape, ("positions", "pairs"))
            shapes.check_dtype(argument, table.dtype, (arrays.float32,), "rotations are float32")
            shapes.check_contiguous(argument, table)
            tables.append(table)
        rope_cos, rope_sin = tables
        if len(rope_cos) < end:
            raise ValueError(
                f"rope_cos: got {len(rope_cos)} positions, expected at least {end} (one past the last new token's)"
            )
    interleaved = shapes.check_bool("rope_interleaved", rope_interleaved)
    return RowTransform(norm_weight, float(norm_eps), rope_cos, rope_sin, interleaved)


# ---- token ids -----------------------------------------------------------------------------------------------------


def check_prefix(prefix: Any, num_seqs: int) -> list[np.ndarray]:
    """`prefix` as token ids of `num_seqs` sequences."""
    if isinstance(prefix, (str, bytes)) or not isinstance(prefix, (Sequence, np.ndarray)):
        raise TypeError(f"prefix: got {type(prefix).__name__}, expected token ids for each sequence")
    if len(prefix) != num_seqs:
        raise ValueError(f"prefix: got token ids of {len(prefix)} sequences, expected {num_seqs} (from num_seqs)")
    return [check_token_ids(f"prefix[{i}]", ids) for i, ids in enumerate(prefix)]


def check_token_ids(argument: str, token_ids: Any) -> np.ndarray:
    """`token_ids` as int64 ``[n]``."""
    ids = _host_integers(argument, token_ids)
    if ids.ndim != 1:
        raise ValueError(f"{argument}: got shape {ids.shape}, expected (num_tokens,)")
    return ids
