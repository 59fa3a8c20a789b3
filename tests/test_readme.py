"""The README's snippets run, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
CODE = "".join(
    path.read_text()
    for pattern in ("mlacore/*.py", "bench/*.py", "tests/conftest.py", "Makefile")
    for path in ROOT.glob(pattern)
)


def on_its_device(snippet: str):
    return pytest.param(snippet, marks=pytest.mark.gpu if "cupy" in snippet else ())


def test_there_is_one_snippet_for_every_machine():
    assert any("cupy" not in snippet for snippet in SNIPPETS)


@pytest.mark.parametrize("snippet", [on_its_device(snippet) for snippet in SNIPPETS])
def test_snippet_runs(snippet, capsys):
    if "import jax" in snippet:
        pytest.importorskip("jax", reason="needs the jax extra")
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})
    # A print with a comment behind it promises its output.
    promised = re.findall(r"^print\(.*\)  # (.*)$", snippet, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == promised


def test_tree_names_every_file_and_no_other():
    (tree,) = re.findall(r"^```\n(cuda/ .*?)^```$", README, re.DOTALL | re.MULTILINE)
    folder, named = "", set()
    for line in tree.splitlines():
        if found := re.match(r"(\w+/)", line):
            folder = found.group(1)
        for name in re.findall(r"(?<=\s)[\w]+\.(?:cuh|cu|py)\b", line):
            named.add(folder + name)
    assert not [name for name in named if not (ROOT / name).exists()]
    present = {f"cuda/{path.name}" for path in (ROOT / "cuda").iterdir()}
    present |= {f"mlacore/{path.name}" for path in (ROOT / "mlacore").glob("[a-z]*.py")}
    assert present - named == set()


def test_switches_are_the_ones_the_code_reads():
    named, read = (set(re.findall(r"\bMLACORE_[A-Z_]+\b", text)) for text in (README, CODE))
    assert named == read


def test_make_targets_exist():
    phony = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", README)) <= set(phony)
