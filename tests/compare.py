"""Comparison of results with the oracle: non-finite values first, then every element, then the whole.

An element passes if its absolute or its relative error is small; the cosine difference bounds the error of the whole.
The first rule is FlashMLA's; the others scale it by the precision of the output's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

CHUNK_ELEMS = 1 << 16  # compared at a time: ten times faster than whole outputs, whose temporaries leave the cache


@dataclass(frozen=True, slots=True)
class Rule:
    """What passes: per element an absolute or a relative error below the bound, in total a cosine difference."""

    abs_tol: float
    rel_tol: float
    cos_tol: float

    def scaled(self, factor: float) -> Rule:
        return Rule(self.abs_tol * factor, self.rel_tol * factor, self.cos_tol * factor)


OUT_RULE = Rule(abs_tol=8e-4, rel_tol=2.01 / 128, cos_tol=5e-6)
LSE_RULE = Rule(abs_tol=1e-6, rel_tol=8.01 / 65536, cos_tol=1e-7)
# float16 has 3 bits more than bfloat16. In float32 sums round, over thousands of terms, not elements: 2^-10 is ample.
OUT_RULES = {"bfloat16": OUT_RULE, "float16": OUT_RULE.scaled(2**-3), "float32": OUT_RULE.scaled(2**-10)}


@dataclass(frozen=True, slots=True)
class Report:
    """Outcome of a comparison; `str` of it says all that a failed test should."""

    is_close: bool
    reason: str
    num_elements: int
    num_bad: int
    max_abs: float
    max_rel: float
    cosine: float
    relative_l2: float
    worst_index: tuple[int, ...] | None
    worst_got: float
    worst_expected: float

    def __str__(self) -> str:
        return (
            f"{self.reason or 'close'}: {self.num_bad} of {self.num_elements} elements bad; "
            f"max abs {self.max_abs:.3e}, max rel {self.max_rel:.3e}, "
            f"cosine difference {self.cosine:.3e}, relative L2 {self.relative_l2:.3e}; "
            f"worst at {self.worst_index}: got {self.worst_got!r}, expected {self.worst_expected!r}"
        )


def compare(out: Any, ref: Any, abs_tol: float, rel_tol: float, cos_tol: float) -> Report:
    """Compare `out` with the float64 reference `ref`, NumPy or CuPy."""
    got, expected = _on_host(out), _on_host(ref)
    if got.shape != expected.shape:
        return _failed(f"shape {got.shape} instead of {expected.shape}", got.size, got.size)
    got_flat, expected_flat = got.reshape(-1), expected.reshape(-1)
    num_bad = num_differing = 0
    max_abs = max_rel = 0.0
    aa = ab = bb = ee = 0.0  # sums of squares and products: got, mixed, expected, error
    worst, worst_excess = 0, -1.0
    for begin in range(0, got.size, CHUNK_ELEMS):
        a = got_flat[begin : begin + CHUNK_ELEMS].astype(np.float64)
        b = expected_flat[begin : begin + CHUNK_ELEMS].astype(np.float64)
        is_finite = np.isfinite(b)
        if not (is_finite.all() and np.isfinite(a).all()):
            # Infinities and NaN have no error to measure; they must simply be the same ones in the same places.
            differs = ~((a == b) | (np.isnan(a) & np.isnan(b))) & ~(is_finite & np.isfinite(a))
            if differs.any():
                worst = worst if num_differing else begin + int(differs.argmax())
                num_differing += int(differs.sum())
            a, b = np.where(is_finite, a, 0.0), np.where(is_finite, b, 0.0)
        if num_differing:
            continue
        abs_error = np.abs(a - b)
        with np.errstate(divide="ignore", invalid="ignore"):
            rel_error = abs_error / np.abs(b)
        rel_error[abs_error == 0] = 0.0  # 0 / 0
        num_bad += int(((abs_error >= abs_tol) & (rel_error >= rel_tol)).sum())
        max_abs = max(max_abs, float(abs_error.max()))
        max_rel = max(max_rel, float(rel_error[b != 0].max(initial=0.0)))
        aa, ab, bb, ee = aa + _dot(a, a), ab + _dot(a, b), bb + _dot(b, b), ee + _dot(abs_error, abs_error)
        # The worst element is the one furthest past its bounds, not the one with the largest values.
        excess = np.minimum(abs_error / abs_tol, rel_error / rel_tol)
        if excess.max() > worst_excess:
            worst, worst_excess = begin + int(excess.argmax()), float(excess.max())
    index = tuple(int(i) for i in np.unravel_index(worst, got.shape))
    values = float(got[index]), float(expected[index])
    if num_differing:
        return _failed("non-finite values differ", got.size, num_differing, index, *values)
    cosine = 1 - 2 * ab / (aa + bb) if aa + bb else 0.0
    reason = "elements differ" if num_bad else "direction differs" if cosine > cos_tol else ""
    relative_l2 = math.sqrt(ee / bb) if bb else 0.0
    return Report(not reason, reason, got.size, num_bad, max_abs, max_rel, cosine, relative_l2, index, *values)


def assert_close(out: Any, ref: Any, rule: Rule, what: str = "out") -> Report:
    """Raise AssertionError with the whole report unless `out` passes `rule`."""
    report = compare(out, ref, rule.abs_tol, rule.rel_tol, rule.cos_tol)
    if not report.is_close:
        raise AssertionError(f"{what}: {report}")
    return report


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.einsum("i,i", a, b))  # not BLAS: its threads cost more than so short a product


def _on_host(array: Any) -> np.ndarray:
    return np.asarray(array.get() if hasattr(array, "get") else array)


def _failed(
    reason: str,
    num_elements: int,
    num_bad: int,
    worst: tuple[int, ...] | None = None,
    got: float = np.nan,
    expected: float = np.nan,
) -> Report:
    """A report on results that have no errors to measure."""
    return Report(False, reason, num_elements, num_bad, np.nan, np.nan, np.nan, np.nan, worst, got, expected)
