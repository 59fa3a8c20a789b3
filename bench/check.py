"""A result against the float64 definition, before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from compare import LSE_RULE, OUT_RULES, assert_close

import mlacore
from bench.inputs import Inputs
from mlacore.params import HEAD_DIM_QK, HEAD_DIM_V, PAGE_SIZE

CHECK_FLOP = (
    4e9  # what the definition of one sequence may cost on the host; dearer ones are checked in part of the heads
)


class Reference(NamedTuple):
    """One sequence of a case's first set, in float64: out ``[s_q, heads, 512]``, lse ``[heads, s_q]``."""

    sequence: int
    heads: slice
    out: np.ndarray
    lse: np.ndarray


def references(inputs: Inputs) -> list[Reference]:
    """The first set's shortest, median and longest sequence; computed on the device where CuPy finds cuBLAS."""
    order = np.argsort(inputs.lengths, kind="stable")
    case, dtype = inputs.case, inputs.pool.dtype
    xp = _module(inputs.pool)
    results = []
    for sequence in dict.fromkeys(int(order[rank]) for rank in (0, len(order) // 2, -1)):
        length = int(inputs.lengths[sequence])
        flop = 2.0 * length * case.seq_len_q * case.num_heads * (HEAD_DIM_QK + HEAD_DIM_V)
        heads = slice(None, None, min(case.num_heads, math.ceil(flop / CHECK_FLOP)))
        pages = inputs.block_table[0][sequence, : -(-length // PAGE_SIZE)]
        q, latents = inputs.q[0].view(np.uint16)[sequence : sequence + 1, :, heads], inputs.pool.view(np.uint16)[pages]
        if xp is np:
            q, latents = to_host(q), to_host(latents)
        in_order = xp.arange(len(latents), dtype=np.int32)[None]
        q, latents = xp.ascontiguousarray(q).view(dtype), latents.view(dtype)
        out, lse = mlacore.mla_decode_reference(q, latents, in_order, np.array([length]), causal=case.causal)
        results.append(Reference(sequence, heads, to_host(out[0]), to_host(lse[0])))
    return results


def _module(array: Any) -> Any:
    """Where the definition is computed: ``cupy`` for an array on the device if its matrix product works, ``numpy``."""
    if isinstance(array, np.ndarray):
        return np
    import cupy

    try:
        cupy.matmul(cupy.ones((2, 2)), cupy.ones((2, 2)))
    except (ImportError, OSError, RuntimeError):  # no cuBLAS: CuPy loads it on first use and raises any of these
        return np
    return cupy


def check(
    inputs: Inputs, call: Callable[[], Any], expected: Sequence[Reference], synchronize: Callable[[], Any]
) -> dict[str, Any]:
    """Run our call on the first set and compare; the errors as JSON. `synchronize` waits for every stream.

    Raises
    ------
    AssertionError
        If an element is further off than the tests allow.
    """
    inputs.out[0].view(np.uint16).fill(0x7FFF)  # NaN
    inputs.lse[0].fill(math.nan)
    synchronize()
    call()
    synchronize()
    reports = []
    for sequence, heads, out, lse in expected:
        # Each sequence by itself: outputs shrink with the length, and a short one's would drown the others' errors.
        what = f"{inputs.case.id}: sequence {sequence} of {inputs.lengths[sequence]} tokens"
        got_out, got_lse = to_host(inputs.out[0][sequence])[:, heads], to_host(inputs.lse[0][sequence])[heads]
        assert_close(got_lse, lse, LSE_RULE, f"{what}: lse")
        reports.append(assert_close(got_out, out, OUT_RULES[inputs.case.dtype], f"{what}: out"))
    return {
        "sequences": len(reports),
        "max_abs": max(report.max_abs for report in reports),
        "relative_l2": max(report.relative_l2 for report in reports),
    }


def relative_l2(out: Any, expected: Sequence[Reference]) -> float:
    """The largest error of a peer's `out` ``[b, s_q, h_q, 512]``, relative to its sequence in the Euclidean norm."""
    errors = []
    for sequence, heads, reference, _ in expected:
        got = to_host(out[sequence])[:, heads].astype(np.float64)
        errors.append(float(np.linalg.norm(got - reference) / np.linalg.norm(reference)))
    return float(np.max(errors))  # NaN if one of them is


def to_host(array: Any) -> np.ndarray:
    """A CuPy or NumPy array in NumPy."""
    return array if isinstance(array, np.ndarray) else array.get()
