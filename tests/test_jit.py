"""Kernels compile without a GPU: no spills, no serialised WGMMA; structs match; the cubin cache keeps its promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from mlacore import jit, params

pytest.importorskip("cuda.bindings.nvrtc", reason="needs the cu13 extra")


@pytest.fixture(scope="module")
def compiled() -> dict[str, jit.Compiled]:
    return {name: jit.compile(variant) for name, variant in jit.VARIANTS.items()}


@pytest.mark.parametrize("name", jit.VARIANTS)
def test_variant_has_no_spills_and_no_warnings(compiled, name):
    log = compiled[name].log
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert usage == [("0", "0", "0")], log
    for code in ("C7508", "C7510", "C7514", "C7515", "C7517", "serialized", "injected", "warning"):
        assert code not in log, log  # setmaxnreg ignored, WGMMA serialised, waits injected


def test_a_broken_source_reports_kernel_definitions_and_log():
    broken = jit.Variant("broken", "mla_plan", (("MLA_PLAN_THREADS", "nonsense"),))
    with pytest.raises(jit.CompileError, match=r"(?s)broken did not compile .*-DMLA_PLAN_THREADS=nonsense.*error"):
        jit.compile(broken)


def _struct_checks(struct: str, dtype: np.dtype) -> str:
    lines = [f'static_assert(sizeof({struct}) == {dtype.itemsize}, "size");']
    for name, (field, offset) in ((name, dtype.fields[name][:2]) for name in dtype.names):
        lines.append(f'static_assert(__builtin_offsetof({struct}, {name}) == {offset}, "{name}");')
        lines.append(f'static_assert(sizeof({struct}::{name}) == {field.itemsize}, "size of {name}");')
    return '#include "params.cuh"\n' + "\n".join(lines)


def _compiles(monkeypatch, source: str) -> bool:
    sources = {**jit._sources(), "check.cu": source.encode()}
    monkeypatch.setattr(jit, "_sources", lambda: sources)
    try:
        jit.compile(jit.Variant("check", "check", ()))
    except jit.CompileError:
        return False
    return True


@pytest.mark.parametrize("struct", params.STRUCTS)
def test_structs_are_equal_on_both_sides(monkeypatch, struct):
    dtype = params.STRUCTS[struct]
    assert _compiles(monkeypatch, _struct_checks(struct, dtype))
    swapped = np.dtype([(n, dtype.fields[n][0]) for n in (*dtype.names[1::-1], *dtype.names[2:])], align=True)
    assert not _compiles(monkeypatch, _struct_checks(struct, swapped)), "the check itself must be able to fail"


VARIANT = jit.VARIANTS["cache_gather"]


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLACORE_CACHE_DIR", str(tmp_path / "cubins"))
    return tmp_path / "cubins"


def test_second_use_comes_from_the_cache(cache_folder, monkeypatch):
    first = jit.cubin(VARIANT)
    assert first.startswith(b"\x7fELF")
    assert (VARIANT.name, True) in jit.status()
    monkeypatch.setattr(jit, "compile", lambda variant: pytest.fail("compiled again"))
    assert jit.cubin(VARIANT) == first


def test_a_damaged_entry_is_rebuilt(cache_folder):
    first = jit.cubin(VARIANT)
    (entry,) = cache_folder.glob("*.cubin")
    entry.write_bytes(entry.read_bytes()[:-100])
    assert (VARIANT.name, False) in jit.status()
    assert jit.cubin(VARIANT) == first
    assert (VARIANT.name, True) in jit.status()


def test_a_folder_that_cannot_be_written_only_costs_the_compilation(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MLACORE_CACHE_DIR", str(tmp_path / "file" / "cubins"))
    assert jit.cubin(VARIANT).startswith(b"\x7fELF")


def test_compile_all_fills_the_cache(cache_folder, monkeypatch):
    monkeypatch.setattr(jit, "VARIANTS", {name: jit.VARIANTS[name] for name in ("mla_plan", "cache_gather")})
    lines: list[str] = []
    jit.compile_all(lines.append)
    assert [line.split()[0] for line in lines] == ["mla_plan", "cache_gather"]
    assert all("0 bytes spill stores" in line and "registers" in line for line in lines)
    assert jit.status() == [("mla_plan", True), ("cache_gather", True)]


def test_a_full_disk_only_costs_the_entry(cache_folder, monkeypatch):
    compiled, real = [], jit.compile
    monkeypatch.setattr(jit, "compile", lambda variant: compiled.append(1) or real(variant))

    def full(entry, built):
        raise OSError("no space left on device")

    monkeypatch.setattr(jit, "_publish", full)
    assert jit.cubin(VARIANT).startswith(b"\x7fELF")
    assert len(compiled) == 1


def test_cache_folder_without_a_home(monkeypatch):
    for variable in ("MLACORE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(jit.os.path, "expanduser", lambda path: path)  # what it gives without HOME and passwd entry
    assert jit.cache_dir().name == f"mlacore-{os.getuid()}"


def test_digest_sees_headers_constants_and_flags(monkeypatch):
    before = jit.digest(VARIANT)
    sources = jit._sources()
    monkeypatch.setattr(jit, "_sources", lambda: {**sources, "ptx.cuh": sources["ptx.cuh"] + b"\n"})
    assert jit.digest(VARIANT) != before
    monkeypatch.setattr(jit, "_sources", lambda: sources)
    monkeypatch.setattr(jit, "FLAGS", (*jit.FLAGS, "-DX"))
    assert jit.digest(VARIANT) != before
    monkeypatch.undo()
    assert jit.digest(jit.Variant(VARIANT.name, VARIANT.kernel, (*VARIANT.defines, ("Y", 1)))) != before


IMPORT_ON_A_GPU_MACHINE = """
import os, sys, time
from pathlib import Path

import mlacore  # lazily: what an eager import does comes below, with a compiler that counts and a GPU that is not there
from mlacore import driver, jit

def compile(variant):
    with open(sys.argv[1], "a") as log:
        log.write(variant.name + "\\n")
    time.sleep(0.05)
    return jit.Compiled(b"\\x7fELF" + variant.name.encode(), "")

jit.compile, jit.nvrtc_version = compile, lambda: (13, 0)
driver.hopper_devices = lambda: [0]
driver._kernel = lambda name: jit.cubin(jit.VARIANTS[name])
print("ready", flush=True)
sys.stdin.readline()
os.environ["MLACORE_COMPILE"] = "eager"
mlacore._load_kernels()
assert all(built for name, built in jit.status() if jit.VARIANTS[name].is_default)
"""


def test_sixteen_processes_that_import_together_compile_once(cache_folder, tmp_path):
    log = tmp_path / "log"
    environment = os.environ | {"MLACORE_COMPILE": "lazy", "OPENBLAS_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", IMPORT_ON_A_GPU_MACHINE, str(log)]
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(16)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "no GPU kernels" not in errors
    compiled = log.read_text().split()
    assert sorted(compiled) == sorted(name for name, variant in jit.VARIANTS.items() if variant.is_default)


def test_a_read_only_folder_serves_what_is_in_it(cache_folder, monkeypatch):
    monkeypatch.setattr(jit, "compile", lambda variant: jit.Compiled(b"\x7fELF" + variant.name.encode(), ""))
    kept = jit.cubin(VARIANT)
    names = {path.name for path in cache_folder.iterdir()}
    cache_folder.chmod(0o555)

    def refused(path, *_):  # to root no folder is read-only
        raise PermissionError(f"read-only: {path}")

    monkeypatch.setattr(jit, "open", refused, raising=False)
    monkeypatch.setattr(jit.tempfile, "mkstemp", lambda dir, prefix: refused(dir))
    try:
        assert jit.cubin(VARIANT) == kept
        assert jit.cubin(jit.VARIANTS["cache_copy"]) == b"\x7fELFcache_copy"  # compiled for this process alone
        assert {path.name for path in cache_folder.iterdir()} == names
        assert (VARIANT.name, True) in jit.status()
        with pytest.raises(OSError, match="cannot be kept there"):
            jit.build_all(lambda line: None)
    finally:
        cache_folder.chmod(0o755)


def test_missing_nvrtc_says_what_to_install(monkeypatch):
    jit._nvrtc.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    try:
        with pytest.raises(ImportError, match=r"pip install 'cuda-bindings==13\.\*' 'nvidia-cuda-nvrtc==13\.\*'"):
            jit.compile(VARIANT)
    finally:
        jit._nvrtc.cache_clear()
