"""MLACORE_CHECK=1: lengths and page ids are looked at, and the first bad one is named."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from cases import Case, Inputs, make_inputs

from mlacore import mla_decode


def raises(kind: type[Exception], message: str) -> Any:
    return pytest.raises(kind, match="^" + re.escape(message))


@pytest.fixture
def checking(monkeypatch: pytest.MonkeyPatch) -> Inputs:
    """Three sequences of 200, 64 and 0 tokens under the checking mode; the arrays may be written."""
    monkeypatch.setenv("MLACORE_CHECK", "1")
    return Inputs(*(array.copy() for array in make_inputs(Case(3, 2, 200, 16, lengths=(200, 64, 0)))))


def test_check_passes_what_is_right(checking: Inputs) -> None:
    """Poison past a sequence's pages included."""
    out, _ = mla_decode(*checking)
    assert np.isfinite(out.astype(np.float32)).all()


@pytest.mark.parametrize("page", [-1, 8, 2147480000, -(2**31)])
def test_check_bad_page(checking: Inputs, page: int) -> None:
    assert len(checking.kv_cache) == 8
    checking.block_table[0, 3] = page
    message = f"block_table: sequence 0, column 3 got page {page}, expected 0 <= page < 8 (num_pages from kv_cache)"
    with raises(IndexError, message):
        mla_decode(*checking)


def test_check_names_the_first_of_many(checking: Inputs) -> None:
    checking.block_table[1, 0] = checking.block_table[0, 2] = checking.block_table[0, 1] = 99
    with raises(IndexError, "block_table: sequence 0, column 1 got page 99"):
        mla_decode(*checking)


@pytest.mark.parametrize(("length", "column"), [(-1, None), (6 * 64 + 1, 6), (2**31 - 1, 33554431)])
def test_check_bad_length(checking: Inputs, length: int, column: int | None) -> None:
    checking.cache_seqlens[1] = length
    needs = "" if column is None else f", which needs column {column} of block_table"
    message = (
        f"cache_seqlens: sequence 1 got length {length}{needs}, expected "
        f"0 <= length <= 384 (max_pages=6 from block_table, page_size=64)"
    )
    with raises(IndexError, message):
        mla_decode(*checking)


@pytest.mark.parametrize("value", ["", "0"])
def test_check_is_off_by_default(checking: Inputs, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MLACORE_CHECK", value)
    checking.block_table[0, 3] = -1
    mla_decode(*checking)
    monkeypatch.delenv("MLACORE_CHECK")
    mla_decode(*checking)
