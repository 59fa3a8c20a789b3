"""What XLA's custom calls do, on a CPU and on a GPU: plan, decode, append. `mlacore.jax` puts the calls into programs.

All that is fixed about a call (shapes, dtype, scale, options) is one string, its spec. It says enough to prepare the
launch from nothing, as in a process that finds the executable in a cache and never traced it. Nothing here imports JAX.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mlacore import arrays
from mlacore import plan as plans
from mlacore.attention import mla_decode
from mlacore.cache_layout import RowTransform
from mlacore.cache_numpy import write_rows
from mlacore.dispatch import KernelShape
from mlacore.launch import pack_addresses
from mlacore.params import HEAD_DIM_V, KV_LORA_RANK, QK_ROPE_HEAD_DIM
from mlacore.plan import DecodePlan

Launch = Callable[[list[int], list[int], int], None]  # addresses of arguments, of results; stream

_MAX_PREPARED = 4096  # each layer of a model is a call of its own, for each batch size


def spec(**fixed: Any) -> str:
    """All that is fixed about a call, as text; a plan's fields among them are JSON too (`KernelShape` as a list)."""
    return json.dumps(fixed, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> list[int]:
    assert isinstance(value, KernelShape), value
    return [value.tile_rows, value.cluster_ctas, value.row_blocks]


_fixed = functools.lru_cache(maxsize=_MAX_PREPARED)(json.loads)  # back from text


def _plan_of(fixed: dict[str, Any], device: int | None, work: Any = None, splits: Any = None) -> DecodePlan:
    fields = fixed["plan"] | {"kernel": KernelShape(*fixed["plan"]["kernel"])}
    return DecodePlan(**fields, device=device, work=work, splits=splits)


# ---- arrays --------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """As much of a C-contiguous array as launches are prepared from."""

    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...]

    @classmethod
    def of(cls, shape: list[int], dtype: np.dtype) -> _Layout:
        strides = tuple(math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape)))
        return cls(tuple(shape), dtype, strides)


def _pool(fixed: dict[str, Any], dtype: np.dtype) -> tuple[_Layout, int]:
    """One layer's pool, and at how many bytes it begins in that of all layers."""
    shape, layer = fixed["kv_cache"], fixed["layer"]
    if layer is None:
        return _Layout.of(shape, dtype), 0
    return _Layout.of(shape[1:], dtype), layer * math.prod(shape[1:]) * dtype.itemsize


def _view(address: int, shape: Any, dtype: Any) -> np.ndarray:
    """The memory at an address of the CPU as an array."""
    dtype = np.dtype(dtype)
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


# ---- plan ----------------------------------------------------------------------------------------------------------


def plan_on_cpu(spec: bytes, arguments: list[int], results: list[int], device: None, stream: int) -> None:
    """cache_seqlens -> work, splits"""
    fixed = _fixed(spec)
    batch, num_workers = fixed["batch"], fixed["num_workers"]
    lengths = _view(arguments[0], (batch,), np.int32)
    work, splits = _view(results[0], (num_workers + 1, 2), np.int32), _view(results[1], (batch, 2), np.int32)
    work[...], splits[...] = plans.schedule(lengths, num_workers, fixed["max_splits"])


@functools.lru_cache(maxsize=_MAX_PREPARED)
def prepare_plan(spec: bytes, device: int) -> Launch:
    """`plan_on_cpu` as a launch on `device`."""
    from mlacore import driver

    plan = driver.prepare_plan(device, **_fixed(spec))
    return lambda arguments, results, stream: plan(stream, (*arguments, *results))


# ---- decode --------------------------------------------------------------------------------------------------------


def decode_on_cpu(spec: bytes, arguments: list[int], results: list[int], device: None, stream: int) -> None:
    """q, kv_cache, block_table, cache_seqlens, work, splits -> out, lse"""
    fixed = _fixed(spec)
    dtype = arrays.as_dtype(fixed["dtype"])
    pool, offset = _pool(fixed, dtype)
    batch, seq_len_q, num_heads, _ = fixed["q"]
    q, kv_cache, block_table, cache_seqlens, work, splits = arguments
    plan = fixed["plan"]
    mla_decode(
        _view(q, fixed["q"], dtype),
        _view(kv_cache + offset, pool.shape, dtype),
        _view(block_table, fixed["block_table"], np.int32),
        _view(cache_seqlens, (batch,), np.int32),
        plan=_plan_of(
            fixed, None, _view(work, (plan["num_workers"] + 1, 2), np.int32), _view(splits, (batch, 2), np.int32)
        ),
        softmax_scale=fixed["softmax_scale"],
        causal=plan["causal"],
        out=_view(results[0], (batch, seq_len_q, num_heads, HEAD_DIM_V), dtype),
        lse=_view(results[1], (batch, num_heads, seq_len_q), np.float32),
    )


@functools.lru_cache(maxsize=_MAX_PREPARED)
def prepare_decode(spec: bytes, device: int) -> Launch:
    """`decode_on_cpu` as a launch on `device`."""
    from mlacore import driver

    fixed = _fixed(spec)
    dtype, plan = arrays.as_dtype(fixed["dtype"]), _plan_of(fixed, device)
    assert plan.kernel is not None
    pool, offset = _pool(fixed, dtype)
    block_table = _Layout.of(fixed["block_table"], arrays.int32)
    attend = driver.prepare_decode(
        _Layout.of(fixed["q"], dtype), pool, block_table, plan, fixed["softmax_scale"], plan.causal
    )
    rows = plan.seq_len_q * plan.num_heads // plan.num_kv_heads
    sizes = plan.num_workers, plan.num_kv_heads, rows, plan.kernel

    def decode(arguments: list[int], results: list[int], stream: int) -> None:
        q, kv_cache, block_table, cache_seqlens, work, splits = arguments
        out, lse = results
        schedule, states = pack_addresses(work, splits), _scratch(device, stream, *sizes)
        attend.at(stream, (q, kv_cache + offset, block_table, cache_seqlens, schedule, out, lse, states))

    return decode


class _Scratch(NamedTuple):
    addresses: bytes  # packed
    arrays: list[Any]


_scratches: dict[tuple[int, int, int, int, int, KernelShape], _Scratch] = {}
_making = threading.Lock()


def _scratch(device: int, stream: int, num_workers: int, num_kv_heads: int, rows: int, kernel: KernelShape) -> bytes:
    """Packed addresses of the scratch memory that all plans of a shape share on one stream, where calls run one after
    another. It is not XLA's, since it has to keep from call to call what the kernel left in it, nor may plans of other
    workers or query `rows` use it: a launch clears or writes all that those before have left in it (cuda/cells.cuh).
    """
    key = device, stream, num_workers, num_kv_heads, rows, kernel
    if key not in _scratches:
        with _making, arrays.on_device(device, arrays.as_stream(stream, device)) as cupy:
            if key not in _scratches:
                shapes = plans.scratch(num_workers, num_kv_heads, kernel).values()
                states = [cupy.zeros(shape, cupy.uint32) for shape in shapes]
                _scratches[key] = _Scratch(pack_addresses(*(state.data.ptr for state in states)), states)
    return _scratches[key].addresses


# ---- append --------------------------------------------------------------------------------------------------------


def append_on_cpu(spec: bytes, arguments: list[int], results: list[int], device: None, stream: int) -> None:
    """kv_cache, where, ckv, kpe, then norm_weight and rope_cos, rope_sin if any -> kv_cache, the same memory"""
    fixed = _fixed(spec)
    dtype = arrays.as_dtype(fixed["dtype"])
    pool, offset = _pool(fixed, dtype)
    num_tokens = fixed["num_tokens"]
    _, where, ckv, kpe, norm_weight, rope_cos, rope_sin = _append_arguments(fixed, arguments)
    tables = fixed["rope_positions"], QK_ROPE_HEAD_DIM // 2
    transform = RowTransform(
        _view(norm_weight, (KV_LORA_RANK,), dtype) if norm_weight else None,
        fixed["norm_eps"],
        _view(rope_cos, tables, np.float32) if rope_cos else None,
        _view(rope_sin, tables, np.float32) if rope_sin else None,
        fixed["rope_interleaved"],
    )
    write_rows(
        _view(results[0] + offset, pool.shape, dtype),
        _view(where, (2, num_tokens), np.int64),
        _view(ckv, (num_tokens, KV_LORA_RANK), dtype),
        _view(kpe, (num_tokens, QK_ROPE_HEAD_DIM), dtype),
        transform,
    )


@functools.lru_cache(maxsize=_MAX_PREPARED)
def prepare_append(spec: bytes, device: int) -> Launch:
    """`append_on_cpu` as a launch on `device`."""
    from mlacore import cache_kernels

    fixed = _fixed(spec)
    dtype = arrays.as_dtype(fixed["dtype"])
    pool, offset = _pool(fixed, dtype)
    write = cache_kernels.prepare_write(
        device,
        dtype,
        pool.shape[:2],
        pool.strides[:2],
        KV_LORA_RANK * dtype.itemsize,
        QK_ROPE_HEAD_DIM * dtype.itemsize,
        fixed["num_tokens"],
        fixed["rope_positions"],
        fixed["rope_interleaved"],
        fixed["norm_eps"],
    )

    def launch(arguments: list[int], results: list[int], stream: int) -> None:
        _, where, ckv, kpe, *transform = _append_arguments(fixed, arguments)
        write(stream, (results[0] + offset, ckv, kpe, where, *transform))

    return launch


def _append_arguments(fixed: dict[str, Any], arguments: list[int]) -> list[int]:
    """Addresses of all seven arguments, 0 for those that the call has not."""
    first, options = arguments[:4], arguments[4:]
    norm_weight = options[:1] if fixed["normalises"] else [0]
    tables = options[-2:] if fixed["rope_positions"] else [0, 0]
    return [*first, *norm_weight, *tables]


# ---- registration --------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A custom call: what it is named, and what it does where.

    Attributes
    ----------
    name : str
        By which programs call it.
    on_cpu : callable
        As `mlacore.xla_ffi.Call`.
    prepare : callable
        From spec and device to what is called on a GPU.
    """

    name: str
    on_cpu: Any
    prepare: Callable[[bytes, int], Launch]

    def on_gpu(self, spec: bytes, arguments: list[int], results: list[int], device: int, stream: int) -> None:
        """As `mlacore.xla_ffi.Call`."""
        self.prepare(spec, device)(arguments, results, stream)


PLAN = Target("mlacore_plan", plan_on_cpu, prepare_plan)
DECODE = Target("mlacore_decode", decode_on_cpu, prepare_decode)
APPEND = Target("mlacore_append", append_on_cpu, prepare_append)
