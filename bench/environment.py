"""What a run was measured on: the GPU, its state, versions and commit, as JSON."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import mlacore
from mlacore import driver, info

SMI_FIELDS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
_ROOT = Path(__file__).resolve().parents[1]


def why_not() -> str | None:
    """Why the benches cannot run here; None if they can."""
    env = info.collect()
    if driver.hopper_devices() and env.cupy.version and env.nvrtc.version:
        return None
    return f"The benches measure the SM90 kernels.\n\n{info.report(env)}"


@functools.cache
def pci_bus_id() -> str:
    """The current device's address, as NVML and nvidia-smi take it."""
    import cupy

    return cupy.cuda.runtime.deviceGetPCIBusId(cupy.cuda.Device().id)


def describe_gpu() -> dict[str, Any]:
    """The current device."""
    import cupy

    env = info.collect()
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    name = properties["name"].decode()
    return {
        "name": name,
        "slug": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "driver": env.driver_version or _smi("driver_version").get("driver_version", "?"),
        "cuda": ".".join(map(str, env.driver_cuda or ())),
        "num_sms": properties["multiProcessorCount"],
        "l2_bytes": properties["l2CacheSize"],
        "memory_bytes": properties["totalGlobalMem"],
    }


def gpu_state() -> dict[str, str]:
    """Clocks, power and temperature now; empty without nvidia-smi."""
    return _smi(*SMI_FIELDS)


def versions(torch: Any) -> dict[str, str]:
    """Of everything that takes part; `torch` may be None."""
    env = info.collect()
    found = {"mlacore": mlacore.__version__, "python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in ("numpy", "ml_dtypes")}
    found |= {"cupy": env.cupy.version or "", "nvrtc": env.nvrtc.version or ""}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["jax"] = importlib.metadata.version("jax")
    return found | ({"torch": torch.__version__} if torch else {})


def commit() -> str | None:
    """What git calls the working tree; None outside a checkout."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    return None


def _smi(*fields: str) -> dict[str, str]:
    query = ["nvidia-smi", f"--id={pci_bus_id()}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (cell.strip() for cell in text.strip().split(",")), strict=False))
