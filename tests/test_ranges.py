"""NVTX ranges: none, at no cost, unless the switch is on."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import types
import warnings
from typing import Any

import pytest

from mlacore import DecodePlan, PagedKVCache, merge_states, mla_decode, plan_decode, ranges
from mlacore.ranges import marked

# A package of that name which notes the ranges; decode and append in NumPy, then what it noted.
SCRIPT = """
import functools, json, sys, types
ranges = []
def annotate(message, domain):
    def decorate(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            ranges.append([domain, message])
            return function(*args, **kwargs)
        return call
    return decorate
sys.modules["nvtx"] = types.SimpleNamespace(annotate=annotate)
import numpy as np
import mlacore
cache = mlacore.PagedKVCache(num_pages=4, dtype="float32", device="cpu")
seqs = cache.create(1).seqs
ranges.clear()
cache.append(seqs, np.ones((3, 512), np.float32), np.ones((3, 64), np.float32), num_tokens=3)
table, lengths = cache.batch(seqs)
plan = mlacore.plan_decode(lengths, num_heads=2)
plan.update(lengths)
mlacore.mla_decode(np.ones((1, 1, 2, 576), np.float32), cache.pool, table, lengths, plan=plan)
print(json.dumps(ranges))
"""


@pytest.fixture(autouse=True)
def not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found of the package is remembered; not from test to test."""
    monkeypatch.setattr(ranges, "_annotate", functools.cache(ranges._annotate.__wrapped__))


def run(switch: str | None) -> list[list[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "MLACORE_NVTX"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} | ({} if switch is None else {"MLACORE_NVTX": switch})
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ranges_around_plan_decode_and_append() -> None:
    noted = run("1")
    assert {domain for domain, _ in noted} == {"mlacore"}
    names = [name for _, name in noted]
    assert names[0] == "PagedKVCache.append"
    assert names[-3:] == ["plan_decode", "DecodePlan.update", "mla_decode"]


@pytest.mark.parametrize("switch", [None, "0"])
def test_off_is_the_default(switch: str | None) -> None:
    assert run(switch) == []


def test_off_leaves_the_functions_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLACORE_NVTX", raising=False)

    def function() -> None:
        pass

    assert marked("name")(function) is function
    for public in (mla_decode, plan_decode, merge_states, DecodePlan.update, PagedKVCache.append, PagedKVCache.write):
        assert not hasattr(public, "__wrapped__")


def test_on_without_the_package_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLACORE_NVTX", "1")
    monkeypatch.setitem(sys.modules, "nvtx", None)  # type: ignore[arg-type]

    def function() -> None:
        pass

    with pytest.warns(RuntimeWarning, match=r"^MLACORE_NVTX=1, but nvtx cannot be imported .*: pip install nvtx$"):
        assert marked("name")(function) is function
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert marked("other")(function) is function


def test_on_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLACORE_NVTX", "1")
    fake: Any = types.SimpleNamespace(annotate=lambda message, domain: lambda function: (message, domain, function))
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    assert marked("name")(len) == ("name", "mlacore", len)
