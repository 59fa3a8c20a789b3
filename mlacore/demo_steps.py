"""The demo's second part: decode steps through several layers, launched one by one and replayed as one CUDA graph.

Each layer appends a row to every sequence (RMSNorm and RoPE on the way) and attends. What a layer appends is made of
the previous layer's output, so that a slip in any step shows in all that follow; both ways must end with the same
bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import mlacore
from mlacore.cache_layout import NewTokens
from mlacore.demo import DEEPSEEK_V2_LITE, DEEPSEEK_V3, Backend, Model, choose_backend, normal_rows
from mlacore.params import HEAD_DIM_QK, HEAD_DIM_V, KV_LORA_RANK, PAGE_SIZE, QK_ROPE_HEAD_DIM

WARMUP_STEPS = 2  # not timed
MIN_STEPS = 4


@dataclass(frozen=True, slots=True)
class Workload:
    """What runs where nothing else is asked for."""

    model: Model
    num_layers: int
    batch: int
    max_length: int
    steps: int


GPU_WORKLOAD = Workload(DEEPSEEK_V3, num_layers=8, batch=32, max_length=4096, steps=256)
CPU_WORKLOAD = Workload(DEEPSEEK_V2_LITE, num_layers=2, batch=4, max_length=512, steps=256)


def run(
    *,
    device: str = "auto",
    batch: int | None = None,
    max_length: int | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> int:
    """Run both ways and print what a step takes; arguments and exit status as `mlacore.demo.run`."""
    backend = choose_backend(device)
    if backend is None:
        return 1
    workload = GPU_WORKLOAD if backend.is_gpu else CPU_WORKLOAD
    batch, max_length = batch or workload.batch, max_length or workload.max_length
    steps = max(steps or workload.steps, MIN_STEPS)
    lengths = np.random.default_rng(seed).integers(1, max_length, batch, endpoint=True)

    print(f"{workload.model.name}: {workload.num_layers} layers, {workload.model.num_heads} heads, {steps} steps")
    print(f"  batch     {batch} sequences of {lengths.min():,} to {lengths.max():,} tokens, {lengths.sum():,} in all")
    print(f"  device    {backend.label}", flush=True)
    eager = Decoder(backend, workload, lengths, steps, seed)
    eager_us = eager.by_the_host(steps)
    replayed = Decoder(backend, workload, lengths, steps, seed)
    replayed_us = replayed.by_itself(steps)
    what = "one CUDA graph, replayed" if backend.is_gpu else "without the host's books"
    print(f"  eager     {eager_us:,.0f} µs a step: host bookkeeping, then {2 * workload.num_layers} calls")
    print(f"  replayed  {replayed_us:,.0f} µs a step: {what}, {eager_us / replayed_us:.1f} times as fast")
    is_same = eager.state() == replayed.state()
    print(f"  after {steps} steps outputs and cache are {'the same, bit by bit' if is_same else 'DIFFERENT'}")
    return 0 if is_same else 1


class Decoder:
    """A cache of prompts, and buffers for steps that go on from them; the same for the same seed."""

    def __init__(self, backend: Backend, workload: Workload, lengths: np.ndarray, steps: int, seed: int) -> None:
        xp, batch, heads = backend.xp, len(lengths), workload.model.num_heads
        self.backend = backend
        pages = int((-(-(lengths + steps) // PAGE_SIZE)).sum())
        longest = int(lengths.max()) + steps
        self.cache = mlacore.PagedKVCache(
            pages,
            num_layers=workload.num_layers,
            interleaved=True,
            max_seqs=batch,
            max_seq_len=longest,
            device="cuda" if backend.is_gpu else "cpu",
        )
        for seq, length in enumerate(lengths.tolist()):
            tokens = self.cache.create(1, num_tokens=length).tokens
            for layer in range(workload.num_layers):
                at = seed + 4 + 2 * (seq * workload.num_layers + layer)
                ckv = normal_rows(xp, (length, KV_LORA_RANK), at)
                self.cache.write(tokens, ckv, normal_rows(xp, (length, QK_ROPE_HEAD_DIM), at + 1), layer=layer)
        shape = (workload.num_layers, batch, 1, heads)
        self.q = normal_rows(xp, (*shape, HEAD_DIM_QK), seed + 1)
        self.out = normal_rows(xp, (*shape, HEAD_DIM_V), seed + 2)
        self.lse = xp.empty((batch, heads, 1), np.float32)
        angles = np.arange(longest)[:, None] * 1e-4 ** (np.arange(QK_ROPE_HEAD_DIM // 2) / (QK_ROPE_HEAD_DIM // 2))
        self.transform = {
            "norm_weight": normal_rows(xp, (KV_LORA_RANK,), seed + 3),
            "rope_cos": xp.asarray(np.cos(angles).astype(np.float32)),
            "rope_sin": xp.asarray(np.sin(angles).astype(np.float32)),
        }
        self.plan = mlacore.plan_decode(self.cache.cache_seqlens, num_heads=heads)

    def attend(self, tokens: NewTokens) -> None:
        """Plan; in each layer write the rows of `tokens`, a view of the previous output, and attend."""
        cache = self.cache
        self.plan.update(cache.cache_seqlens)
        for layer, kv_cache in enumerate(cache.layers):
            previous = self.out[layer - 1][:, 0]
            ckv, kpe = previous[:, 0], previous[:, -1, :QK_ROPE_HEAD_DIM]
            cache.write(tokens, ckv, kpe, layer=layer, **self.transform)
            mlacore.mla_decode(
                self.q[layer],
                kv_cache,
                cache.block_table,
                cache.cache_seqlens,
                plan=self.plan,
                out=self.out[layer],
                lse=self.lse,
            )

    def by_the_host(self, steps: int) -> float:
        """µs of a step of which the host's books know."""
        seqs = np.arange(len(self.lse))  # a new cache hands out rows 0, 1, ...: its own arrays are the batch, in order
        return self._timed(lambda: self.attend(self.cache.extend(seqs, 1)), steps)

    def by_itself(self, steps: int) -> float:
        """µs of a step that reads nothing from the host, which hears of all of them at the end."""
        self.cache.reserve(np.arange(len(self.lse)), steps)
        step = self.cache.step_tokens()

        def call() -> None:
            self.cache.advance(step)
            self.attend(step)

        if self.backend.is_gpu:
            microseconds = self._replayed(call, steps)
        else:
            microseconds = self._timed(call, steps)
        self.cache.advanced(step, steps)
        return microseconds

    def _replayed(self, call: Callable[[], None], steps: int) -> float:
        import cupy

        call()  # the first step loads the kernels, which a capture does not allow
        self.backend.wait()
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            call()
            graph = stream.end_capture()
            graph.upload(stream)
            return self._timed(lambda: graph.launch(stream), steps - 1)

    def _timed(self, call: Callable[[], Any], steps: int) -> float:
        for _ in range(WARMUP_STEPS):
            call()
        self.backend.wait()
        start = time.perf_counter()
        for _ in range(steps - WARMUP_STEPS):
            call()
        self.backend.wait()
        return (time.perf_counter() - start) / (steps - WARMUP_STEPS) * 1e6

    def state(self) -> list[bytes]:
        """All bits that the steps have left: outputs, and the rows of every sequence and layer."""
        self.cache.check_integrity()
        seqs = np.arange(len(self.lse))
        rows = [self.cache.gather(seqs, layer=layer) for layer in range(len(self.cache.layers))]
        return [self.backend.to_host(array.view(np.uint16)).tobytes() for array in (self.out, *rows)]
