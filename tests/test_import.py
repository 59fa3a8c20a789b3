"""`import mlacore` costs next to nothing and pulls in no GPU library; nor does work in NumPy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

import mlacore

HEAVY = {"cupy", "numba", "torch", "jax", "cuda.bindings", "matplotlib", "nvtx"}
BUDGET_S = 0.2


def fresh_python(script: str) -> Any:
    """Run `script` in a new interpreter that sees no GPU; returns the JSON it prints."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_time_and_weight() -> None:
    script = """
import json, sys, time
import numpy
start = time.perf_counter()
import mlacore
print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))
"""
    runs = [fresh_python(script) for _ in range(3)]
    assert HEAVY.isdisjoint(runs[0][1])
    assert min(seconds for seconds, _ in runs) < BUDGET_S


def test_decode_in_numpy_needs_no_gpu_library() -> None:
    script = """
import json, sys
import numpy as np
import mlacore
q, kv_cache = np.ones((1, 1, 2, 576), np.float32), np.ones((1, 64, 1, 576), np.float32)
out, lse = mlacore.mla_decode(q, kv_cache, np.zeros((1, 1), np.int32), np.array([3], np.int32))
assert (out == 1).all()
mlacore.merge_states([out, out], [lse, lse])
from mlacore.flash_mla import flash_mla_with_kvcache, get_mla_metadata
flash_mla_with_kvcache(q, kv_cache, np.zeros((1, 1), np.int32), np.array([3], np.int32), 512, *get_mla_metadata())
print(json.dumps(sorted(sys.modules)))
"""
    assert HEAVY.isdisjoint(fresh_python(script))


@pytest.mark.parametrize("name", sorted(mlacore.__all__))
def test_public_names(name: str) -> None:
    value = getattr(mlacore, name)
    assert name in dir(mlacore)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__, "public names are documented"


def test_star_import_and_unknown_names() -> None:
    namespace: dict[str, Any] = {}
    exec("from mlacore import *", namespace)
    assert set(mlacore.__all__) <= set(namespace)
    with pytest.raises(AttributeError, match="module 'mlacore' has no attribute 'nonsense'"):
        _ = mlacore.nonsense
    assert mlacore.__version__.count(".") == 2
