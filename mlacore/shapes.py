"""Checks of shapes, dtypes, strides and scalars, from metadata alone, all worded alike.

Every message reads *argument: got what came, expected what was wanted (where the expectation comes from)*. Nothing here
looks at an array's values, so the checks cost the same on either backend and never wait for a device.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

LOG2_E = math.log2(math.e)
ALIGNMENT_BYTES = 16  # of addresses and strides: what TMA and 16-byte loads take


class Dims:
    """Symbolic dimensions of one call: bound where first seen, compared from then on.

    Examples
    --------
    >>> dims = Dims()
    >>> dims.match("cache_seqlens", (3,), ("batch",))
    >>> dims.match("block_table", (4, 7), ("batch", "max_pages"))
    Traceback (most recent call last):
    ValueError: block_table: got shape (4, 7), expected (batch, max_pages) with batch=3 (from cache_seqlens)
    """

    __slots__ = ("_bound",)

    def __init__(self) -> None:
        self._bound: dict[str, tuple[int, str]] = {}

    def __getitem__(self, name: str) -> int:
        return self._bound[name][0]

    def source(self, name: str) -> str:
        """Where the size of `name` comes from."""
        return self._bound[name][1]

    def bind(self, name: str, size: int, source: str) -> None:
        """Fix `name` to `size` before any array shows it; `source` says why, as in "from the plan"."""
        self._bound[name] = (size, source)

    def match(self, argument: str, shape: Sequence[int], pattern: Sequence[str | int], minimum: int = 1) -> None:
        """Match `shape` against names and literal sizes, and bind the names seen for the first time.

        Raises
        ------
        ValueError
            If the rank differs, a size differs from a literal or from what its name is bound to, or is below
            `minimum`.
        """
        sizes = dict(self._bound)
        fits = len(shape) == len(pattern)
        for size, name in zip(shape, pattern, strict=False):
            if isinstance(name, str):
                expected = sizes.setdefault(name, (size, f"from {argument}"))[0]
            else:
                expected = name
            fits &= size == expected and size >= minimum
        if not fits:
            small = len(shape) == len(pattern) and min(shape) < minimum
            least = f", every size at least {minimum}" if small else ""
            raise ValueError(f"{argument}: got shape {tuple(shape)}, expected {self._describe(pattern)}{least}")
        self._bound = sizes

    def _describe(self, pattern: Sequence[str | int]) -> str:
        body = ", ".join(map(str, pattern)) + ("," if len(pattern) == 1 else "")
        known = [f"{n}={self._bound[n][0]} ({self._bound[n][1]})" for n in map(str, pattern) if n in self._bound]
        return f"({body})" + (" with " + ", ".join(known) if known else "")


def check_dtype(argument: str, dtype: Any, allowed: Sequence[Any], source: str) -> None:
    """Raise TypeError unless `dtype` is among `allowed`; `source` says where the expectation comes from."""
    if dtype not in allowed:
        names = " or ".join(np.dtype(a).name for a in allowed)
        raise TypeError(f"{argument}: got dtype {dtype}, expected {names} ({source})")


def check_contiguous(argument: str, array: Any) -> None:
    """Raise ValueError unless `array` is C-contiguous."""
    if not array.flags.c_contiguous:
        raise ValueError(f"{argument}: got strides {array.strides} bytes, expected a C-contiguous array")


def check_last_axis(argument: str, array: Any) -> None:
    """Raise ValueError unless the last axis is contiguous and no other stride is negative; other strides are free."""
    *outer, last = zip(array.shape, array.strides, strict=True)
    if (last[0] > 1 and last[1] != array.dtype.itemsize) or any(n > 1 and stride < 0 for n, stride in outer):
        raise ValueError(
            f"{argument}: got strides {array.strides} bytes, expected the last axis contiguous "
            f"({array.dtype.itemsize} bytes) and no negative stride"
        )


def check_rows(argument: str, array: Any) -> None:
    """Raise ValueError unless rows (the last axis) are contiguous and begin on multiples of 16 bytes.

    Strides of axes of length 1 are never used and may be anything.
    """
    *outer, last = array.strides
    is_aligned = all(stride >= 0 and stride % ALIGNMENT_BYTES == 0 for stride in outer)
    if is_aligned and last == array.dtype.itemsize and address_of(array) % ALIGNMENT_BYTES == 0:
        return  # what nearly every call brings; the rest is for others, and for the wording
    check_last_axis(argument, array)
    if any(n > 1 and stride % ALIGNMENT_BYTES for n, stride in zip(array.shape[:-1], array.strides, strict=False)):
        raise ValueError(
            f"{argument}: got strides {array.strides} bytes, expected multiples of {ALIGNMENT_BYTES} bytes but for the "
            f"last axis (the kernels load 16 bytes at a time)"
        )
    address = address_of(array)
    if address % ALIGNMENT_BYTES:
        raise ValueError(
            f"{argument}: got address {address:#x}, expected a multiple of {ALIGNMENT_BYTES} bytes "
            f"(the kernels load 16 bytes at a time)"
        )


def address_of(array: Any) -> int:
    """Address of the first element of a NumPy or CuPy array, in bytes."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def check_count(argument: str, value: Any, minimum: int = 1) -> int:
    """`value` as an int; TypeError unless it is an integer, ValueError below `minimum`."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument}: got {type(value).__name__} {value!r}, expected an integer") from None
    if count < minimum:
        raise ValueError(f"{argument}: got {count}, expected at least {minimum}")
    return count


def resolve_scale(softmax_scale: Any, head_dim: int) -> float:
    """The softmax scale, ``head_dim ** -0.5`` for None; TypeError unless a number, ValueError unless usable.

    Usable means finite and > 0, as given and as the float32 that kernels multiply by (``scale * log2(e)``).
    """
    if softmax_scale is None:
        return head_dim**-0.5
    if not isinstance(softmax_scale, numbers.Real) or isinstance(softmax_scale, bool):
        raise TypeError(f"softmax_scale: got {type(softmax_scale).__name__}, expected a number or None")
    scale = float(softmax_scale)
    with np.errstate(over="ignore", under="ignore"):
        in_kernel = float(np.float32(scale * LOG2_E))
    if not (0.0 < in_kernel < math.inf):
        raise ValueError(
            f"softmax_scale: got {scale!r}, expected a finite float32 > 0 (the default is {head_dim}**-0.5)"
        )
    return scale


def check_bool(argument: str, value: Any) -> bool:
    """`value` as a bool; TypeError unless it is one."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{argument}: got {type(value).__name__}, expected a bool")
    return bool(value)
