"""The self-test behind ``mlacore check``: results against float64 on this machine, then speed against its floor."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

import mlacore
from mlacore import arrays, ceilings, info
from mlacore.params import HEAD_DIM_QK, HEAD_DIM_V, KV_LORA_RANK, PAGE_SIZE
from mlacore.synthetic import normal

# Relative L2 of a sequence's output; rounding it to bfloat16 alone gives 1.7e-3, to float16 an eighth of that.
ERROR_LIMITS = {"bfloat16": 5e-3, "float16": 6.25e-4, "float32": 1e-5}
LSE_LIMIT = 1e-4
LOW_SHARE = 0.5  # of floor; below it the report asks what else runs on the GPU
NAN_BITS = 0x7FFF  # in either 16-bit dtype


@dataclass(frozen=True, slots=True)
class Check:
    """One decode over sequences of these lengths. `is_bounded` tells the plan the longest one."""

    what: str
    num_heads: int
    lengths: tuple[int, ...]
    seq_len_q: int = 1
    causal: bool = False
    page_size: int = PAGE_SIZE
    dtype: str = "bfloat16"
    is_bounded: bool = False


# Together they go through every kernel shape of `mlacore.dispatch`, split sequences and empty ones included.
GPU_CHECKS = (
    Check("128 heads", 128, (1, 63, 64, 65, 1000, 4096, 0)),
    Check("128 heads, 2 query tokens", 128, (2, 700, 129), seq_len_q=2, causal=True),
    Check("128 heads, one short sequence", 128, (3000,), is_bounded=True),
    Check("128 heads, sequences not so short", 128, (5000, 90, 3000), is_bounded=True),
    Check("64 heads, pages of 16", 64, (1, 17, 2500), page_size=16, dtype="float16"),
    Check("64 heads, one short sequence", 64, (2000,), is_bounded=True),
    Check("24 heads, pages of 256", 24, (255, 256, 257, 3000), page_size=256),
    Check("16 heads, one long sequence", 16, (30000,)),
    Check("16 heads, 4 query tokens", 16, (4, 800), seq_len_q=4, causal=True),
    Check("8 heads", 8, (1, 0, 5000), dtype="float16"),
)
CPU_CHECKS = (
    Check("16 heads", 16, (1, 63, 64, 65, 1000, 0)),
    Check("128 heads, 2 query tokens", 128, (2, 700), seq_len_q=2, causal=True),
    Check("24 heads, pages of 16", 24, (17, 900), page_size=16, dtype="float16"),
    Check("4 heads, pages of 256", 4, (255, 3000), page_size=256, dtype="float32"),
)
TIMED = ((128, 64, 8192), (16, 64, 8192))  # heads, batch, tokens


@dataclass(frozen=True, slots=True)
class Found:
    """Largest errors of one check, and whether a second call gave the same bits."""

    error: float
    lse_error: float
    is_repeatable: bool
    limit: float

    @property
    def passes(self) -> bool:
        # NaN compares as false.
        return self.error < self.limit and self.lse_error < LSE_LIMIT and self.is_repeatable


def run(*, device: str = "auto", seed: int = 0) -> int:
    """Check this machine and print a verdict.

    Parameters
    ----------
    device : {"auto", "gpu", "cpu"}
        "auto" takes the GPU where the kernels can run, and says why where they cannot.
    seed : int
        Of the data, at least 0.

    Returns
    -------
    int
        Exit status: 0, or 1 if a check failed, or the GPU was asked for and cannot serve.
    """
    started = time.perf_counter()
    missing = [] if device == "cpu" else info.problems(info.collect())
    if device == "gpu" and missing:
        print("FAILED: the GPU cannot be used here:", *missing, sep="\n  - ")
        return 1
    if missing:
        print("No GPU is checked, only the NumPy backend: the GPU cannot be used here:", *missing, sep="\n  - ")
    is_gpu = device != "cpu" and not missing
    xp, checks, name = (
        (arrays.import_cupy(), GPU_CHECKS, "SM90 kernels") if is_gpu else (np, CPU_CHECKS, "NumPy backend")
    )

    failed, worst = [], 0.0
    print(f"{name} against float64 (relative L2 error of the output, error of lse):", flush=True)
    for check in checks:
        try:
            found = measure(check, xp, seed)
        except Exception as error:  # reported as a failure; the other checks still tell something
            failed.append(check.what)
            print(f"  FAILED  {check.what}: {type(error).__name__}: {error}", flush=True)
            continue
        worst = max(worst, found.error / found.limit)
        if not found.passes:
            failed.append(check.what)
        verdict = "ok    " if found.passes else "FAILED"
        changed = "" if found.is_repeatable else "; a second call gave OTHER BITS"
        print(
            f"  {verdict}  {check.what}, {check.dtype}: {found.error:.1e} (limit {found.limit:.1e}), "
            f"{found.lse_error:.0e}{changed}",
            flush=True,
        )
    shares: list[str] = []
    if is_gpu and not failed:
        shares = _speed(xp, seed)
    seconds = time.perf_counter() - started
    if failed:
        print(f"FAILED: {len(failed)} of {len(checks)} checks on the {name}: {'; '.join(failed)}")
        return 1
    speed = f"; share of floor {', '.join(shares)}" if shares else ""
    print(
        f"PASSED on the {name}: {len(checks)} checks, errors up to {worst:.0%} of their limits{speed}; {seconds:.0f} s"
    )
    return 0


def measure(check: Check, xp: Any, seed: int) -> Found:
    """Run one check on the backend of `xp` (``numpy`` or ``cupy``)."""
    dtype, batch = arrays.as_dtype(check.dtype), len(check.lengths)
    num_tokens = sum(check.lengths)
    rows = normal((num_tokens, HEAD_DIM_QK), seed=seed, dtype=dtype, xp=xp, scale=1.0)
    q = normal((batch, check.seq_len_q, check.num_heads, HEAD_DIM_QK), seed=seed + 1, dtype=dtype, xp=xp, scale=1.0)
    cache = mlacore.PagedKVCache(
        sum(-(-length // check.page_size) for length in check.lengths) + 1,
        check.page_size,
        dtype=dtype,
        max_seqs=batch,
        max_seq_len=max(check.lengths),
        device="cpu" if xp is np else "cuda",
    )
    if dtype.itemsize == 2:
        cache.pool.view(np.uint16)[...] = NAN_BITS  # what was never written must not be read
    seqs = cache.create(batch).seqs
    cache.append(seqs, rows[:, :KV_LORA_RANK], rows[:, KV_LORA_RANK:], num_tokens=list(check.lengths))
    tables = cache.batch(seqs)
    plan = mlacore.plan_decode(
        tables[1],
        num_heads=check.num_heads,
        seq_len_q=check.seq_len_q,
        causal=check.causal,
        max_seq_len=max(check.lengths) if check.is_bounded else None,
    )
    calls = [mlacore.mla_decode(q, cache.pool, *tables, plan=plan, causal=check.causal) for _ in range(2)]
    (out, lse), again = ([_to_host(array) for array in call] for call in calls)
    is_repeatable = all(a.tobytes() == b.tobytes() for a, b in zip((out, lse), again, strict=True))
    error, lse_error = _errors(check, _to_host(q), _to_host(rows), out, lse)
    return Found(error, lse_error, is_repeatable, ERROR_LIMITS[check.dtype])


def _errors(check: Check, q: np.ndarray, rows: np.ndarray, out: np.ndarray, lse: np.ndarray) -> tuple[float, float]:
    """The largest over all sequences; infinite where empty ones are not 0 and -inf."""
    errors, lse_errors, first = [0.0], [0.0], 0
    for sequence, length in enumerate(check.lengths):
        one = slice(sequence, sequence + 1)
        if length == 0:
            errors.append(0.0 if not out[one].any() and np.isneginf(lse[one]).all() else float("inf"))
            continue
        page = rows[first : first + length].reshape(1, length, 1, HEAD_DIM_QK)
        first += length
        in_order, lengths = np.zeros((1, 1), np.int32), np.array([length])
        exact, exact_lse = mlacore.mla_decode_reference(q[one], page, in_order, lengths, causal=check.causal)
        errors.append(float(np.linalg.norm(out[one].astype(np.float64) - exact) / np.linalg.norm(exact)))
        lse_errors.append(float(np.abs(lse[one] - exact_lse).max()))
    return float(np.max(errors)), float(np.max(lse_errors))  # NaN if one of them is


# ---- speed ---------------------------------------------------------------------------------------------------------


def _speed(cupy: Any, seed: int) -> list[str]:
    """Time the large batches and print them; their shares of the floor, as text."""
    ceiling = ceilings.measure_gpu()
    matrix = f"{ceiling.flops_per_s / 1e12:.0f} TFLOP/s" if ceiling.flops_per_s else "not measured"
    print(f"Speed; ceilings {ceiling.bytes_per_s / 1e9:.0f} GB/s ({ceiling.bytes_label}), {matrix}", end="")
    print(f" ({ceiling.flops_label})", flush=True)
    shares = []
    for num_heads, batch, tokens in TIMED:
        seconds = _decode_seconds(cupy, num_heads, batch, tokens, seed)
        share = share_of_floor(seconds, num_heads, batch, tokens, ceiling)
        text = f"{share:.0%}" if share is not None else "unknown (bound by the matrix rate, which needs cuBLAS)"
        hint = ": does something else use this GPU, or is its power limited?" if share and share < LOW_SHARE else ""
        print(f"  {num_heads} heads, {batch} sequences of {tokens}: {seconds * 1e6:.0f} µs, {text} of floor{hint}")
        shares.append(f"{share:.0%} ({num_heads} heads)" if share is not None else f"unknown ({num_heads} heads)")
    return shares


def share_of_floor(seconds: float, num_heads: int, batch: int, tokens: int, ceiling: ceilings.Ceilings) -> float | None:
    """What the slower of memory and matrix units needs at least, over `seconds`; None where the matrix units decide and
    their rate is not known."""
    nbytes = 2 * batch * (tokens * HEAD_DIM_QK + num_heads * (HEAD_DIM_QK + HEAD_DIM_V))
    flops = 2 * batch * tokens * num_heads * (HEAD_DIM_QK + HEAD_DIM_V)
    load_s = nbytes / ceiling.bytes_per_s
    if ceiling.flops_per_s:
        return max(load_s, flops / ceiling.flops_per_s) / seconds
    is_memory_bound = flops / nbytes < 100  # a Hopper GPU does more than 150 FLOP for each byte that it reads
    return load_s / seconds if is_memory_bound else None


def _decode_seconds(cupy: Any, num_heads: int, batch: int, tokens: int, seed: int) -> float:
    pages = tokens // PAGE_SIZE
    pool = normal((batch * pages, PAGE_SIZE, 1, HEAD_DIM_QK), seed=seed, dtype=arrays.bfloat16, xp=cupy)
    q = normal((batch, 1, num_heads, HEAD_DIM_QK), seed=seed + 1, dtype=arrays.bfloat16, xp=cupy)
    order = np.random.default_rng(seed).permutation(batch * pages).astype(np.int32)
    block_table, lengths = cupy.asarray(order.reshape(batch, pages)), cupy.full(batch, tokens, np.int32)
    out = cupy.empty((batch, 1, num_heads, HEAD_DIM_V), pool.dtype)
    lse = cupy.empty((batch, num_heads, 1), np.float32)
    plan = mlacore.plan_decode(lengths, num_heads=num_heads)

    def call() -> None:
        mlacore.mla_decode(q, pool, block_table, lengths, plan=plan, out=out, lse=lse)

    return ceilings.gpu_seconds(call, repeats=50)


def _to_host(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()
