"""The schedule: what it must guarantee for any lengths and workers, and the plan object around it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlacore import plan_decode
from mlacore.params import INVARIANT_SPLIT_TILES, ITEM_COST_TILES, TILE_TOKENS
from mlacore.plan import available_cpus, schedule, worker_items

LENGTHS = st.lists(
    st.one_of(st.integers(0, 200), st.integers(0, 100_000), st.sampled_from([0, 1, 63, 64, 65, 1 << 20])), min_size=1
)
WORKERS = st.one_of(st.integers(1, 9), st.integers(1, 300))


def items_of(lengths: list[int], num_workers: int) -> list[list[tuple[int, int, int]]]:
    """(sequence, begin tile, end tile) of every item of every worker, ends resolved."""
    work, _ = schedule(np.array(lengths, np.int32), num_workers)
    tiles = [-(-max(length, 0) // TILE_TOKENS) for length in lengths]
    return [
        [(b, begin, tiles[b] if end is None else end) for b, begin, end in worker_items(work, worker)]
        for worker in range(num_workers)
    ]


@given(LENGTHS, WORKERS)
@example([0], 1)
@example([0, 0, 0], 2)
@example([64], 300)
@example([64] * 40, 3)
@example([1 << 20, 1, 1 << 20, 0], 132)
def test_every_tile_of_every_sequence_exactly_once(lengths: list[int], num_workers: int) -> None:
    seen: list[list[int]] = [[] for _ in lengths]
    num_items = [0] * len(lengths)
    for items in items_of(lengths, num_workers):
        for sequence, begin, end in items:
            assert begin < end or (begin == end == 0 and lengths[sequence] == 0), "an item without a tile"
            seen[sequence].extend(range(begin, end))
            num_items[sequence] += 1
    for sequence, length in enumerate(lengths):
        assert seen[sequence] == list(range(-(-length // TILE_TOKENS)))  # in order, too
        assert num_items[sequence] >= 1, "even an empty sequence is an item, which writes its result"
        assert length > 0 or num_items[sequence] == 1


@given(LENGTHS, WORKERS)
def test_splits_agree_with_work(lengths: list[int], num_workers: int) -> None:
    work, splits = schedule(np.array(lengths, np.int32), num_workers)
    assert (work.shape, splits.shape) == ((num_workers + 1, 2), (len(lengths), 2))
    assert (work.dtype, splits.dtype) == (np.int32, np.int32)
    assert work[-1].tolist() == [len(lengths), 0]
    workers_of: list[list[int]] = [[] for _ in lengths]
    for worker, items in enumerate(items_of(lengths, num_workers)):
        for sequence, _, _ in items:
            workers_of[sequence].append(worker)
    for workers, (first, count) in zip(workers_of, splits.tolist(), strict=True):
        assert workers == list(range(first, first + count))  # neighbours, in order


@given(LENGTHS, WORKERS)
def test_shared_sequences_are_a_workers_first_or_last(lengths: list[int], num_workers: int) -> None:
    """Two slots of partial results a worker are enough, and no two splits write the same one."""
    _, splits = schedule(np.array(lengths, np.int32), num_workers)
    slots = []
    for worker, items in enumerate(items_of(lengths, num_workers)):
        for index, (sequence, _, _) in enumerate(items):
            if splits[sequence, 1] > 1:
                assert index in (0, len(items) - 1)
                slots.append(2 * worker + (index > 0))
    assert len(slots) == len(set(slots))


@given(LENGTHS, WORKERS)
def test_balance(lengths: list[int], num_workers: int) -> None:
    """No worker's tiles, plus the cost of its further items, exceed the mean share of the line."""
    tiles = [-(-length // TILE_TOKENS) for length in lengths]
    line = sum(tiles) + ITEM_COST_TILES * (len(tiles) - 1)
    share = max(1, -(-line // num_workers))
    for items in items_of(lengths, num_workers):
        walked = sum(end - begin for _, begin, end in items)
        assert walked + ITEM_COST_TILES * max(len(items) - 1, 0) <= share


@given(LENGTHS, WORKERS, st.integers(-(2**31), -1))
def test_negative_lengths_count_as_zero(lengths: list[int], num_workers: int, negative: int) -> None:
    got = schedule(np.array([*lengths, negative, *lengths], np.int32), num_workers)
    expected = schedule(np.array([*lengths, 0, *lengths], np.int32), num_workers)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_long_sequence_uses_every_worker() -> None:
    _, splits = schedule(np.array([132 * 64], np.int32), 132)
    assert splits.tolist() == [[0, 132]]
    _, splits = schedule(np.array([131072], np.int32), 132)
    assert splits[0, 1] == 128  # 2048 tiles, 16 a worker


def test_equal_sequences_go_one_to_a_worker() -> None:
    """What another item would cost keeps a worker from starting on the next sequence."""
    work, splits = schedule(np.full(8, 640, np.int32), 8)
    assert work.tolist() == [[b, 0] for b in range(9)]
    assert splits.tolist() == [[b, 1] for b in range(8)]


def test_worked_example() -> None:
    """By hand, with an item cost of 4: packed, tiles 3, 0, 5 lie at 0, 7, 11 of 16 positions; aligned, in stretches of
    3, they take 1, 1 and 2 workers."""
    assert ITEM_COST_TILES == 4
    lengths = np.array([150, 0, 300], np.int32)
    work, splits = schedule(lengths, 4)
    assert work.tolist() == [[0, 0], [1, 0], [2, 0], [2, 3], [3, 0]]
    assert splits.tolist() == [[0, 1], [1, 1], [2, 2]]
    assert [worker_items(work, w) for w in range(4)] == [[(0, 0, None)], [(1, 0, None)], [(2, 0, 3)], [(2, 3, None)]]
    work, splits = schedule(lengths, 2)  # fewer workers than sequences: packed
    assert work.tolist() == [[0, 0], [2, 0], [3, 0]]
    assert splits.tolist() == [[0, 1], [0, 1], [1, 1]]


@given(LENGTHS, LENGTHS, st.integers(1, 64))
def test_a_batch_invariant_sequence_is_cut_by_its_own_length(
    before: list[int], after: list[int], max_splits: int
) -> None:
    def cuts(lengths: list[int], sequence: int) -> list[int]:
        work, splits = schedule(np.array(lengths, np.int32), len(lengths) * max_splits, max_splits)
        first, count = splits[sequence].tolist()
        assert (work[first : first + count, 0] == sequence).all()
        assert 1 <= count <= max_splits
        return work[first : first + count, 1].tolist()

    for length in (0, 1, 64 * INVARIANT_SPLIT_TILES, 64 * INVARIANT_SPLIT_TILES + 1, 100_000):
        alone = cuts([length], 0)
        assert alone == cuts([*before, length, *after], len(before))
        assert alone == sorted(set(alone)), "no split without a tile"
        assert alone[0] == 0
        tiles = max(1, -(-length // TILE_TOKENS))
        assert alone[-1] < tiles
        if tiles <= max_splits * INVARIANT_SPLIT_TILES:
            assert max(np.diff([*alone, tiles])) <= INVARIANT_SPLIT_TILES


def test_query_rows_have_a_limit():
    lengths = np.array([5], np.int32)
    with pytest.raises(
        ValueError, match=r"seq_len_q: got 8193 with num_heads=128, expected at most 1048576 query rows"
    ):
        plan_decode(lengths, num_heads=128, seq_len_q=8193)
    assert plan_decode(lengths, num_heads=128, seq_len_q=8192).seq_len_q == 8192


def test_batch_invariant_plans() -> None:
    lengths = np.array([5000, 0, 70], np.int32)
    plan = plan_decode(lengths, num_heads=16, max_seq_len=6000, batch_invariant=True)
    assert (plan.max_splits, plan.num_workers) == (6, 18)  # 94 tiles, 16 a split
    assert plan.splits.tolist() == [[0, 5], [5, 1], [6, 1]]
    plan.update(
        np.array([70, 9000, 0], np.int32)
    )  # longer than was said: fewer splits than it would have, but all of it
    assert plan.splits.tolist() == [[0, 1], [1, 6], [7, 1]]
    with pytest.raises(
        ValueError, match="batch_invariant: got no max_seq_len, expected max_seq_len and no num_workers"
    ):
        plan_decode(lengths, num_heads=16, batch_invariant=True)
    with pytest.raises(ValueError, match="batch_invariant: got num_workers=4"):
        plan_decode(lengths, num_heads=16, max_seq_len=100, num_workers=4, batch_invariant=True)
    with pytest.raises(ValueError, match=r"got batch=2000 with up to 64 splits each .* at most 65535"):
        plan_decode(np.zeros(2000, np.int32), num_heads=16, max_seq_len=1 << 20, batch_invariant=True)


def test_plan_on_numpy() -> None:
    lengths = np.array([300, 0, 5], np.int32)
    plan = plan_decode(lengths, num_heads=128, seq_len_q=2, num_kv_heads=2, causal=True, num_workers=3)
    assert (plan.batch, plan.seq_len_q, plan.num_heads, plan.num_kv_heads, plan.causal) == (3, 2, 128, 2, True)
    assert (plan.num_workers, plan.device, plan.kernel) == (3, None, None)
    assert (plan.partial_out, plan.partial_lse) == (None, None)
    work, splits = schedule(lengths, 3)
    np.testing.assert_array_equal(plan.work, work)
    np.testing.assert_array_equal(plan.splits, splits)
    assert plan_decode(lengths, num_heads=1).num_workers == available_cpus()


def test_update_is_in_place() -> None:
    plan = plan_decode(np.array([300, 0, 5], np.int32), num_heads=16, num_workers=3)
    work, splits = plan.work, plan.splits
    later = np.array([10, 2000, 64], np.int32)
    plan.update(later)
    assert plan.work is work
    assert plan.splits is splits
    for a, b in zip((work, splits), schedule(later, 3), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_plan_is_frozen() -> None:
    plan = plan_decode(np.array([300], np.int32), num_heads=16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.batch = 2  # type: ignore[misc]
    assert not hasattr(plan, "__dict__")
