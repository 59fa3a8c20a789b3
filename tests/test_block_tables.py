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
from pretended_gpu import FakeGPUArray, FakeStream, pretend_gpu

from mlacore import block_tables, cache_kernels
from mlacore.block_tables import (
    TableChanges,
    advance_rows_cuda,
    advance_rows_numpy,
    apply_changes_cuda,
    apply_changes_numpy,
)
from mlacore.cache_kernels import launch_update, update_words
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
    rows: dict[str, list[int]] = {"lengths": [], "tokens": [], "num_pages": []}
    for _ in seqs:
        length = draw(st.integers(0, max_pages * page_size))
        tokens = draw(st.integers(length - max_pages * page_size, length))  # below 0: room for more
        num_pages = draw(st.integers(0, -(-max(length, length - tokens) // page_size)))
        for name, value in zip(rows, (length, tokens, num_pages), strict=True):
            rows[name].append(value)
    fields = {name: np.array(values, np.int64) for name, values in rows.items()}
    fields["pages"] = np.array(new_ids[: sum(rows["num_pages"])], np.int32)
    return {"page_size": page_size, "table": table, "seqs": np.array(seqs, np.int64), "fields": fields}


def in_a_loop(update: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[list[int]]]:
    """What an update does, one number at a time."""
    table = update["table"].copy()
    lengths, limits = np.zeros(len(table), np.int32), np.full(len(table), 3, np.int32)
    page_size, where, pages = update["page_size"], [[], []], list(update["fields"]["pages"])
    names = ("lengths", "tokens", "num_pages")
    for seq, *values in zip(update["seqs"], *(update["fields"][name] for name in names), strict=True):
        length, tokens, num_pages = map(int, values)
        lengths[seq] = length
        limits[seq] = length - tokens if tokens < 0 else 0
        columns = -(-max(length, length - tokens) // page_size)
        for column in range(columns - num_pages, columns):
            table[seq, column] = pages.pop(0)
        for position in range(length - tokens, length):
            where[0].append(int(table[seq, position // page_size]) * page_size + position % page_size)
            where[1].append(position)
    return table, lengths, limits, where


def before(update: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Table, lengths and limits that an update finds."""
    table = update["table"].copy()
    return table, np.zeros(len(table), np.int32), np.full(len(table), 3, np.int32)


def assert_equal_to_a_loop(update: dict[str, Any], tables: Any, where: np.ndarray) -> None:
    *expected_tables, expected_where = in_a_loop(update)
    for actual, expected in zip(tables, expected_tables, strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert where.tolist() == expected_where


@settings(max_examples=300)
@given(updates())
def test_numpy_update_equals_a_plain_loop(update):
    changes = TableChanges.pack(update["seqs"], **update["fields"])
    tables, where = before(update), np.full((2, changes.num_tokens), -7, np.int64)
    apply_changes_numpy(changes, *tables, where, update["page_size"])
    assert_equal_to_a_loop(update, tables, where)


def in_any_order(kernel: Any, grid: tuple[int, int], threads: int, random: Any, *arguments: Any) -> None:
    """Run a Numba kernel's body thread by thread, shuffled."""
    order = [(x, y, thread) for x in range(grid[0]) for y in range(grid[1]) for thread in range(threads)]
    random.shuffle(order)
    for x, y, thread in order:
        place = {"blockIdx": (x, y), "gridDim": grid, "threadIdx": (thread, 0), "blockDim": (threads, 1)}
        fake_cuda = SimpleNamespace(**{name: SimpleNamespace(x=at[0], y=at[1]) for name, at in place.items()})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block_tables, "cuda", fake_cuda)
            kernel(*arguments)


@settings(max_examples=200)
@given(updates(), st.randoms(use_true_random=False))
def test_kernel_threads_may_run_in_any_order(update, random):
    """What the simulator cannot show, as it starts threads in order: none may rely on what another has written."""
    changes = TableChanges.pack(update["seqs"], **update["fields"])
    tables, where = before(update), np.full((2, changes.num_tokens), -7, np.int64)
    arguments = changes.packed, changes.num_changes, *tables, where, update["page_size"]
    in_any_order(block_tables.apply_changes, (changes.num_changes, 2), 3, random, *arguments)
    assert_equal_to_a_loop(update, tables, where)


def for_cuda(update: dict[str, Any]) -> dict[str, Any]:
    """The same update in pages of a power of two tokens, as the CUDA kernel takes them, so in more columns."""
    page_size = 1 << update["page_size"].bit_length() - 1
    table = np.pad(update["table"], ((0, 0), (0, update["table"].shape[1])))
    return update | {"page_size": page_size, "table": table}


@settings(max_examples=200)
@given(updates().map(for_cuda))
def test_cuda_kernel_equals_a_plain_loop(update):
    """The other kernel for the same changes, cuda/cache_update.cu, built for the host."""
    changes = TableChanges.pack(update["seqs"], **update["fields"])
    if not changes.num_changes:
        return
    with pytest.MonkeyPatch.context() as patch:
        pretend_gpu(patch)
        tables = [array.view(FakeGPUArray) for array in before(update)]
        where = np.full((2, max(1, changes.num_tokens)), -7, np.int64).view(FakeGPUArray)
        launch_update(changes, update_words(changes), *tables, where, update["page_size"], FakeStream())
    assert_equal_to_a_loop(update, tables, where[:, : changes.num_tokens])


def test_slots_of_a_huge_pool_need_64_bits():
    changes = TableChanges.pack(np.array([0]), lengths=3, tokens=3, num_pages=np.array([1]), pages=[2**31 - 1])
    tables, where = np.zeros((1, 1), np.int32), np.empty((2, 3), np.int64)
    apply_changes_numpy(changes, tables, np.zeros(1, np.int32), np.zeros(1, np.int32), where, 64)
    assert where.tolist() == [[(2**31 - 1) * 64 + offset for offset in range(3)], [0, 1, 2]]


def test_record_layout():
    """What the kernels read: fields of all records, then new pages; `*_AT` are indices."""
    changes = TableChanges.pack(
        np.array([4, 2]),
        lengths=np.array([70, 3]),
        tokens=np.array([10, 3]),
        num_pages=np.array([1, 2]),
        pages=[7, 8, 9],
    )
    fields = [[4, 2], [70, 3], [10, 3], [0, 10], [1, 2], [12, 13]]
    assert changes.packed.tolist() == [*(value for field in fields for value in field), 7, 8, 9]
    assert changes.packed.dtype == np.int32
    assert (changes.num_changes, changes.num_tokens, changes.longest) == (2, 13, 10)
    reserving = TableChanges.pack(np.array([0]), lengths=5, tokens=-3)
    assert (reserving.num_tokens, reserving.longest) == (0, 0)
    assert reserving.packed.tolist() == [0, 5, -3, 0, 0, 0]


def test_changes_that_go_into_a_launch_by_value():
    def of(count: int, **fields: Any) -> int | None:
        return update_words(TableChanges.pack(np.arange(count), lengths=1, **fields))

    assert of(128, tokens=1, num_pages=np.ones(128, int), pages=np.zeros(128, np.int32)) == 960
    assert of(160) == 960
    assert of(161) == 8128
    assert of(1024, tokens=1, num_pages=np.ones(1024, int), pages=np.zeros(1024, np.int32)) == 8128
    assert of(1355) is None
    assert update_words(TableChanges.pack(np.arange(1), lengths=1024, tokens=1024)) == 960
    assert update_words(TableChanges.pack(np.arange(1), lengths=1025, tokens=1025)) is None


@st.composite
def rows_to_advance(draw: st.DrawFn) -> tuple[Any, ...]:
    page_size, max_seqs, max_pages = draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 7))
    table = np.random.default_rng(draw(st.integers(0, 2**32))).permutation(max_seqs * max_pages).astype(np.int32)
    number = st.integers(0, max_pages * page_size)
    lengths, limits = (draw(st.lists(number, min_size=max_seqs, max_size=max_seqs)) for _ in range(2))
    tables = table.reshape(max_seqs, max_pages), np.array(lengths, np.int32), np.array(limits, np.int32)
    return tables, draw(st.integers(1, max_seqs)), draw(st.integers(1, 4)), page_size


def advanced_in_a_loop(rows: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    (table, lengths, limits), num_rows, num_tokens, page_size = rows
    after, where = lengths.copy(), np.full((2, num_rows * num_tokens), -1, np.int64)
    for row in range(num_rows):
        if lengths[row] + num_tokens <= limits[row]:
            for nth in range(num_tokens):
                position = int(lengths[row]) + nth
                slot = int(table[row, position // page_size]) * page_size + position % page_size
                where[:, row * num_tokens + nth] = slot, position
            after[row] += num_tokens
    return after, where


@settings(max_examples=200)
@given(rows_to_advance(), st.randoms(use_true_random=False))
def test_rows_advance_by_themselves(rows, random):
    (table, lengths, limits), num_rows, num_tokens, page_size = rows
    expected, expected_where = advanced_in_a_loop(rows)
    for kernel in (False, True):
        after, where = lengths.copy(), np.full((2, num_rows * num_tokens), -7, np.int64)
        if kernel:
            arguments = table, after, limits, where, num_rows, num_tokens, page_size
            in_any_order(block_tables.advance_rows, (3, 1), 3, random, *arguments)
        else:
            advance_rows_numpy(table, after, limits, where, num_tokens, page_size)
        np.testing.assert_array_equal(after, expected)
        np.testing.assert_array_equal(where, expected_where)


def grow(books: HostTables, rows: np.ndarray, *counts: int) -> None:
    books.commit(books.changes_to_grow(rows, np.array(counts)))


def create(books: HostTables, *lengths: int) -> np.ndarray:
    rows, change = books.changes_to_create([np.empty(0, np.int32)] * len(lengths), np.array(lengths))
    books.commit(change)
    return rows


def test_books_truncate_and_replace_rows():
    """A row may shrink, and its pages return in the order in which it held them."""
    books = HostTables(num_pages=6, page_size=4, max_seqs=2, max_seq_len=24)
    row = create(books, 21)
    assert (books.table[0].tolist(), books.pool.num_free) == ([0, 1, 2, 3, 4, 5], 0)
    books.commit(books.changes_to_truncate(row, np.array([7])))
    assert (books.pages_held[0], books.seq_lens[0], books.pool.num_free) == (2, 7, 4)
    books.check_integrity(books.table, books.seq_lens, books.limits)
    grow(books, row, 8)
    assert books.table[0, :4].tolist() == [0, 1, 2, 3]
    with pytest.raises(OutOfPagesError, match="9 tokens for 1 sequences need 3 more pages, but 2 of 6 are free"):
        create(books, 9)
    books.commit(books.changes_to_clear(row))
    assert (books.pages_held[0], books.seq_lens[0], books.pool.num_free) == (0, 0, 6)


def test_nothing_is_changed_before_commit():
    books = HostTables(num_pages=6, page_size=4, max_seqs=4, max_seq_len=24)
    rows = create(books, 5, 1)
    arrays = "table", "seq_lens", "limits", "pages_held", "alive", "sealed"
    before = [getattr(books, name).copy() for name in arrays] + [books.pool.refs.copy(), books.pool._stack.copy()]
    books.changes_to_grow(rows, np.array([4, 8]))
    books.changes_to_reserve(rows, np.array([4, 8]))
    books.changes_to_truncate(rows, np.array([4, 0]))
    books.changes_to_fork(rows)
    books.changes_to_clear(rows)
    books.changes_to_compact()
    assert books.pool.num_free == 3
    after = [*(getattr(books, name) for name in arrays), books.pool.refs, books.pool._stack]
    assert all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))


if SIMULATED:
    from cache_model import Model, operations
    from numba import cuda

    from mlacore.cache import PagedKVCache

    @pytest.fixture(autouse=True)
    def small_grids(monkeypatch):
        """A simulated thread is a Python thread, so as few as cover several blocks; streams do not exist there."""
        monkeypatch.setattr(cuda, "external_stream", lambda handle: handle, raising=False)
        monkeypatch.setattr(block_tables, "THREADS_PER_BLOCK", 2)
        monkeypatch.setattr(block_tables, "MIN_BLOCKS", 1)

    def launch(changes, *tables_and_where):
        apply_changes_cuda(changes, changes.packed, *tables_and_where, 0)

    def assert_same_results(changes, table, page_size):
        results = []
        for apply in (apply_changes_numpy, launch):
            tables = table.copy(), np.zeros(len(table), np.int32), np.full(len(table), 3, np.int32)
            where = np.full((2, changes.num_tokens + 1), -7, np.int64)
            # The device gets one slot more than it may write, the host just as many.
            apply(changes, *tables, where if apply is launch else where[:, :-1], page_size)
            results.append((*tables, where))
        for expected, actual in zip(*results, strict=True):
            np.testing.assert_array_equal(actual, expected)

    @settings(max_examples=150)
    @given(updates(), st.sampled_from([1, 3, 65535]))
    def test_simulated_kernel_equals_numpy(update, max_blocks_y):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block_tables, "MAX_BLOCKS_Y", max_blocks_y)  # few blocks stride over their work
            changes = TableChanges.pack(update["seqs"], **update["fields"])
            assert_same_results(changes, update["table"], update["page_size"])

    @settings(max_examples=100)
    @given(rows_to_advance())
    def test_simulated_rows_advance_by_themselves(rows):
        (table, lengths, limits), num_rows, num_tokens, page_size = rows
        expected, expected_where = advanced_in_a_loop(rows)
        after, where = lengths.copy(), np.full((2, num_rows * num_tokens), -7, np.int64)
        advance_rows_cuda(table, after, limits, where, num_tokens, page_size, 0)
        np.testing.assert_array_equal(after, expected)
        np.testing.assert_array_equal(where, expected_where)

    def test_simulated_slots_of_a_huge_pool_need_64_bits():
        changes = TableChanges.pack(np.array([0]), lengths=3, tokens=3, num_pages=np.array([1]), pages=[2**31 - 1])
        where = np.empty((2, 3), np.int64)
        launch(changes, np.zeros((1, 1), np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32), where, 64)
        assert where[0].tolist() == [(2**31 - 1) * 64 + offset for offset in range(3)]

    def test_simulated_grid_of_hardware_size(monkeypatch):
        """The real block size, and blocks that find nothing to do."""
        monkeypatch.setattr(block_tables, "THREADS_PER_BLOCK", 32)
        monkeypatch.setattr(block_tables, "MIN_BLOCKS", 6)
        changes = TableChanges.pack(
            np.array([1, 0]), lengths=[40, 1], tokens=[40, 1], num_pages=np.array([20, 1]), pages=np.arange(21)[::-1]
        )
        assert_same_results(changes, np.full((2, 20), -1, np.int32), page_size=2)

    @settings(max_examples=12)
    @given(operations(longest=70, max_size=6), st.integers(1, 8), st.sampled_from([0, 1024]))
    def test_simulated_cache_matches_plain_lists(ops, num_pages, longest):
        with pytest.MonkeyPatch.context() as patch:
            pretend_gpu(patch)
            patch.setattr(cache_kernels, "UPDATE_LONGEST", longest)  # 0: all changes with tokens or pages by Numba
            cache = PagedKVCache(num_pages, max_seqs=4, max_seq_len=300, dtype="bfloat16", device="cuda")
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
        assert "5 passed" in result.stdout, result.stdout

    def test_kernel_compiles_for_hopper():
        """The simulator does not type-check; Numba's compiler does, and it needs no GPU."""
        cuda = pytest.importorskip("numba.cuda", reason="needs the numba extra")
        from numba import types

        block_tables._compiled_kernels()
        int32_1d, int32_2d = types.Array(types.int32, 1, "C"), types.Array(types.int32, 2, "C")
        tables = int32_2d, int32_1d, int32_1d, types.Array(types.int64, 2, "C")
        signatures = {
            block_tables.apply_changes: types.void(int32_1d, types.int64, *tables, types.int64),
            block_tables.advance_rows: types.void(*tables, types.int64, types.int64, types.int64),
        }
        for kernel, signature in signatures.items():
            ptx, _ = cuda.compile_ptx(kernel, signature, cc=(9, 0))
            assert ".entry" in ptx
            assert ".local" not in ptx

    def test_without_numba_the_error_says_what_to_install(monkeypatch):
        monkeypatch.setitem(sys.modules, "numba", None)
        block_tables._compiled_kernels.cache_clear()
        changes = TableChanges.pack(np.array([0]), lengths=0)
        with pytest.raises(ImportError, match=r"pip install numba-cuda\[cu13\]"):
            apply_changes_cuda(changes, changes.packed, None, None, None, None, 64, 0)

    @pytest.mark.gpu
    @pytest.mark.parametrize("how", ["numba", "by value"])
    @settings(max_examples=100)
    @given(updates())
    def test_kernels_equal_numpy_on_gpu(how, update):
        import cupy

        update = for_cuda(update) if how == "by value" else update
        changes = TableChanges.pack(update["seqs"], **update["fields"])
        host = *before(update), np.zeros((2, changes.num_tokens), np.int64)
        device = [*map(cupy.asarray, host[:3]), cupy.zeros((2, max(1, changes.num_tokens)), np.int64)]
        apply_changes_numpy(changes, *host, update["page_size"])
        stream = cupy.cuda.get_current_stream()
        if how == "by value" and changes.num_changes:
            launch_update(changes, update_words(changes), *device, update["page_size"], stream)
        else:
            apply_changes_cuda(changes, cupy.asarray(changes.packed), *device, update["page_size"], stream.ptr)
        for expected, actual in zip(host, device, strict=True):
            actual = cupy.asnumpy(actual)
            np.testing.assert_array_equal(actual[:, : expected.shape[1]] if expected.ndim == 2 else actual, expected)

    @pytest.mark.gpu
    @settings(max_examples=100)
    @given(rows_to_advance())
    def test_rows_advance_by_themselves_on_gpu(rows):
        import cupy

        (table, lengths, limits), num_rows, num_tokens, page_size = rows
        expected, expected_where = advanced_in_a_loop(rows)
        after, where = cupy.asarray(lengths), cupy.full((2, num_rows * num_tokens), -7, np.int64)
        stream = cupy.cuda.get_current_stream().ptr
        advance_rows_cuda(cupy.asarray(table), after, cupy.asarray(limits), where, num_tokens, page_size, stream)
        np.testing.assert_array_equal(cupy.asnumpy(after), expected)
        np.testing.assert_array_equal(cupy.asnumpy(where), expected_where)
