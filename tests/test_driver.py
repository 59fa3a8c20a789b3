"""Devices and switches without a GPU: what import survives, and how other GPUs, forks and typos are answered."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlacore import driver, jit, libcuda, switches

ROOT = Path(__file__).parents[1]


def test_other_gpus_are_named(monkeypatch):
    monkeypatch.setattr(driver, "compute_capability", lambda device: (8, 0))
    monkeypatch.setattr(driver, "device_name", lambda device: "NVIDIA A100")
    with pytest.raises(
        RuntimeError, match=r"need a Hopper GPU .* device 1 is NVIDIA A100 with 8\.0\. NumPy arrays run"
    ):
        driver.require_hopper(1)
    monkeypatch.setattr(driver, "compute_capability", lambda device: (9, 0))
    driver.require_hopper(1)


def test_a_fork_of_an_initialised_process_is_told_so(monkeypatch):
    monkeypatch.setattr(libcuda, "_initialised_in", [os.getpid() + 1])
    with pytest.raises(RuntimeError, match=r"before this process was forked.*spawn.*MLACORE_COMPILE=lazy"):
        driver.hopper_devices()


def test_threads_may_initialise_the_driver_at_once(monkeypatch):
    both_inside = threading.Barrier(2, timeout=10)

    def load(name: str) -> Any:
        return types.SimpleNamespace(cuInit=lambda flags: both_inside.wait() * 0)

    monkeypatch.setattr(libcuda.ctypes, "CDLL", load)
    monkeypatch.setattr(libcuda, "_initialised_in", [])
    monkeypatch.setattr(libcuda, "_initialised_library", functools.cache(libcuda._initialised_library.__wrapped__))
    with ThreadPoolExecutor(2) as pool:
        assert None not in [call.result() for call in [pool.submit(libcuda.library) for _ in range(2)]]
    assert libcuda.library() is libcuda.library()


def test_default_kernels_are_loaded_side_by_side(monkeypatch):
    loaded, two_inside = [], threading.Barrier(2, timeout=10)
    defaults = [name for name, variant in jit.VARIANTS.items() if variant.is_default]

    def load(name: str) -> None:
        if name in defaults[:2]:
            two_inside.wait()  # one alone would wait here until it breaks
        loaded.append(name)

    monkeypatch.setattr(driver, "_kernel", load)
    driver.load_default_kernels()
    assert sorted(loaded) == sorted(defaults)


@pytest.mark.parametrize("error", [ImportError("compiling needs NVRTC"), jit.CompileError("no"), RuntimeError("no")])
def test_what_keeps_a_default_kernel_from_loading_surfaces(monkeypatch, error):
    def fail(variant: jit.Variant) -> bytes:
        raise error

    monkeypatch.setattr(jit, "cubin", fail)
    monkeypatch.setattr(driver, "_kernel", functools.cache(driver._kernel.__wrapped__))
    with pytest.raises(type(error), match=str(error)) as caught:
        driver.load_default_kernels()
    assert caught.value is error


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )


BROKEN = """
from mlacore import driver
driver.hopper_devices = lambda: [0]
def broken(): raise {error}
driver.load_default_kernels = broken
import importlib, mlacore
importlib.reload(mlacore)
import numpy
print(mlacore.plan_decode(numpy.zeros(1, numpy.int32), num_heads=1).batch)
"""


@pytest.mark.parametrize("error", ["RuntimeError('loading failed')", "ImportError('no NVRTC')", "OSError('no space')"])
def test_import_survives_kernels_that_cannot_be_loaded(error):
    done = run_python(BROKEN.format(error=error), MLACORE_COMPILE="eager")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"
    assert "no GPU kernels: " in done.stderr
    assert "python -m mlacore info" in done.stderr


def test_lazy_import_does_not_look_for_a_gpu():
    code = "import sys, mlacore; print('mlacore.driver' in sys.modules)"
    assert run_python(code, MLACORE_COMPILE="lazy").stdout.strip() == "False"
    assert run_python(code, MLACORE_COMPILE="eager").stdout.strip() == "True"


def test_log_switch_shows_what_is_compiled():
    code = "from mlacore import jit; jit.compile(jit.VARIANTS['cache_gather'])"
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs the cu13 extra")
    assert "compiled cache_gather in" in run_python(code, MLACORE_LOG="debug").stderr
    assert "compiled" not in run_python(code, MLACORE_LOG="").stderr


@pytest.mark.parametrize(
    ("variable", "value", "call", "fallback"),
    [
        ("MLACORE_COMPILE", "lazzy", switches.compiles_at_import, True),
        ("MLACORE_CHECK", "maybe", switches.checks_indices, False),
        ("MLACORE_LOG", "loud", switches.log_level, None),
    ],
)
def test_unknown_values_warn_and_count_as_unset(monkeypatch, variable, value, call, fallback):
    monkeypatch.setenv(variable, value)
    with pytest.warns(RuntimeWarning, match=rf"{variable}: got '{value}', expected one of "):
        assert call() is fallback


def test_values_are_read_in_any_case(monkeypatch):
    for variable, value in (("MLACORE_COMPILE", "Lazy"), ("MLACORE_CHECK", "1"), ("MLACORE_LOG", "DEBUG")):
        monkeypatch.setenv(variable, value)
    assert (switches.compiles_at_import(), switches.checks_indices(), switches.log_level()) == (False, True, 10)
