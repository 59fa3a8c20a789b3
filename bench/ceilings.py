"""What bounds a decode on this GPU, measured in the run that needs it: bandwidth, load-only kernel, matrix rate.

The matrix rate that counts is the sustained one, timed in turns as long as the contenders' own: a chip at its power
limit does a short burst at clocks that it cannot hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import energy
from bench.inputs import PAGE_BYTES, Inputs
from bench.nvml import Meter
from bench.timing import Budget, Replay, capture, time_replays
from mlacore import ceilings, driver
from mlacore.synthetic import normal

GEMM_SIZE = 8192
GEMM_CALLS = 4  # products to a timed replay, about 6 ms of them: what it costs to launch them weighs nothing
LOAD_ONLY_STAGES = 3
LOAD_ONLY_SHARED_BYTES = LOAD_ONLY_STAGES * PAGE_BYTES + 128  # pages and mbarriers, as load_only.cu's SharedPlan


def measure(torch: Any, stream: Any, budget: Budget, meter: Meter | None = None) -> dict[str, Any]:
    """Ceilings that hold for every case, as JSON: GB/s, TFLOP/s, MHz, W and µs; with `meter` also the power limit, and
    power and energy of empty kernels and of the matrix product. `torch` may be None."""
    with stream:
        empty = [lambda: _empty_kernel()((_num_sms(),), (32,), ())] * 200
        empty[0]()
        empty_replay = capture(empty, stream)
        at_rest = energy.measure(empty_replay, len(empty), stream, meter) if meter else None  # while the GPU is cool
        copy_bytes_s = _copy_bandwidth()
        read_bytes_s = ceilings.read_bandwidth()
    return {
        "copy_gbs": round(copy_bytes_s / 1e9, 1),
        "read_gbs": round(read_bytes_s / 1e9, 1),
        **_gemm_rates(torch, stream, budget, meter),
        "empty_us": round(time_replays(empty_replay, len(empty), stream, budget).us, 3),
        "limit_watts": meter.limit_watts() if meter else None,
        "rest_watts": at_rest.as_json()["watts"] if at_rest else None,
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


def _gemm_rates(torch: Any, stream: Any, budget: Budget, meter: Meter | None) -> dict[str, Any]:
    """A square matrix product's rate in TFLOP/s: sustained, with clock and power, and in a burst from rest."""
    try:
        multiply, label = _torch_gemm(torch, stream) if torch else _cupy_gemm(stream)
        with stream:
            burst_s = ceilings.gpu_seconds(multiply, repeats=20)
    except (ImportError, OSError, RuntimeError) as error:  # CuPy loads cuBLAS on first use and raises any of these
        label = f"not measured ({type(error).__name__}: {(str(error) or '?').splitlines()[0]})"
        return {"gemm_tflops": None, "gemm_burst_tflops": None, "gemm_label": label, "gemm_energy": None}

    def replay() -> None:
        for _ in range(GEMM_CALLS):
            multiply()

    sustained = time_replays(replay, GEMM_CALLS, stream, budget, meter).as_json()
    spent = energy.measure(replay, GEMM_CALLS, stream, meter) if meter else None
    flops = 2 * GEMM_SIZE**3
    return {
        "gemm_tflops": round(flops / sustained["us"] * 1e-6, 1),
        "gemm_burst_tflops": round(flops / burst_s * 1e-12, 1),
        "gemm_label": label,
        "gemm_sm_mhz": sustained["sm_mhz"],
        "gemm_watts": sustained["watts"],
        "gemm_energy": spent.as_json() | {"flops": flops} if spent else None,
    }


def _torch_gemm(torch: Any, stream: Any) -> tuple[Callable[[], None], str]:
    external = torch.cuda.ExternalStream(stream.ptr)
    with torch.cuda.stream(external):
        a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        product = torch.empty_like(a)

    def multiply() -> None:
        with torch.cuda.stream(external):
            torch.matmul(a, b, out=product)

    return multiply, f"torch {GEMM_SIZE}³ bfloat16"


def _cupy_gemm(stream: Any) -> tuple[Callable[[], None], str]:
    import cupy

    with stream:
        shape = (GEMM_SIZE, GEMM_SIZE)
        a, b = (normal(shape, seed=seed, dtype=cupy.float16, xp=cupy, scale=1.0) for seed in range(2))
        product = cupy.empty_like(a)

    def multiply() -> None:
        with stream:
            cupy.matmul(a, b, out=product)

    return multiply, f"CuPy {GEMM_SIZE}³ float16"


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
