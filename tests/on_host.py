"""CUDA sources built by the host's C++ compiler, with a shim in place of what CUDA would bring."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from mlacore import jit


def build(
    shim: str, defines: Mapping[str, object], *, ptx: str | None = None, flags: tuple[str, ...] = ()
) -> ctypes.CDLL:
    """`shim`, C++ that includes sources of `cuda/`, as a library; `ptx` stands for ptx.cuh. Needs a compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    with tempfile.TemporaryDirectory(prefix="mlacore-") as name:
        folder = Path(name)
        for source in jit.source_dir().glob("*.cu*"):
            shutil.copy(source, folder)
        if ptx is not None:
            (folder / "ptx.cuh").write_text(ptx)
        (folder / "shim.cpp").write_text(shim)
        command = [compiler, "-std=c++20", "-O1", *flags, "-shared", "-fPIC", "-pthread"]
        command += [f"-D{key}={value}" for key, value in defines.items()]
        subprocess.run([*command, "-o", str(folder / "shim.so"), str(folder / "shim.cpp")], check=True)
        return ctypes.CDLL(str(folder / "shim.so"))
