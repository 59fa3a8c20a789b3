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


def test_processes_that_start_together_compile_once(cache_folder):
    code = (
        "from mlacore import jit\n"
        "compiled, real = [], jit.compile\n"
        "jit.compile = lambda variant: compiled.append(1) or real(variant)\n"
        "jit.cubin(jit.VARIANTS['mla_plan'])\n"
        "print(len(compiled))"
    )
    environment = os.environ | {"MLACORE_COMPILE": "lazy"}  # else a GPU machine compiles before the count begins
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(4)
    ]
    counts = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert sum(counts) == 1, counts


def test_missing_nvrtc_says_what_to_install(monkeypatch):
    jit._nvrtc.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    try:
        with pytest.raises(ImportError, match=r"pip install 'cuda-bindings==13\.\*' 'nvidia-cuda-nvrtc==13\.\*'"):
            jit.compile(VARIANT)
    finally:
        jit._nvrtc.cache_clear()
