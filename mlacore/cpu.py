"""The NumPy backend: streaming softmax over tiles with BLAS products, one thread per worker of the plan.

Each worker walks its items (a range of tiles of one sequence) in chunks of tiles that it gathers into float32 scratch:

    S = K q^T (tokens on rows: twice as fast as q K^T at 16 heads), masked
    m' = max(m, max S);  P = exp(S - m');  l = l exp(m - m') + sum P;  O = O exp(m - m') + round(P)^T V

P is rounded to the dtype of q, as it is for the tensor cores on a GPU; all else is float32. A sequence that several
workers share is merged from their states in split order, so that timing never reaches the result.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlacore.params import TILE_TOKENS
from mlacore.plan import DecodePlan, available_cpus, worker_items

# Tokens gathered at once: 512 of 576 float32 are 1.2 MB, which a core's second-level cache holds.
CHUNK_TOKENS = 8 * TILE_TOKENS

Float32 = npt.NDArray[np.float32]


@dataclass(slots=True)
class State:
    """Softmax over part of the keys: what has to be kept to go on, or to merge.

    Attributes
    ----------
    largest : float32 ``[rows]``
        Largest score so far, ``-inf`` if none.
    total : float32 ``[rows]``
        Sum of ``exp(score - largest)``.
    acc : float32 ``[rows, head_dim_v]``
        Sum of ``exp(score - largest) * V``.
    """

    largest: Float32
    total: Float32
    acc: Float32

    @classmethod
    def empty(cls, num_rows: int, head_dim_v: int) -> State:
        return cls(
            np.full(num_rows, -np.inf, np.float32),
            np.zeros(num_rows, np.float32),
            np.zeros((num_rows, head_dim_v), np.float32),
        )

    def raise_largest(self, candidate: Float32) -> Float32:
        """Rescale to a maximum that covers `candidate`; returns what to subtract from scores, finite for empty rows."""
        self.largest, previous = np.maximum(self.largest, candidate), self.largest
        base = np.where(np.isneginf(self.largest), np.float32(0), self.largest)  # -inf - -inf would be NaN
        decay = np.exp(previous - base)
        self.total *= decay
        self.acc *= decay[:, None]
        return base

    def merge(self, other: State) -> None:
        """Add the keys of `other`."""
        weight = np.exp(other.largest - self.raise_largest(other.largest))
        self.total += other.total * weight
        self.acc += other.acc * weight[:, None]

    def finish(self) -> tuple[Float32, Float32]:
        """Output ``[rows, head_dim_v]`` and natural-log denominator ``[rows]``; 0 and -inf for rows without keys."""
        lse = self.largest + np.log(self.total)
        self.acc /= np.where(self.total == 0, np.float32(1), self.total)[:, None]
        return self.acc, lse


def decode(
    q: npt.NDArray[Any],
    kv_cache: npt.NDArray[Any],
    block_table: npt.NDArray[np.int32],
    cache_seqlens: npt.NDArray[np.int32],
    plan: DecodePlan,
    out: npt.NDArray[Any],
    lse: Float32,
    softmax_scale: float,
    causal: bool,
) -> None:
    """`mlacore.mla_decode` for validated NumPy arrays; writes `out` and `lse`."""
    call = _Call(q, kv_cache, block_table, cache_seqlens, plan, out, lse, np.float32(softmax_scale), causal)
    with _one_blas_thread() as is_limited:
        if is_limited and plan.num_workers > 1:
            shared = list(_executor(os.getpid()).map(call.work, range(plan.num_workers)))
        else:
            shared = [call.work(worker) for worker in range(plan.num_workers)]
    # Workers in order are splits in order.
    merged: dict[int, list[State]] = {}
    with np.errstate(all="ignore"):
        for sequence, states in (item for items in shared for item in items):
            if sequence in merged:
                for state, later in zip(merged[sequence], states, strict=True):
                    state.merge(later)
            else:
                merged[sequence] = states
        for sequence, states in merged.items():
            call.store(sequence, states)


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one `decode`, and what a worker does with them."""

    q: npt.NDArray[Any]
    kv_cache: npt.NDArray[Any]
    block_table: npt.NDArray[np.int32]
    cache_seqlens: npt.NDArray[np.int32]
    plan: DecodePlan
    out: npt.NDArray[Any]
    lse: Float32
    scale: np.float32
    causal: bool

    def work(self, worker: int) -> list[tuple[int, list[State]]]:
        """Attend to the items of `worker`: store whole sequences, return the states (one a KV head) of shared ones."""
        shared = []
        _, page_size, _, head_dim = self.kv_cache.shape
        scratch = np.empty(((CHUNK_TOKENS // page_size + 2) * page_size, head_dim), np.float32)
        # Overflow and NaN in the caller's data belong in the result, not on stderr; errstate is per thread.
        with np.errstate(all="ignore"):
            for sequence, begin_tile, end_tile in worker_items(self.plan.work, worker):
                length = max(int(self.cache_seqlens[sequence]), 0)
                begin = begin_tile * TILE_TOKENS
                end = length if end_tile is None else min(end_tile * TILE_TOKENS, length)
                states = self.attend(sequence, length, begin, end, scratch)
                if self.plan.splits[sequence, 1] > 1:
                    shared.append((sequence, states))
                else:
                    self.store(sequence, states)
        return shared

    def attend(self, sequence: int, length: int, begin: int, end: int, scratch: Float32) -> list[State]:
        """Softmax state of every KV head over tokens ``[begin, end)`` of one sequence."""
        _, seq_len_q, num_heads, head_dim = self.q.shape
        num_kv_heads, head_dim_v = self.kv_cache.shape[2], self.out.shape[3]
        group = num_heads // num_kv_heads
        num_rows = seq_len_q * group
        queries = self.q[sequence].reshape(seq_len_q, num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
        queries = queries.astype(np.float32).reshape(num_kv_heads, num_rows, head_dim)
        hidden = np.arange(seq_len_q - 1, -1, -1) if self.causal else np.zeros(seq_len_q, np.int64)
        limits = np.repeat(length - hidden, group)  # row = query * group + head sees tokens [0, limit)

        states = [State.empty(num_rows, head_dim_v) for _ in range(num_kv_heads)]
        for chunk in range(begin, end, CHUNK_TOKENS):
            stop = min(chunk + CHUNK_TOKENS, end)
            for head, state in enumerate(states):
                keys = self.gather(sequence, head, chunk, stop, scratch)
                scores = keys @ queries[head].T  # [tokens, rows]
                scores *= self.scale
                if stop > limits[0]:
                    scores[np.arange(chunk, stop)[:, None] >= limits] = -np.inf
                scores -= state.raise_largest(scores.max(axis=0))
                weights = np.exp(scores, out=scores)
                state.total += weights.sum(axis=0)
                if self.q.dtype != np.float32:
                    weights = weights.astype(self.q.dtype).astype(np.float32)
                state.acc += weights.T @ keys[:, :head_dim_v]
        return states

    def gather(self, sequence: int, head: int, begin: int, end: int, scratch: Float32) -> Float32:
        """Tokens ``[begin, end)`` of one KV head, in `scratch`; those without a page in the pool read as zeros."""
        num_pages, page_size, _, head_dim = self.kv_cache.shape
        first, last = begin // page_size, -(-end // page_size)
        pool = self.kv_cache[:, :, head]
        pages = self.block_table[sequence, first:last]
        target = scratch.reshape(-1, page_size, head_dim)[: last - first]
        is_held = (pages >= 0) & (pages < num_pages)
        # One copy and one cast for all pages: page by page, threads would spend their time handing over the GIL.
        if len(pages) == len(target) and is_held.all():
            target[...] = pool[pages]
        else:
            target[...] = 0
            target[: len(pages)][is_held] = pool[pages[is_held]]
        return scratch[begin - first * page_size : end - first * page_size]

    def store(self, sequence: int, states: list[State]) -> None:
        """Finish the states of one sequence, one a KV head, into `out` and `lse`."""
        seq_len_q, num_heads, head_dim_v = self.out.shape[1:]
        group = num_heads // len(states)
        for head, state in enumerate(states):
            heads = slice(head * group, (head + 1) * group)
            out, lse = state.finish()
            self.out[sequence, :, heads] = out.reshape(seq_len_q, group, head_dim_v)
            self.lse[sequence, heads] = lse.reshape(seq_len_q, group).T


@functools.cache
def _executor(pid: int) -> ThreadPoolExecutor:
    """The process's threads; keyed by process id, as threads do not survive a fork."""
    return ThreadPoolExecutor(available_cpus(), thread_name_prefix="mlacore")


@functools.cache
def _blas_controller() -> Any:
    """Control over NumPy's BLAS threads, or None without threadpoolctl."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController().select(user_api="blas")


_blas_lock = threading.Lock()
_blas_users = 0
_blas_limit: Any = None


@contextmanager
def _one_blas_thread() -> Iterator[bool]:
    """Keep BLAS single-threaded while workers call it side by side (both at once run at half speed).

    Yields False where BLAS cannot be told: workers then run one after another and BLAS brings the threads. The limit is
    process-wide, so calls that overlap count themselves and the last one lifts it.
    """
    global _blas_users, _blas_limit
    controller = _blas_controller()
    if controller is None or not len(controller):
        yield False
        return
    with _blas_lock:
        if _blas_users == 0:
            _blas_limit = controller.limit(limits=1)
        _blas_users += 1
    try:
        yield True
    finally:
        with _blas_lock:
            _blas_users -= 1
            if _blas_users == 0:
                _blas_limit.restore_original_limits()
                _blas_limit = None
