"""What `python -m mlacore info` shows: machine, libraries, kernels built, and how to get what is missing."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlacore
from mlacore import driver, jit

LEAST_CUDA = (12, 8)  # of the driver, for the `cu12` extra's libraries

# Of CuPy, NVRTC and Numba-CUDA, as in pyproject.toml.
_PACKAGES = {
    "cu13": (
        "'cupy-cuda13x>=14.0.1,<15' 'nvidia-cuda-runtime==13.*'",
        "'cuda-bindings==13.*' 'nvidia-cuda-nvrtc==13.*'",
        "'numba-cuda[cu13]>=0.30,<0.31'",
    ),
    "cu12": (
        "'cupy-cuda12x>=14.0.1,<15' 'nvidia-cuda-runtime-cu12>=12.8,<13'",
        "'cuda-bindings>=12.9.1,<13' 'nvidia-cuda-nvrtc-cu12>=12.8,<13'",
        "'numba-cuda[cu12]>=0.30,<0.31'",
    ),
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device as the driver reports it."""

    name: str
    compute_capability: tuple[int, int]
    num_sms: int


@dataclass(frozen=True, slots=True)
class Library:
    """An optional library: its version, or None and why it cannot be used."""

    version: str | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Environment:
    """Everything `report` prints. `driver_cuda` is None where no driver answers."""

    driver_version: str | None
    driver_cuda: tuple[int, int] | None
    gpus: tuple[Gpu, ...]
    nvrtc: Library
    cupy: Library
    numba_cuda: Library
    cache_dir: Path
    kernels: tuple[tuple[str, bool], ...]


def collect() -> Environment:
    """Look at this machine. Needs no GPU and none of the optional libraries; creates no CUDA context."""
    driver_cuda, gpus = _query_driver()
    nvrtc = _library(_nvrtc_version)
    return Environment(
        driver_version=_driver_version(),
        driver_cuda=driver_cuda,
        gpus=gpus,
        nvrtc=nvrtc,
        cupy=_library(lambda: importlib.import_module("cupy").__version__),
        numba_cuda=_library(lambda: importlib.metadata.version("numba-cuda")),
        cache_dir=jit.cache_dir(),
        # A cubin's name in the cache holds the compiler's version, so without NVRTC nothing can be found there.
        kernels=tuple(jit.status() if nvrtc.version else ((name, False) for name in jit.VARIANTS)),
    )


def report(env: Environment) -> str:
    """The environment as text, problems last."""
    return "\n".join(_lines(env))


def problems(env: Environment) -> list[str]:
    """What keeps the kernels from running here, each with the way out; empty where nothing does."""
    found = []
    if env.driver_cuda is None:
        found.append("no NVIDIA driver answers (libcuda.so.1): the kernels need a Hopper GPU (H100, H200, H800, H20)")
    elif not env.gpus:
        found.append("the driver shows no GPU: see CUDA_VISIBLE_DEVICES, and the container's GPU option")
    elif all(gpu.compute_capability != driver.HOPPER for gpu in env.gpus):
        have = ", ".join(f"{gpu.name} ({_dotted(gpu.compute_capability)})" for gpu in env.gpus)
        found.append(f"no GPU of compute capability {_dotted(driver.HOPPER)}; found {have}")
    driver_cuda = env.driver_cuda or (13, 0)
    if driver_cuda < LEAST_CUDA:
        found.append(
            f"the driver offers CUDA {_dotted(driver_cuda)}: install driver 570 (CUDA {_dotted(LEAST_CUDA)}) or newer"
        )
    elif env.nvrtc.version and int(env.nvrtc.version.split(".")[0]) > driver_cuda[0]:
        found.append(
            f"the driver offers CUDA {_dotted(driver_cuda)}, NVRTC is {env.nvrtc.version}: install the cu12 extra in "
            "place of cu13, or driver 580 (CUDA 13.0) or newer"
        )
    for name, library, packages in zip(
        ("CuPy", "NVRTC", "Numba-CUDA"),
        (env.cupy, env.nvrtc, env.numba_cuda),
        _PACKAGES["cu12" if driver_cuda[0] < 13 else "cu13"],
        strict=True,
    ):
        if library.version is None:
            found.append(f"{name}: {library.problem}; {sys.executable} -m pip install {packages}")
    return found


def _lines(env: Environment) -> Iterator[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "ml_dtypes"))
    yield f"mlacore     {mlacore.__version__} in {Path(mlacore.__file__).parent}"
    yield f"Python      {platform.python_version()} ({sys.executable}), {versions}"
    for index, gpu in enumerate(env.gpus):
        yield f"GPU {index:<8}{gpu.name}, compute capability {_dotted(gpu.compute_capability)}, {gpu.num_sms} SMs"
    if not env.gpus:
        yield "GPU         none"
    cuda = (
        "none"
        if env.driver_cuda is None
        else f"{env.driver_version or 'version unknown'}, CUDA {_dotted(env.driver_cuda)}"
    )
    yield f"driver      {cuda}"
    for name, library in (("NVRTC", env.nvrtc), ("CuPy", env.cupy), ("Numba-CUDA", env.numba_cuda)):
        yield f"{name:<12}{library.version or 'missing'}"
    cubins = list(env.cache_dir.glob("**/*.cubin")) if env.cache_dir.is_dir() else []
    size_mib = sum(path.stat().st_size for path in cubins) / 2**20
    yield f"cache       {env.cache_dir} ({len(cubins)} cubins, {size_mib:.1f} MiB)"
    yield f"kernels     {sum(built for _, built in env.kernels)} of {len(env.kernels)} built for {jit.ARCH}"
    for name, built in env.kernels:
        yield f"            {'built    ' if built else 'not built'}  {name}"
    yield ""
    missing = problems(env)
    if not missing:
        yield "Ready: NumPy arrays run on the CPU backend, GPU arrays on the SM90 kernels."
        return
    yield "Ready: NumPy arrays run on the CPU backend. GPU arrays cannot be served here:"
    for problem in missing:
        yield f"  - {problem}"


def _library(version: Callable[[], str]) -> Library:
    # A broken install can raise anything at all on import, and this report is where one comes to find out.
    try:
        return Library(version())
    except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError):
        return Library(None, "not installed")
    except Exception as error:
        return Library(None, f"installed but unusable ({type(error).__name__}: {str(error).strip().splitlines()[0]})")


def _nvrtc_version() -> str:
    status, major, minor = importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    if int(status) != 0:
        raise RuntimeError(f"nvrtcVersion returned {status}")
    return f"{major}.{minor}"


def _query_driver() -> tuple[tuple[int, int] | None, tuple[Gpu, ...]]:
    try:
        lib = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, ()
    number = ctypes.c_int()
    if lib.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None, ()
    driver_cuda = (number.value // 1000, number.value % 1000 // 10)
    if lib.cuInit(0) != 0:  # a driver with no device to show fails here
        return driver_cuda, ()
    lib.cuDeviceGetCount(ctypes.byref(number))
    return driver_cuda, tuple(
        Gpu(driver.device_name(device), driver.compute_capability(device), driver.num_sms(device))
        for device in range(number.value)
    )


def _driver_version() -> str | None:
    try:
        found = re.search(r"\b(\d{3}\.\d+(\.\d+)?)\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found.group(1) if found else None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
