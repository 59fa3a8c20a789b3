"""What this machine can do at best: memory bandwidth and matrix rate, measured, to hold a kernel's figures against."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlacore import driver
from mlacore.plan import available_cpus

# Four independent 16-byte loads a thread and step keep enough bytes in flight to saturate HBM; the store never
# happens in practice, but the compiler cannot know that.
_READ_SOURCE = r"""
extern "C" __global__ void read_all(const uint4 *__restrict__ source, long long n, unsigned *sink) {
    const long long step = (long long)gridDim.x * blockDim.x;
    unsigned mixed = 0;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < n; i += 4 * step) {
        const uint4 a = source[i], b = source[i + step], c = source[i + 2 * step], d = source[i + 3 * step];
        mixed ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; i < n; i += step) {
        const uint4 a = source[i];
        mixed ^= a.x ^ a.y ^ a.z ^ a.w;
    }
    if (mixed == 0x9e3779b9u) *sink = mixed;
}
"""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured upper bounds; a rate that could not be measured is None, and its label says why.

    Attributes
    ----------
    bytes_per_s : float
        Memory bandwidth.
    bytes_label : str
        How it was measured.
    flops_per_s : float or None
        Matrix-product rate, two FLOP a multiply-add.
    flops_label : str
        How it was measured, or why not.
    """

    bytes_per_s: float
    bytes_label: str
    flops_per_s: float | None
    flops_label: str


def measure_cpu(*, copy_bytes: int = 1 << 28, gemm_size: int = 2048) -> Ceilings:
    """Copy bandwidth (bytes read plus bytes written, every core copying) and float32 matrix product of NumPy."""
    workers = min(available_cpus(), 16)
    source = np.ones(copy_bytes // 4, np.float32)
    target = np.empty_like(source)
    pairs = list(zip(np.array_split(target, workers), np.array_split(source, workers), strict=True))
    with ThreadPoolExecutor(workers) as pool:
        copy_s = _best_s(lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs)))
    a = np.random.default_rng(0).standard_normal((gemm_size, gemm_size), dtype=np.float32)
    product = np.empty_like(a)
    gemm_s = _best_s(lambda: np.matmul(a, a, out=product))
    return Ceilings(
        2 * source.nbytes / copy_s, "NumPy copy, read + write", 2 * gemm_size**3 / gemm_s, f"NumPy {gemm_size}³ float32"
    )


def measure_gpu() -> Ceilings:
    """Read bandwidth of the current CUDA device, and its float16 matrix product where cuBLAS is installed."""
    rate, label = gemm_rate()
    return Ceilings(read_bandwidth(), "read-only kernel", rate, label)


def read_bandwidth(buffer_bytes: int = 1 << 31) -> float:
    """Bytes per second at which the current device reads a buffer much larger than its L2."""
    import cupy

    buffer = cupy.full(buffer_bytes // 4, 0x3C003C00, cupy.uint32)
    sink = cupy.zeros(1, cupy.uint32)
    num_sms = driver.num_sms(cupy.cuda.Device().id)
    kernel = _read_kernel()
    words = np.int64(buffer_bytes // 16)
    return buffer_bytes / gpu_seconds(lambda: kernel((8 * num_sms,), (256,), (buffer, words, sink)))


def gemm_rate(size: int = 8192) -> tuple[float | None, str]:
    """FLOP per second of a square float16 matrix product through CuPy, and its label; (None, why) without cuBLAS."""
    import cupy

    from mlacore.synthetic import normal

    try:
        a = normal((size, size), seed=0, dtype=cupy.float16, xp=cupy)
        b = normal((size, size), seed=1, dtype=cupy.float16, xp=cupy)
        product = cupy.empty_like(a)
        seconds = gpu_seconds(lambda: cupy.matmul(a, b, out=product))
    except (ImportError, OSError, RuntimeError) as error:  # CuPy loads cuBLAS on first use and raises any of these
        return None, f"not measured: no cuBLAS ({type(error).__name__})"
    return 2 * size**3 / seconds, f"CuPy {size}³ float16"


def gpu_seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    """Median device time of `call` on the current stream, by CUDA events, after two untimed calls."""
    import cupy

    call(), call()
    events = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    events[-1][1].synchronize()
    return float(np.median([cupy.cuda.get_elapsed_time(start, end) for start, end in events])) * 1e-3


@functools.cache
def _read_kernel() -> Any:
    import cupy

    return cupy.RawKernel(_READ_SOURCE, "read_all")


def _best_s(call: Callable[[], Any], repeats: int = 4) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
