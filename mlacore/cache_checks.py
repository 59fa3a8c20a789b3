"""What `PagedKVCache` asks of its arguments, worded as in `mlacore.shapes`: argument, got, expected, where from.

Every check comes before anything changes. Values are looked at only on the host: sequences and numbers of tokens.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlacore import arrays, shapes
from mlacore.params import KV_LORA_RANK, PAGE_SIZE, QK_ROPE_HEAD_DIM

_INT32_MAX, _INT64_MAX = 2**31 - 1, 2**63 - 1


@dataclass(frozen=True, slots=True)
class RowFormat:
    """What a cache holds of a token, and where: a CUDA ordinal, or None for NumPy."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    dtype: np.dtype
    device: int | None

    def dims(self) -> shapes.Dims:
        """Sizes for the checks of one call, with the widths of this format bound."""
        dims = shapes.Dims()
        dims.bind("kv_lora_rank", self.kv_lora_rank, "from the cache")
        dims.bind("qk_rope_head_dim", self.qk_rope_head_dim, "from the cache")
        return dims


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


def check_kernels_fit(page_size: int, row_format: RowFormat) -> None:
    """Raise TypeError or ValueError unless the GPU kernels take pages and rows like these."""
    if row_format.dtype not in arrays.GPU_DTYPES:
        raise TypeError(f"dtype: got {row_format.dtype.name}, expected bfloat16 or float16 (what the GPU kernels take)")
    for name, size, expected in (
        ("page_size", page_size, PAGE_SIZE),
        ("kv_lora_rank", row_format.kv_lora_rank, KV_LORA_RANK),
        ("qk_rope_head_dim", row_format.qk_rope_head_dim, QK_ROPE_HEAD_DIM),
    ):
        if size != expected:
            raise ValueError(f"{name}: got {size}, expected {expected} (what the GPU kernels take)")


# ---- sequences and numbers of tokens -------------------------------------------------------------------------------


def check_seqs(seqs: Any, alive: np.ndarray) -> np.ndarray:
    """`seqs` as rows of the table, distinct and alive."""
    rows = _host_integers("seqs", seqs)
    if rows.ndim != 1:
        raise ValueError(f"seqs: got shape {rows.shape}, expected (num_seqs,)")
    lives = (rows >= 0) & (rows < len(alive))
    lives[lives] = alive[rows[lives]]
    if not lives.all():
        i = int(np.argmin(lives))
        raise ValueError(f"seqs: got {rows[i]} at {i}, expected a live sequence (from allocate, not freed since)")
    named = np.bincount(rows, minlength=1)
    if named.max() > 1:
        raise ValueError(f"seqs: got {np.argmax(named)} {named.max()} times, expected distinct sequences")
    return rows


def check_counts(rows: np.ndarray, num_tokens: Any) -> np.ndarray:
    """`num_tokens` as one number for each row, none negative."""
    counts = _host_integers("num_tokens", num_tokens)
    if counts.shape not in ((), rows.shape):
        raise ValueError(
            f"num_tokens: got shape {counts.shape}, expected (num_seqs,) with num_seqs={len(rows)} (from seqs)"
        )
    counts = np.broadcast_to(counts, rows.shape)
    if np.any(counts < 0):
        i = int(np.argmin(counts))
        raise ValueError(f"num_tokens: got {counts[i]} for sequence {rows[i]}, expected at least 0")
    return counts


def _host_integers(argument: str, values: Any) -> np.ndarray:
    """`values` as int64; TypeError unless integers on the host (a GPU array would have to be waited for)."""
    if arrays.is_gpu(values):
        raise TypeError(f"{argument}: got a GPU array, expected integers on the host (where the books are kept)")
    try:
        integers = np.asarray(values)
    except ValueError as error:  # parts of unequal length
        raise ValueError(f"{argument}: got {reprlib.repr(values)}, expected integers along one axis") from error
    if integers.size and integers.dtype.kind not in "iu":
        raise TypeError(f"{argument}: got dtype {integers.dtype}, expected integers")
    if integers.dtype == np.uint64 and integers.max(initial=0) > _INT64_MAX:
        raise ValueError(f"{argument}: got {integers.max()}, expected at most {_INT64_MAX} (an int64)")
    return integers.astype(np.int64)


# ---- arrays of tokens ----------------------------------------------------------------------------------------------


def bind_tokens(dims: shapes.Dims, rows: np.ndarray, ckv: Any, num_tokens: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """The number of tokens for each row and the axes in front of a token's values, which are bound in `dims`."""
    dims.bind("num_seqs", len(rows), "from seqs")
    if num_tokens is not None:
        counts = check_counts(rows, num_tokens)
        dims.bind("total_tokens", int(counts.sum()), "the sum of num_tokens")
        return counts, ("total_tokens",)
    shape = tuple(getattr(ckv, "shape", ()))
    each = shape[1] if len(shape) == 3 else 1  # another rank fails in check_values
    return check_counts(rows, each), ("num_seqs", "num_tokens")


def check_slots(slots: Any, row_format: RowFormat, dims: shapes.Dims, stream: Any) -> Any:
    """`slots` on the cache's device, their number bound in `dims`."""
    slots = _on_cache_device("slots", slots, row_format.device, stream)
    shapes.check_dtype("slots", slots.dtype, (np.dtype(np.int64),), "from extend")
    shapes.check_contiguous("slots", slots)
    dims.match("slots", slots.shape, ("num_tokens",), minimum=0)
    return slots


def check_values(
    ckv: Any,
    kpe: Any,
    row_format: RowFormat,
    dims: shapes.Dims,
    leading: tuple[str, ...],
    stream: Any,
    *,
    empty: bool,
) -> tuple[Any, Any]:
    """Latents and RoPE keys of the same tokens: device, shape, dtype, and rows that a GPU can load.

    Where there are no tokens (`empty`), sizes may be 0 and there is no row to load.
    """
    checked = []
    for argument, array, width in (("ckv", ckv, "kv_lora_rank"), ("kpe", kpe, "qk_rope_head_dim")):
        array = _on_cache_device(argument, array, row_format.device, stream)
        dims.match(argument, array.shape, (*leading, width), minimum=0 if empty else 1)
        shapes.check_dtype(argument, array.dtype, (row_format.dtype,), "from the cache")
        if not empty:
            shapes.check_rows(argument, array)
        checked.append(array)
    return checked[0], checked[1]


def _on_cache_device(argument: str, array: Any, device: int | None, stream: Any) -> Any:
    """`array` as a NumPy or CuPy array, whichever the cache is made of."""
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
