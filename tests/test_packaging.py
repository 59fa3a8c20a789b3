"""The wheel is whole and stands alone, make targets install nothing where told so, and the linters are content."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mlacore

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("cupy", "numba", "torch", "jax")


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    """Output of a command; the test fails with all of it if the command does."""
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("build", reason="needs the test extra")
    pytest.importorskip("hatchling", reason="needs the test extra")
    folder = tmp_path_factory.mktemp("wheel")
    # Without isolation nothing is fetched: the backend is the one installed here.
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_package_and_kernel_sources_and_nothing_else(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {f"mlacore/cuda/{path.name}" for path in (ROOT / "cuda").iterdir()}
    assert any(name.endswith(".cu") for name in sources)
    assert sources <= names
    assert {f"mlacore/{path.name}" for path in (ROOT / "mlacore").glob("*.py")} <= names
    assert {"mlacore/py.typed", "mlacore/c/mlacore.h.in", "mlacore/c/decode.c"} <= names
    assert not [name for name in names if name.endswith("cuda/__init__.py")]
    assert {re.sub(r"-.*", "", name.split("/")[0]) for name in names} == {"mlacore"}


def test_extras_and_what_the_base_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [re.split(r"[<>=!~ ]", requirement)[0] for requirement in project["dependencies"]] == ["numpy", "ml_dtypes"]
    extras = project["optional-dependencies"]
    assert {"cu12", "cu13", "numba", "jax", "test", "nvtx", "plot", "docs", "cpu", "demo"} == set(extras)
    # NVRTC and the runtime's headers, not the toolkit: neither its metapackage nor the math libraries.
    gigabytes = re.compile(r"cuda-toolkit|cublas|cudnn|cusolver|cusparse|\[all\]|\[ctk\]")
    assert not [
        requirement for name in ("cu12", "cu13") for requirement in extras[name] if gigabytes.search(requirement)
    ]
    assert project["scripts"] == {"mlacore": "mlacore.__main__:main"}


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    # Beside the wheel only what it declares: an import of anything else fails.
    for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        declared = importlib.metadata.distribution(re.split(r"[<>=!~ ]", requirement)[0])
        for top in {file.parts[0] for file in declared.files or []} - {"..", "__pycache__"}:
            (target / top).symlink_to(declared.locate_file(top))
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(target)!r})
import numpy as np
import mlacore, mlacore.jit
target = pathlib.Path({str(target)!r})
assert pathlib.Path(mlacore.__file__).is_relative_to(target), mlacore.__file__
assert mlacore.jit.source_dir() == target / "mlacore" / "cuda", mlacore.jit.source_dir()
cache = mlacore.PagedKVCache(4, max_seqs=1, dtype="float32", device="cpu")
seqs = cache.create(1).seqs
cache.append(seqs, np.ones((1, 70, 512), np.float32), np.ones((1, 70, 64), np.float32))
out, lse = mlacore.mla_decode(np.ones((1, 1, 2, 576), np.float32), cache.pool, *cache.batch(seqs))
assert np.allclose(out, 1) and np.allclose(lse, 24 + np.log(70)), (out, lse)
assert not set({HEAVY!r}) & set(sys.modules)
"""
    run(sys.executable, "-I", "-S", "-c", code, cwd=tmp_path)


def test_sources_do_not_shadow_the_cuda_namespace():
    assert not (ROOT / "cuda" / "__init__.py").exists()
    pytest.importorskip("cuda.bindings", reason="needs the cu13 extra")
    run(sys.executable, "-c", "import cuda.bindings.driver", cwd=ROOT)  # with ./cuda first on the path


@pytest.mark.parametrize(
    "target",
    ["install", "demo", "test", "test-gpu", "compile", "bench", "bench-cache", "table", "docs", "lint", "format"],
)
def test_no_target_installs_into_an_existing_interpreter(target):
    plan = run("make", "--dry-run", target, f"PYTHON={sys.executable}", "VENV=")
    assert sys.executable in plan
    assert "pip" not in plan
    assert "venv " not in plan


def test_every_target_is_explained():
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    explained = re.findall(r"^  ([a-z-]+) ", run("make", "help"), re.MULTILINE)
    assert sorted(explained) == sorted(phony.split())


def test_docs_hold_every_public_name(tmp_path):
    pytest.importorskip("pdoc", reason="needs the docs extra")
    pytest.importorskip("jax", reason="needs the jax extra")
    run("make", "docs", f"PYTHON={sys.executable}", "VENV=", f"DOCS={tmp_path}")
    page = (tmp_path / "mlacore.html").read_text()
    for name in set(mlacore.__all__) - {"__version__"}:
        assert f'id="{name}"' in page, name
    assert "multiples of 16 bytes" in page, "docstrings are in it"
    jax_page = (tmp_path / "mlacore" / "jax.html").read_text()
    for name in ("DecodePlan", "append", "mla_decode", "plan_decode"):
        assert f'id="{name}"' in jax_page, name
    assert str(ROOT) not in page


@pytest.mark.parametrize("arguments", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)])
def test_linters_are_clean(arguments):
    pytest.importorskip(arguments[0], reason="needs the test extra")
    run(sys.executable, "-m", *arguments)


def test_cuda_sources_keep_to_the_line_length():
    long = [
        f"{path.name}:{number}"
        for path in sorted((ROOT / "cuda").iterdir())
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert long == []
