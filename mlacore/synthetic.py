"""Made-up latents and queries for the demo and the benches: normal values of deviation 0.1, on either backend."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mlacore.arrays import bfloat16

# Counter-based: splitmix64 of (seed, index), then Box-Muller. cuRAND is not among the dependencies, and a large
# pool is drawn at memory speed this way.
_NORMAL_CODE = """
unsigned long long x = seed * 0x9e3779b97f4a7c15ull + (unsigned long long)i * 0xd1342543de82ef95ull;
x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
x ^= x >> 31;
const float u = ((unsigned int)(x >> 40) + 0.5f) * 5.9604645e-8f;  // 2^-24; never 0
const float v = (unsigned int)(x & 0xffffffu) * 5.9604645e-8f;
const float value = scale * sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
"""
_STORE_FLOAT32 = "y = value;"
_STORE_BFLOAT16 = """
const unsigned int bits = __float_as_uint(value);
y = (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);  // round to nearest even; value is finite
"""


@functools.cache
def _normal_kernel(is_bfloat16: bool) -> Any:
    import cupy

    result, store = ("uint16", _STORE_BFLOAT16) if is_bfloat16 else ("float32", _STORE_FLOAT32)
    name = f"mlacore_normal_{result}"
    return cupy.ElementwiseKernel("uint64 seed, float32 scale", f"{result} y", _NORMAL_CODE + store, name)


def normal(shape: tuple[int, ...], *, seed: int, dtype: Any = np.float32, xp: Any = np, scale: float = 0.1) -> Any:
    """Normally distributed values, the same for the same seed on one backend (the backends draw different ones).

    Parameters
    ----------
    shape : tuple of int
        Shape of the result.
    seed : int
        At least 0.
    dtype : dtype
        Of the result; values are drawn in float32 and rounded.
    xp : module
        ``numpy``, or ``cupy`` to draw on the current device and stream.
    scale : float
        Standard deviation.

    Returns
    -------
    numpy.ndarray or cupy.ndarray
    """
    dtype = np.dtype(dtype)
    if xp is np:
        values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        values *= scale
        return values.astype(dtype, copy=False)
    # bfloat16 is rounded in the kernel: no float32 copy of a large pool on the way.
    values = xp.empty(shape, np.uint16 if dtype == bfloat16 else np.float32)
    _normal_kernel(dtype == bfloat16)(np.uint64(seed + 1), np.float32(scale), values)
    return values.view(dtype) if dtype == bfloat16 else values.astype(dtype, copy=False)
