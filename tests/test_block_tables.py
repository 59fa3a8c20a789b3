"""Block table updates: NumPy and the Numba kernel against a plain loop; the kernel runs in Numba's CUDA simulator.

The simulator must be chosen before Numba is imported, so one test runs this file again in a process of its own, where
the tests at the end of it are defined.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlacore import block_tables
from mlacore.block_tables import TableChanges, apply_changes_cuda, apply_changes_numpy
from mlacore.host_tables import HostTables, OutOfPagesError

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


@st.composite
def updates(draw: st.DrawFn) -> dict[str, Any]:
    """A table that holds pages, and changes to some of its rows: more general than what the cache asks for today."""
    page_size, max_seqs, max_pages = draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = rng.permutation(2 * max_seqs * max_pages).astype(np.int32)
    table, new_ids = ids[: max_seqs * max_pages].reshape(max_seqs, max_pages), list(ids[max_seqs * max_pages :])
    seqs = draw(st.lists(st.integers(0, max_seqs - 1), unique=True))
    rows: dict[str, list[int]] = {"lengths": [], "first_tokens": [], "num_tokens": [], "first_columns": []}
    rows["num_pages"] = []
    for _ in seqs:
        column = draw(st.integers(0, max_pages))
        pages = draw(st.integers(0, max_pages - column))
        first = draw(st.integers(0, (column + pages) * page_size))
        values = (draw(st.integers(0, 2**31 - 1)), first, draw(st.integers(0, (column + pages) * page_size - first)))
        for name, value in zip(rows, (*values, column, pages), strict=True):
            rows[name].append(value)
    fields = {name: np.array(values, np.int64) for name, values in rows.items()}
    fields["pages"] = np.array(new_ids[: sum(rows["num_pages"])], np.int32)
    return {"page_size": page_size, "table": table, "seqs": np.array(seqs, np.int64), "fields": fields}


def in_a_loop(update: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """What an update does, one number at a time."""
    table, lengths = update["table"].copy(), np.zeros(len(update["table"]), np.int32)
    page_size, slots, pages = update["page_size"], [], list(update["fields"]["pages"])
    names = ("lengths", "first_tokens", "num_tokens", "first_columns", "num_pages")
    for seq, *values in zip(update["seqs"], *(update["fields"][name] for name in names), strict=True):
        length, first, tokens, column, num_pages = map(int, values)
        lengths[seq] = length
        for nth in range(num_pages):
            table[seq, column + nth] = pages.pop(0)
        for position in range(first, first + tokens):
            slots.append(int(table[seq, position // page_size]) * page_size + position % page_size)
    return table, lengths, slots


@settings(max_examples=300)
@given(updates())
def test_numpy_update_equals_a_plain_loop(update):
    expected_table, expected_lengths, expected_slots = in_a_loop(update)
    changes = TableChanges.pack(update["seqs"], **update["fields"])
    table, lengths = update["table"].copy(), np.zeros(len(update["table"]), np.int32)
    slots = np.full(changes.num_tokens, -7, np.int64)
    apply_changes_numpy(changes, table, lengths, slots, update["page_size"])
    np.testing.assert_array_equal(table, expected_table)
    np.testing.assert_array_equal(lengths, expected_lengths)
    assert slots.tolist() == expected_slots


@settings(max_examples=200)
@given(updates(), st.randoms(use_true_random=False))
def test_kernel_threads_may_run_in_any_order(update, random):
    """What the simulator cannot show, as it starts threads in order: none may rely on what another has written."""
    changes = TableChanges.pack(update["seqs"], **update["fields"])
    grid, threads = (changes.num_changes, 2), 3
    table, lengths = update["table"].copy(), np.zeros(len(update["table"]), np.int32)
    slots = np.full(changes.num_tokens, -7, np.int64)
    order = [(x, y, thread) for x in range(grid[0]) for y in range(grid[1]) for thread in range(threads)]
    random.shuffle(order)
    for x, y, thread in order:
        place = {"blockIdx": (x, y), "gridDim": grid, "threadIdx": (thread, 0), "blockDim": (threads, 1)}
        fake_cuda = SimpleNamespace(**{name: SimpleNamespace(x=at[0], y=at[1]) for name, at in place.items()})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block_tables, "cuda", fake_cuda)
            block_tables.apply_changes(changes.packed, table, lengths, slots, update["page_size"])
    expected_table, expected_lengths, expected_slots = in_a_loop(update)
    np.testing.assert_array_equal(table, expected_table)
    np.testing.assert_array_equal(lengths, expected_lengths)
    assert slots.tolist() == expected_slots


def test_slots_of_a_huge_pool_need_64_bits():
    changes = TableChanges.pack(np.array([0]), lengths=3, num_tokens=3, num_pages=1, pages=[2**31 - 1])
    table, lengths, slots = np.zeros((1, 1), np.int32), np.zeros(1, np.int32), np.empty(3, np.int64)
    apply_changes_numpy(changes, table, lengths, slots, 64)
    assert slots.tolist() == [(2**31 - 1) * 64 + offset for offset in range(3)]


def test_packing_puts_records_before_pages():
    changes = TableChanges.pack(
        np.array([4, 2]),
        lengths=[70, 3],
        first_tokens=[60, 0],
        num_tokens=[10, 3],
        first_columns=[1, 0],
        num_pages=[1, 2],
        pages=[7, 8, 9],
    )
    assert changes.packed.tolist() == [4, 70, 60, 10, 0, 1, 1, 16, 2, 3, 0, 3, 10, 0, 2, 17, 7, 8, 9]
    assert changes.packed.dtype == np.int32
    assert (changes.num_changes, changes.num_tokens, changes.longest) == (2, 13, 10)


def test_books_truncate_and_replace_rows():
    """Beyond growing and clearing: a row may also shrink, and its pages return in the order in which it held them."""
    books = HostTables(num_pages=6, page_size=4, max_seqs=2, max_seq_len=24)
    row = books.allocate(1)
    books.commit(books.changes_to_grow(row, np.array([21])))
    assert (books.table[0].tolist(), books.num_free_pages) == ([0, 1, 2, 3, 4, 5], 0)
    books.commit(TableChanges.pack(row, lengths=7, first_columns=2))
    assert (books.pages_held[0], books.seq_lens[0], books.num_free_pages) == (2, 7, 4)
    books.check_integrity(books.table, books.seq_lens)
    books.commit(books.changes_to_grow(row, np.array([8])))
    assert books.table[0, :4].tolist() == [0, 1, 2, 3]
    with pytest.raises(OutOfPagesError, match="9 tokens for 1 sequences need 3 more pages, but 2 of 6 are free"):
        books.changes_to_grow(books.allocate(1), np.array([9]))
    books.commit(books.changes_to_clear(row))
    assert (books.pages_held[0], books.seq_lens[0], books.num_free_pages) == (0, 0, 6)


def test_nothing_is_changed_before_commit():
    books = HostTables(num_pages=6, page_size=4, max_seqs=2, max_seq_len=24)
    rows = books.allocate(2)
    books.commit(books.changes_to_grow(rows, np.array([5, 1])))
    before = [array.copy() for array in (books.table, books.seq_lens, books.pages_held, books._free_pages)]
    books.changes_to_grow(rows, np.array([4, 8]))
    books.changes_to_clear(rows)
    assert books.num_free_pages == 3
    after = (books.table, books.seq_lens, books.pages_held, books._free_pages)
    assert all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))


if SIMULATED:
    from cache_model import Model, operations
    from numba import cuda
    from pretended_gpu import pretend_gpu

    from mlacore.cache import PagedKVCache

    @pytest.fixture(autouse=True)
    def small_grids(monkeypatch):
        """A simulated thread is a Python thread, so as few as cover several blocks; streams do not exist there."""
        monkeypatch.setattr(cuda, "external_stream", lambda handle: handle, raising=False)
        monkeypatch.setattr(block_tables, "THREADS_PER_BLOCK", 2)
        monkeypatch.setattr(block_tables, "MIN_BLOCKS", 1)

    def launch(changes, table, lengths, slots, page_size):
        apply_changes_cuda(changes, changes.packed, table, lengths, slots, page_size, 0)

    def assert_same_results(changes, table, page_size):
        results = []
        for apply in (apply_changes_numpy, launch):
            arrays = table.copy(), np.zeros(len(table), np.int32), np.full(changes.num_tokens + 1, -7, np.int64)
            # The device gets one slot more than it may write, the host just as many.
            apply(changes, *arrays[:2], arrays[2] if apply is launch else arrays[2][:-1], page_size)
            results.append(arrays)
        for expected, actual in zip(*results, strict=True):
            np.testing.assert_array_equal(actual, expected)

    @settings(max_examples=150)
    @given(updates(), st.sampled_from([1, 3, 65535]))
    def test_simulated_kernel_equals_numpy(update, max_blocks_y):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block_tables, "MAX_BLOCKS_Y", max_blocks_y)  # few blocks stride over their work
            changes = TableChanges.pack(update["seqs"], **update["fields"])
            assert_same_results(changes, update["table"], update["page_size"])

    def test_simulated_slots_of_a_huge_pool_need_64_bits():
        changes = TableChanges.pack(np.array([0]), lengths=3, num_tokens=3, num_pages=1, pages=[2**31 - 1])
        table, lengths, slots = np.zeros((1, 1), np.int32), np.zeros(1, np.int32), np.empty(3, np.int64)
        launch(changes, table, lengths, slots, 64)
        assert slots.tolist() == [(2**31 - 1) * 64 + offset for offset in range(3)]

    def test_simulated_grid_of_hardware_size(monkeypatch):
        """The real block size, and blocks that find nothing to do."""
        monkeypatch.setattr(block_tables, "THREADS_PER_BLOCK", 32)
        monkeypatch.setattr(block_tables, "MIN_BLOCKS", 6)
        changes = TableChanges.pack(
            np.array([1, 0]), lengths=[40, 1], num_tokens=[40, 1], num_pages=[20, 1], pages=np.arange(21)[::-1]
        )
        assert_same_results(changes, np.full((2, 20), -1, np.int32), page_size=2)

    @settings(max_examples=12)
    @given(operations(longest=70, max_size=6), st.integers(1, 8))
    def test_simulated_cache_matches_plain_lists(ops, num_pages):
        with pytest.MonkeyPatch.context() as patch:
            pretend_gpu(patch)
            cache = PagedKVCache(num_pages, max_seqs=4, max_seq_len=300, dtype="float16", device="cuda")
            Model(cache).run(ops)

else:

    def test_kernel_in_numbas_simulator():
        pytest.importorskip("numba.cuda", reason="needs the numba extra")
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "simulated", str(Path(__file__))],
            env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "4 passed" in result.stdout, result.stdout

    def test_kernel_compiles_for_hopper():
        """The simulator does not type-check; Numba's compiler does, and it needs no GPU."""
        cuda = pytest.importorskip("numba.cuda", reason="needs the numba extra")
        from numba import types

        block_tables._compiled_kernel()
        int32_1d, int64_1d = types.Array(types.int32, 1, "C"), types.Array(types.int64, 1, "C")
        signature = types.void(int32_1d, types.Array(types.int32, 2, "C"), int32_1d, int64_1d, types.int64)
        ptx, _ = cuda.compile_ptx(block_tables.apply_changes, signature, cc=(9, 0))
        assert ".entry" in ptx
        assert ".local" not in ptx

    def test_without_numba_the_error_says_what_to_install(monkeypatch):
        monkeypatch.setitem(sys.modules, "numba", None)
        block_tables._compiled_kernel.cache_clear()
        changes = TableChanges.pack(np.array([0]), lengths=0)
        with pytest.raises(ImportError, match=r"pip install numba-cuda\[cu13\]"):
            apply_changes_cuda(changes, changes.packed, None, None, None, 64, 0)

    @pytest.mark.gpu
    @settings(max_examples=100)
    @given(updates())
    def test_kernel_equals_numpy_on_gpu(update):
        import cupy

        changes = TableChanges.pack(update["seqs"], **update["fields"])
        host = (
            update["table"].copy(),
            np.zeros(len(update["table"]), np.int32),
            np.zeros(changes.num_tokens, np.int64),
        )
        device = [cupy.asarray(host[0]), cupy.asarray(host[1]), cupy.zeros(changes.num_tokens + 1, np.int64)]
        apply_changes_numpy(changes, *host, update["page_size"])
        stream = cupy.cuda.get_current_stream().ptr
        apply_changes_cuda(changes, cupy.asarray(changes.packed), *device, update["page_size"], stream)
        for expected, actual in zip(host, device, strict=True):
            np.testing.assert_array_equal(cupy.asnumpy(actual)[: len(expected)], expected)
