"""Which kernel serves which rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlacore import dispatch, jit
from mlacore.arrays import GPU_DTYPES
from mlacore.dispatch import FEW_CLUSTER_TOKENS, MANY_SEQUENCES, KernelShape, choose


@given(st.integers(1, 5000), st.integers(1, 300), st.one_of(st.none(), st.integers(1, 10**6)))
def test_all_rows_are_covered_by_a_variant_that_exists(rows: int, batch: int, max_seq_len: int | None) -> None:
    kernel = choose(rows, batch, max_seq_len)
    assert kernel.row_blocks * kernel.tile_rows >= rows
    assert kernel.row_blocks % kernel.cluster_ctas == 0, "a cluster lies along the row blocks"
    for dtype in GPU_DTYPES:
        assert kernel.variant(dtype.name) in jit.VARIANTS


@pytest.mark.parametrize(
    ("rows", "batch", "max_seq_len", "expected"),
    [
        (1, 1, None, KernelShape(16, 1, 1)),
        (16, 1, 1 << 20, KernelShape(16, 1, 1)),
        (17, 1, None, KernelShape(32, 1, 1)),
        (32, MANY_SEQUENCES - 1, 100, KernelShape(32, 1, 1)),
        (32, MANY_SEQUENCES, 100, KernelShape(64, 1, 1)),
        (16, MANY_SEQUENCES, None, KernelShape(16, 1, 1)),
        (64, 1, None, KernelShape(64, 1, 1)),
        (64, 1, FEW_CLUSTER_TOKENS // 2, KernelShape(16, 2, 4)),
        (64, 1, FEW_CLUSTER_TOKENS // 2 + 1, KernelShape(64, 1, 1)),
        (96, 1, FEW_CLUSTER_TOKENS // 3, KernelShape(16, 2, 6)),
        (97, 1, FEW_CLUSTER_TOKENS // 4, KernelShape(16, 2, 8)),
        (128, 4, FEW_CLUSTER_TOKENS // 16, KernelShape(16, 2, 8)),
        (128, 5, FEW_CLUSTER_TOKENS // 16, KernelShape(64, 2, 2)),
        (129, 1, 1, KernelShape(64, 1, 3)),
        (256, 1, None, KernelShape(64, 2, 4)),
    ],
)
def test_choice(rows: int, batch: int, max_seq_len: int | None, expected: KernelShape) -> None:
    assert choose(rows, batch, max_seq_len) == expected


def test_the_usual_kernels_are_loaded_at_import() -> None:
    for rows in (1, 32, 64, 128):
        assert jit.VARIANTS[dispatch.choose(rows, 1, None).variant("bfloat16")].is_default
