"""The demo: a decode loop over a paged cache, timed, held against this machine's ceilings and checked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import mlacore
from mlacore import ceilings, info
from mlacore.arrays import bfloat16
from mlacore.params import HEAD_DIM_QK, HEAD_DIM_V, KV_LORA_RANK, PAGE_SIZE, QK_ROPE_HEAD_DIM
from mlacore.plan import available_cpus
from mlacore.synthetic import normal

HEAD_DIM = 128  # of K and of V in the MHA and GQA that MLA is compared with: the DeepSeek models' own
NUM_Q_SETS = 4  # queries drawn once and used in turn; a set a step would not fit beside a large cache
CHECKED_ON_GPU = 4  # sequences checked in float64 after a GPU run; a CPU run checks all of its smaller batch
WARMUP_STEPS = 3
ERROR_LIMIT = 5e-3  # relative L2; rounding the output to bfloat16 alone gives 1.7e-3


@dataclass(frozen=True, slots=True)
class Model:
    """The attention shape of a model."""

    name: str
    num_heads: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What the demo runs where nothing else is asked for."""

    model: Model
    batch: int
    max_length: int
    steps: int


DEEPSEEK_V3 = Model("DeepSeek-V3", num_heads=128, num_layers=61)
DEEPSEEK_V2_LITE = Model("DeepSeek-V2-Lite", num_heads=16, num_layers=27)
GPU_WORKLOAD = Workload(DEEPSEEK_V3, batch=64, max_length=32768, steps=200)
CPU_WORKLOAD = Workload(DEEPSEEK_V2_LITE, batch=8, max_length=4096, steps=200)


@dataclass(frozen=True, slots=True)
class Backend:
    """Where the demo runs: array module, clock and what to call it."""

    is_gpu: bool
    xp: Any
    label: str

    def mark(self) -> Any:
        """A point in time: on the host's clock, or on the GPU's as its stream reaches it."""
        if not self.is_gpu:
            return time.perf_counter()
        event = self.xp.cuda.Event()
        event.record()
        return event

    def between_us(self, start: Any, end: Any) -> float:
        """Time between two marks, once both are reached."""
        if not self.is_gpu:
            return (end - start) * 1e6
        end.synchronize()
        return self.xp.cuda.get_elapsed_time(start, end) * 1e3

    def to_host(self, array: Any) -> np.ndarray:
        """A NumPy array of the same values."""
        return self.xp.asnumpy(array) if self.is_gpu else array

    def wait(self) -> None:
        """Until everything launched so far is done."""
        if self.is_gpu:
            self.xp.cuda.get_current_stream().synchronize()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the loop measured. Times are medians over steps, in µs."""

    tokens: int
    step_us: float
    attend_us: float
    max_error: float
    relative_error: float
    num_checked: int


def run(
    *,
    device: str = "auto",
    batch: int | None = None,
    max_length: int | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> int:
    """Run the demo and print what it found.

    Parameters
    ----------
    device : {"auto", "gpu", "cpu"}
        "auto" takes the GPU where the kernels can run, and says why where they cannot.
    batch, max_length, steps : int, optional
        Sequences, longest sequence in tokens, decode steps; by default `GPU_WORKLOAD`'s or `CPU_WORKLOAD`'s.
    seed : int
        Of lengths and data.

    Returns
    -------
    int
        Exit status: 0, or 1 if the GPU was asked for and cannot serve, or the check failed.
    """
    backend = choose_backend(device)
    if backend is None:
        return 1
    workload = GPU_WORKLOAD if backend.is_gpu else CPU_WORKLOAD
    model = workload.model
    batch, max_length = batch or workload.batch, max_length or workload.max_length
    steps = steps or workload.steps
    lengths = np.random.default_rng(seed).integers(max(1, max_length // 16), max_length, batch, endpoint=True)

    widths = f"{KV_LORA_RANK} + {QK_ROPE_HEAD_DIM} values"
    print(f"{model.name}: one layer's attention, {model.num_heads} heads over {widths}")
    print(f"  batch     {batch} sequences of {lengths.min():,} to {lengths.max():,} tokens, {lengths.sum():,} in all")
    print(f"  device    {backend.label}", flush=True)
    outcome = decode(backend, model, lengths, steps, seed)
    ceiling = ceilings.measure_gpu() if backend.is_gpu else ceilings.measure_cpu()
    print(speed_report(model, batch, steps, outcome, ceiling))
    print(cache_report(model, outcome.tokens))
    if not outcome.relative_error < ERROR_LIMIT:
        print(f"FAILED: the relative error should be below {ERROR_LIMIT}")
        return 1
    return 0


def choose_backend(device: str) -> Backend | None:
    """The backend that `run` says; None, with the reasons printed, if the GPU was asked for and cannot serve."""
    missing = [] if device == "cpu" else info.problems(info.collect())
    if device == "gpu" and missing:
        print("The GPU cannot be used here:", *missing, sep="\n  - ")
        return None
    if missing:
        print(f"The GPU cannot be used: {missing[0]}.\nThis is the CPU's demo; `python -m mlacore info` says more.\n")
    return _cpu_backend() if device == "cpu" or missing else _gpu_backend()


def decode(backend: Backend, model: Model, lengths: np.ndarray, steps: int, seed: int) -> Outcome:
    """Fill a cache with sequences of `lengths`, then take `steps` decode steps and check the last one."""
    xp, batch = backend.xp, len(lengths)
    cache = _filled_cache(backend, lengths, WARMUP_STEPS + steps, seed)
    seqs = np.arange(batch)  # a new cache hands out rows 0, 1, ...: its own arrays are the batch, in order
    q = normal_rows(xp, (NUM_Q_SETS, batch, 1, model.num_heads, HEAD_DIM_QK), seed + 1)
    new_ckv = normal_rows(xp, (WARMUP_STEPS + steps, batch, 1, KV_LORA_RANK), seed + 2)
    new_kpe = normal_rows(xp, (WARMUP_STEPS + steps, batch, 1, QK_ROPE_HEAD_DIM), seed + 3)
    plan = mlacore.plan_decode(cache.cache_seqlens, num_heads=model.num_heads)
    out = xp.empty((batch, 1, model.num_heads, HEAD_DIM_V), q.dtype)
    lse = xp.empty((batch, model.num_heads, 1), xp.float32)

    marks = []
    for step in _with_progress(WARMUP_STEPS + steps):
        start = backend.mark()
        cache.append(seqs, new_ckv[step], new_kpe[step])
        plan.update(cache.cache_seqlens)
        planned = backend.mark()
        mlacore.mla_decode(
            q[step % NUM_Q_SETS], cache.pool, cache.block_table, cache.cache_seqlens, plan=plan, out=out, lse=lse
        )
        marks.append((start, planned, backend.mark()))
    backend.wait()
    timed = marks[WARMUP_STEPS:]
    step_us = float(np.median([backend.between_us(start, end) for start, _, end in timed]))
    attend_us = float(np.median([backend.between_us(planned, end) for _, planned, end in timed]))

    last_q = q[(WARMUP_STEPS + steps - 1) % NUM_Q_SETS]
    checked = range(batch) if not backend.is_gpu else range(0, batch, max(1, batch // CHECKED_ON_GPU))
    pairs = [_compared(backend, cache, seq, last_q, out) for seq in checked]
    error = np.concatenate([ours - exact for ours, exact in pairs])
    exact = np.concatenate([exact for _, exact in pairs])
    return Outcome(
        tokens=int(cache.seq_lens.sum()),
        step_us=step_us,
        attend_us=attend_us,
        max_error=float(np.abs(error).max()),
        relative_error=float(np.linalg.norm(error) / np.linalg.norm(exact)),
        num_checked=len(pairs),
    )


def speed_report(model: Model, batch: int, steps: int, outcome: Outcome, ceiling: ceilings.Ceilings) -> str:
    """Speed and error as text."""
    rows = batch * model.num_heads
    flops = 2 * outcome.tokens * model.num_heads * (HEAD_DIM_QK + HEAD_DIM_V)
    nbytes = 2 * (outcome.tokens * HEAD_DIM_QK + rows * (HEAD_DIM_QK + HEAD_DIM_V))
    bytes_per_s, flops_per_s = nbytes / outcome.attend_us * 1e6, flops / outcome.attend_us * 1e6
    tokens_per_s = batch / outcome.step_us * 1e6
    if peak := ceiling.flops_per_s:
        matrix_share = f"{flops_per_s / peak:.0%} of {peak / 1e12:,.3g} ({ceiling.flops_label})"
    else:
        matrix_share = f"ceiling {ceiling.flops_label}"
    lines = [
        f"  step      {outcome.step_us:,.0f} µs: append a token to each sequence, plan, attend (median of {steps})",
        f"  attend    {outcome.attend_us:,.0f} µs of it",
        f"  tokens/s  {tokens_per_s:,.0f} through this layer; {tokens_per_s / model.num_layers:,.0f} through the "
        f"attention of all {model.num_layers} layers",
        f"  GB/s      {bytes_per_s / 1e9:,.1f}, {bytes_per_s / ceiling.bytes_per_s:.0%} of "
        f"{ceiling.bytes_per_s / 1e9:,.1f} ({ceiling.bytes_label})",
        f"  TFLOP/s   {flops_per_s / 1e12:,.3g}, {matrix_share}",
        f"  error     {outcome.max_error:.1e} at most, {outcome.relative_error:.1e} relative (L2), against float64 "
        f"({outcome.num_checked} of {batch} sequences)",
    ]
    return "\n".join(lines)


def cache_report(model: Model, tokens: int) -> str:
    """The cache's size against the same model with MHA and GQA, and the arithmetic behind the figures people quote."""
    mla = KV_LORA_RANK + QK_ROPE_HEAD_DIM
    mha, gqa = kv_values(model.num_heads), kv_values(8)
    mla_gb, mha_gb, gqa_gb = (2 * tokens * model.num_layers * values / 1e9 for values in (mla, mha, gqa))
    v3 = kv_values(DEEPSEEK_V3.num_heads)
    # Layer counts and the 6 bits are those of the DeepSeek-V2 report (arXiv 2405.04434).
    v2, dense = 60 * mla, 95 * gqa
    packed = 6 * v2 / (16 * dense)
    return f"""
Cache of {model.name}, values a token and layer:
  MLA       {KV_LORA_RANK} latent + {QK_ROPE_HEAD_DIM} RoPE key      = {mla:6,}
  MHA       2 (K, V) x {model.num_heads:3} heads x {HEAD_DIM} = {mha:6,}   MLA is {mla / mha:.2%} of it
  GQA       2 (K, V) x   8 heads x {HEAD_DIM} = {gqa:6,}   MLA is {mla / gqa:.2%} of it
  In all    {tokens:,} tokens, {model.num_layers} layers, 2 bytes a value:
            MLA {mla_gb:,.2f} GB, MHA {mha_gb:,.2f} GB, GQA {gqa_gb:,.2f} GB
Figures quoted for MLA, and what they compare:
  1.7 %     DeepSeek-V3 with itself as MHA: {mla} / (2 x 128 heads x 128) = {mla} / {v3:,} = {mla / v3:.2%},
            {v3 / mla:.0f} times smaller (1.76 % is usually cut, not rounded, to 1.7)
  6.7 %     or 93.3 % saved: DeepSeek-V2, its cache in 6 bits, with another model, DeepSeek 67B (GQA, 8 heads), in 16:
            60 layers x {mla} x 6 bits = {6 * v2:,}, 95 layers x {gqa:,} x 16 bits = {16 * dense:,}: {packed:.2%};
            both in 16 bits, as this cache is: {v2:,} / {dense:,} values = {v2 / dense:.1%}"""


def kv_values(num_kv_heads: int) -> int:
    """Values that attention with this many K and V heads of `HEAD_DIM` caches, a token and layer."""
    return 2 * num_kv_heads * HEAD_DIM


def _cpu_backend() -> Backend:
    return Backend(False, np, f"CPU, {available_cpus()} cores; kernel: NumPy backend (BLAS), bfloat16 cache")


def _gpu_backend() -> Backend:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    label = f"{properties['name'].decode()}, {properties['multiProcessorCount']} SMs"
    return Backend(True, cupy, f"{label}; kernel: mla_decode_sm90 (sm_90a, NVRTC), bfloat16 cache")


def _filled_cache(backend: Backend, lengths: np.ndarray, extra_tokens: int, seed: int) -> mlacore.PagedKVCache:
    pages = int((-(-(lengths + extra_tokens) // PAGE_SIZE)).sum())
    cache = mlacore.PagedKVCache(
        pages,
        max_seqs=len(lengths),
        max_seq_len=int(lengths.max()) + extra_tokens,
        device="cuda" if backend.is_gpu else "cpu",
    )
    for seq, length in zip(cache.create(len(lengths)).seqs, lengths.tolist(), strict=True):
        ckv = normal_rows(backend.xp, (1, length, KV_LORA_RANK), seed + 10 + 2 * int(seq))
        kpe = normal_rows(backend.xp, (1, length, QK_ROPE_HEAD_DIM), seed + 11 + 2 * int(seq))
        cache.append([int(seq)], ckv, kpe)
    return cache


def normal_rows(xp: Any, shape: tuple[int, ...], seed: int) -> Any:
    """Values of deviation 1, as latents have after RMSNorm: with them the scores' deviation is 1 as well."""
    return normal(shape, seed=seed, dtype=bfloat16, xp=xp, scale=1.0)


def _compared(
    backend: Backend, cache: mlacore.PagedKVCache, seq: int, q: Any, out: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Our output and the float64 reference's for one sequence, on the host."""
    length = int(cache.seq_lens[seq])
    num_pages = -(-length // PAGE_SIZE)
    pages = backend.to_host(cache.pool.view(np.uint16)[cache.block_table[seq, :num_pages]]).view(cache.dtype)
    queries = backend.to_host(q[seq : seq + 1])
    in_order = np.arange(num_pages)[None]
    exact, _ = mlacore.mla_decode_reference(queries, pages, in_order, np.array([length]))
    return backend.to_host(out[seq : seq + 1]).astype(np.float64), exact


def _with_progress(count: int) -> Iterator[int]:
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(range(count))
    return iter(tqdm(range(count), desc="  decode", unit="step", disable=None))
