"""What bounds a decode on this GPU, measured in the run that needs it: bandwidth, load-only kernel, matrix rate."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from bench.inputs import PAGE_BYTES, Inputs
from bench.timing import Budget, Replay, capture, time_replays
from mlacore import ceilings, driver

GEMM_SIZE = 8192
LOAD_ONLY_STAGES = 3
LOAD_ONLY_SHARED_BYTES = LOAD_ONLY_STAGES * PAGE_BYTES + 128  # pages and mbarriers, as load_only.cu's SharedPlan


def measure(torch: Any, stream: Any, budget: Budget) -> dict[str, Any]:
    """Ceilings that hold for every case, as JSON: GB/s, TFLOP/s and µs. `torch` may be None."""
    with stream:
        copy_bytes_s = _copy_bandwidth()
        read_bytes_s = ceilings.read_bandwidth()
        gemm_flops_s, gemm_label = _torch_gemm_rate(torch, stream) if torch else ceilings.gemm_rate(GEMM_SIZE)
        empty = [lambda: _empty_kernel()((_num_sms(),), (32,), ())] * 200
        empty[0]()
    return {
        "copy_gbs": round(copy_bytes_s / 1e9, 1),
        "read_gbs": round(read_bytes_s / 1e9, 1),
        "gemm_tflops": round(gemm_flops_s / 1e12, 1) if gemm_flops_s else None,
        "gemm_label": gemm_label,
        "empty_us": round(time_replays(capture(empty, stream), len(empty), stream, budget).us, 3),
    }


def load_only(inputs: Inputs, num_calls: int, stream: Any) -> Replay:
    """A graph of a kernel that loads the case's pages and does nothing with them: the floor under any decode of it."""
    kernel = _load_only_kernel()
    num_entries = inputs.entries.size
    grid = (min(_num_sms(), num_entries),)

    def load(table: Any) -> None:
        import numpy as np

        arguments = (inputs.pool, table, inputs.entries, np.int32(num_entries), np.int64(inputs.pool.strides[0]))
        kernel(grid, (32,), arguments, shared_mem=LOAD_ONLY_SHARED_BYTES)

    calls = [functools.partial(load, inputs.block_table[i % len(inputs.block_table)]) for i in range(num_calls)]
    with stream:
        calls[0]()
    return capture(calls, stream)


def _num_sms() -> int:
    import cupy

    return driver.num_sms(cupy.cuda.Device().id)


def _copy_bandwidth(buffer_bytes: int = 1 << 31) -> float:
    """Bytes read plus bytes written per second of a device-to-device copy."""
    import cupy

    source = cupy.full(buffer_bytes // 4, 0x3C003C00, cupy.uint32)
    target = cupy.empty_like(source)
    seconds = ceilings.gpu_seconds(lambda: target.data.copy_from_device_async(source.data, buffer_bytes))
    return 2 * buffer_bytes / seconds


def _torch_gemm_rate(torch: Any, stream: Any) -> tuple[float, str]:
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        a = torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device="cuda")
        b = torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device="cuda")
        product = torch.empty_like(a)
        seconds = ceilings.gpu_seconds(lambda: torch.matmul(a, b, out=product), repeats=20)
    return 2 * GEMM_SIZE**3 / seconds, f"torch {GEMM_SIZE}³ bfloat16"


@functools.cache
def _empty_kernel() -> Any:
    import cupy

    return cupy.RawKernel('extern "C" __global__ void empty() {}', "empty")


@functools.cache
def _load_only_kernel() -> Any:
    import cupy

    kernel = cupy.RawKernel(Path(__file__).with_name("load_only.cu").read_text(), "load_only", ("-std=c++17",))
    kernel.max_dynamic_shared_size_bytes = LOAD_ONLY_SHARED_BYTES
    return kernel
