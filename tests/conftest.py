"""GPU tests skip with a reason where there is no Hopper GPU, or fail where one was promised (MLACORE_REQUIRE_GPU=1)."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from pretended_gpu import FakeDriver

pytest.register_assert_rewrite("cache_model", "pretended_gpu")

# One core a pytest-xdist worker: BLAS threads of several processes would wait for one another. Before NumPy's import.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# JAX would take most of a GPU's memory at once, and the other tests need some too. Before JAX's first array.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# The same examples on every run: a red build must be reproducible, and shared machines are too uneven for deadlines.
settings.register_profile("mlacore", derandomize=True, deadline=None, database=None)
settings.load_profile("mlacore")


@functools.cache
def missing_gpu() -> str | None:
    """Why the GPU tests cannot run here, or None if they can."""
    try:
        import cupy
    except ImportError as error:
        return f"needs CuPy, which cannot be imported: {error}"
    # Numba's simulator claims a GPU; CuPy does not.
    if not cupy.cuda.is_available():
        return "needs a Hopper GPU, found none"
    capability = cupy.cuda.Device().compute_capability
    return None if capability == "90" else f"needs a Hopper GPU, found compute capability {capability}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or (reason := missing_gpu()) is None:
        return
    if os.environ.get("MLACORE_REQUIRE_GPU") == "1":
        pytest.fail(f"MLACORE_REQUIRE_GPU=1, but the test {reason}", pytrace=False)
    pytest.skip(reason)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What CuPy keeps of large tests is given back: workers and the programs that tests start share one GPU."""
    if item.get_closest_marker("gpu") is not None and missing_gpu() is None:
        import cupy

        pool = cupy.get_default_memory_pool()
        if pool.total_bytes() > 1 << 30:
            pool.free_all_blocks()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A driver that writes down what it is given, for tests of launches."""
    pytest.importorskip("cupy")
    from pretended_gpu import pretend_driver

    return pretend_driver(monkeypatch)
