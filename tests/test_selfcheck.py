"""The self-test: it passes here, and each kind of wrong result fails it."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

import mlacore
from mlacore import ceilings, dispatch, info, jit, selfcheck
from mlacore.__main__ import main

SMALL = (selfcheck.Check("few", 4, (3, 0, 100)),)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(selfcheck, "CPU_CHECKS", SMALL)


def test_the_cpu_passes(capsys):
    assert main(["check", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.count("  ok  ") == len(selfcheck.CPU_CHECKS)
    assert re.search(r"^PASSED on the NumPy backend: \d+ checks, errors up to \d+% of their limits", text, re.MULTILINE)
    assert "No GPU" not in text, "none was asked for"


def test_a_machine_without_a_gpu_is_told(small, monkeypatch, capsys):
    monkeypatch.setattr(info, "problems", lambda env: ["no driver"])
    assert main(["check"]) == 0
    assert "No GPU is checked, only the NumPy backend" in capsys.readouterr().out
    assert main(["check", "--device", "gpu"]) == 1
    assert "FAILED: the GPU cannot be used here:\n  - no driver" in capsys.readouterr().out


def scaled(out, lse):
    return out * out.dtype.type(1.02), lse


def shifted(out, lse):
    return out, lse + np.float32(1e-3)


def not_a_number(out, lse):
    return np.where(np.arange(out.shape[-1]) == 7, out.dtype.type(np.nan), out), lse


def full_where_empty(out, lse):
    return out, np.where(np.isneginf(lse), np.float32(0), lse)


def never_the_same(out, lse, count=[0]):  # noqa: B006
    count[0] += 1
    return out, lse + np.float32(count[0] * 2e-6)


@pytest.mark.parametrize("wrong", [scaled, shifted, not_a_number, full_where_empty, never_the_same])
def test_a_wrong_result_fails(small, wrong, monkeypatch, capsys):
    right = mlacore.mla_decode
    monkeypatch.setattr(mlacore, "mla_decode", lambda *args, **options: wrong(*right(*args, **options)))
    assert main(["check", "--device", "cpu"]) == 1
    assert "FAILED: 1 of 1 checks on the NumPy backend: few" in capsys.readouterr().out


def test_an_error_fails_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "CPU_CHECKS", (replace(SMALL[0], what="broken", page_size=17), *SMALL))
    assert main(["check", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "FAILED  broken: ValueError" in text
    assert "ok      few" in text


def test_gpu_checks_go_through_every_kernel_shape():
    used = set()
    for check in selfcheck.GPU_CHECKS:
        longest = max(check.lengths) if check.is_bounded else None
        used.add(dispatch.choose(check.num_heads * check.seq_len_q, len(check.lengths), longest))
    shapes = {(shape.tile_rows, shape.cluster_ctas) for shape in used}
    there = {re.search(r"rows(\d+)\.cluster(\d+)", name).groups() for name in jit.VARIANTS if "rows" in name}
    assert shapes == {(int(rows), int(ctas)) for rows, ctas in there}


def test_share_of_floor():
    measured = ceilings.Ceilings(3e12, "", 600e12, "")
    load_s = 2 * 64 * (8192 * 576 + 16 * 1088) / 3e12
    assert selfcheck.share_of_floor(2 * load_s, 16, 64, 8192, measured) == pytest.approx(0.5)
    product_s = 2 * 64 * 8192 * 128 * 1088 / 600e12
    assert selfcheck.share_of_floor(product_s, 128, 64, 8192, measured) == pytest.approx(1.0)
    without = ceilings.Ceilings(3e12, "", None, "no cuBLAS")
    assert selfcheck.share_of_floor(2 * load_s, 16, 64, 8192, without) == pytest.approx(0.5)
    assert selfcheck.share_of_floor(product_s, 128, 64, 8192, without) is None


@pytest.mark.gpu
def test_the_gpu_passes(capsys):
    assert main(["check", "--device", "gpu"]) == 0
    text = capsys.readouterr().out
    assert text.count("  ok  ") == len(selfcheck.GPU_CHECKS)
    found = re.search(r"^PASSED on the SM90 kernels: .*share of floor .*; (\d+) s$", text, re.MULTILINE)
    assert found, text
    assert int(found.group(1)) <= 120
