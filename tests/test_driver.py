"""Devices and switches without a GPU: what import survives, and how other GPUs, forks and typos are answered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlacore import driver, switches

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
    monkeypatch.setattr(driver, "_initialised_in", [os.getpid() + 1])
    with pytest.raises(RuntimeError, match=r"before this process was forked.*spawn.*MLACORE_COMPILE=lazy"):
        driver.hopper_devices()


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
