"""The producer warp (cuda/load_kv.cuh): which rows of which pages land where, for any plan. And what comes of hints,
right or wrong (cuda/first_tile.cuh)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from producer_on_host import (
    ASKED,
    AWAITED_DISCARDED,
    AWAITED_JUDGED,
    AWAITED_LANDED,
    AWAITED_PART,
    CHUNKS,
    IN_VAIN,
    LOADED,
    NOT_ASKED,
    PARTS,
    PREFETCHED,
    RIGHT,
    ROW_BYTES,
    STAGES,
    Producer,
)

from mlacore import params
from mlacore.params import DECODE_PARAMS, HEAD_DIM_QK, PAGE_SIZES, TILE_TOKENS
from mlacore.plan import schedule, worker_items

CHUNK_COLUMNS = 64
NUM_PAGES = 1 << 20
CLUSTERS = sorted({*params.CLUSTER_CTAS, *(ctas for _, ctas in params.SWAPPED_VARIANTS)})


@pytest.fixture(scope="module")
def producer() -> Producer:
    return Producer()


def expected_loads(
    table: np.ndarray, lengths: np.ndarray, page_size: int, work: np.ndarray, worker: int, ctas: int, rank: int
) -> list[list[tuple[int, ...]]]:
    """In order, by the definition: every tile of the worker's items, part by part, this CTA's share of the rows."""
    return [
        tile_loads(table, page_size, sequence, tile, ctas, rank, position % STAGES)
        for position, (sequence, tile) in enumerate(worker_tiles(lengths, work, worker))
    ]


def with_prefetches(
    loads: list[list[tuple[int, ...]]],
    table: np.ndarray,
    lengths: np.ndarray,
    page_size: int,
    work: np.ndarray,
    worker: int,
    ctas: int,
    rank: int,
) -> list[list[tuple[int, ...]]]:
    """The worker's loads, tile by tile, and what it prefetches: this CTA's share of the next tile of the item.

    Before the tile's loads, once the tile before begins to come in. The worker's first tiles are prefetched by nobody;
    its third one is itself, and the fourth one behind the loads of the third one's first part.
    """
    found: list[list[tuple[int, ...]]] = []
    share = TILE_TOKENS // ctas
    tiles = list(worker_tiles(lengths, work, worker))
    first_sequence = next(iter(worker_items(work, worker)), (None,))[0]

    def prefetch(sequence: int, tile: int) -> list[tuple[int, ...]]:
        page, row = divmod(tile * TILE_TOKENS + rank * share, page_size)
        return [(PREFETCHED, int(table[sequence, page]) * page_size + row, share, 0, 0, 0, 0, 0)]

    for position, ((sequence, tile), of_tile) in enumerate(zip(tiles, loads, strict=True)):
        of_item = [other for of, other in tiles if of == sequence]
        has_next = tile < of_item[-1] and (tile + 1 - of_item[0]) % 32 > 0  # page ids come 32 at a time
        next_ = prefetch(sequence, tile + 1) if has_next else []
        before = [(AWAITED_PART, (position - 1) % STAGES, 0, (position - 1) // STAGES % 2, 0, 0, 0, 0)]
        of_part = len(of_tile) // PARTS
        number = tile - of_item[0] if sequence == first_sequence else STAGES + 1
        if number < STAGES:
            found.append(of_tile)
        elif number == STAGES:
            found.append([*before, *prefetch(sequence, tile), *of_tile[:of_part], *next_, *of_tile[of_part:]])
        else:
            found.append([*(before if has_next else []), *next_, *of_tile])
    return found


def tile_loads(
    table: np.ndarray, page_size: int, sequence: int, tile: int, ctas: int, rank: int, stage: int, what: int = LOADED
) -> list[tuple[int, ...]]:
    share = TILE_TOKENS // ctas
    box, loads = min(page_size, share), []
    for chunks in np.split(np.arange(CHUNKS), PARTS):
        for row in range(rank * share, (rank + 1) * share, box):
            column, place = divmod(tile * TILE_TOKENS + row, page_size)
            page = int(table[sequence, column]) if column < table.shape[1] else -1
            loads += [(what, stage, int(c), row, int(c) * CHUNK_COLUMNS, place, 0, page) for c in chunks]
    return loads


def worker_tiles(lengths: np.ndarray, work: np.ndarray, worker: int) -> Iterator[tuple[int, int]]:
    """Sequence and tile of all that a worker attends to."""
    for sequence, begin, end in worker_items(work, worker):
        tiles = -(-max(int(lengths[sequence]), 0) // TILE_TOKENS)
        for tile in range(begin, tiles if end is None else min(end, tiles)):
            yield sequence, tile


def record_of(table: np.ndarray, lengths: np.ndarray, work: np.ndarray, page_size: int) -> np.ndarray:
    """Parameters of a launch with one KV head, one row block and a pool of NUM_PAGES pages without gaps."""
    record = np.zeros(1, DECODE_PARAMS)
    for name, array in {"block_table": table, "cache_seqlens": lengths, "work": work}.items():
        record[name] = array.ctypes.data
    record["batch"], record["max_pages"] = table.shape
    record["block_table_stride"] = table.shape[1]
    record["page_size_log2"], record["num_pages"] = page_size.bit_length() - 1, NUM_PAGES
    record["kv_stride_page"], record["prefetches_first"] = page_size * HEAD_DIM_QK, 1
    record["num_kv_heads"] = record["row_blocks"] = record["blocks_per_worker"] = 1
    return record


def hint_of(data: st.DataObject | None, work: np.ndarray, worker: int) -> np.ndarray:
    """What was read of the schedule before the previous kernel had ended: the same, another worker's, or anything."""
    kind = "right" if data is None else data.draw(st.sampled_from(("right", "other", "any")))
    if kind == "any":
        hint = data.draw(st.lists(st.one_of(st.integers(-2, 12), INT32), min_size=4, max_size=4))
        return np.array(hint, np.int32)
    other = worker if kind == "right" else data.draw(st.integers(0, len(work) - 2))
    return np.ascontiguousarray(work[other : other + 2], np.int32).reshape(4)


INT32 = st.integers(-(1 << 31), (1 << 31) - 1)
LENGTHS = st.lists(st.one_of(st.just(0), st.integers(-3, 200), st.integers(0, 9000)), min_size=1, max_size=7)


@settings(max_examples=60)
@given(
    st.data(),
    LENGTHS,
    st.integers(1, 12),
    st.sampled_from(PAGE_SIZES),
    st.sampled_from(CLUSTERS),
    st.booleans(),
)
@example(None, [0, 700], 1, 64, 1, False)  # a worker whose first item has no tiles
@example(None, [0, 9000, 0, 0, 5000], 2, 16, 2, False)
@example(None, [9000], 1, 256, 2, False)
@example(None, [9000, 64], 3, 64, 1, True)  # without data: nothing is left of what was planned
@example(None, [9000], 2, 64, 2, True)
@example(None, [192, 9000], 1, 64, 2, False)  # a first item that ends with its third tile
def test_every_tile_comes_from_its_own_pages(producer, data, planned, num_workers, page_size, ctas, is_stale):
    """Lengths that have moved on since the plan was made included, tables too narrow for them, and wrong hints."""
    planned = np.array(planned, np.int32)
    lengths = planned
    if is_stale:
        drawn = st.lists(st.integers(0, 9000), min_size=len(planned), max_size=len(planned))
        lengths = np.array(data.draw(drawn), np.int32) if data is not None else np.zeros_like(planned)
    work, _ = schedule(planned, num_workers)
    columns = max(1, -(-int(max(lengths.max(), planned.max(), 1)) // page_size) - (page_size == 32))
    table = np.arange(len(planned) * columns, dtype=np.int32).reshape(-1, columns) * 7 + 3
    record = record_of(table, lengths, work, page_size)
    prefetches = ctas > 1 and page_size >= TILE_TOKENS
    record["prefetches_next"] = prefetches
    # Before the previous kernel's end: the same, or a table with other pages, some outside the pool, and other lengths.
    table_before, lengths_before = table, planned
    if data is not None:
        if data.draw(st.booleans()):
            table_before = np.ascontiguousarray(table[::-1] - data.draw(st.sampled_from((0, 9))))
        drawn = st.lists(st.one_of(st.integers(-3, 9000), INT32), min_size=len(table), max_size=len(table))
        others = drawn.map(lambda values: np.array(values, np.int32))
        lengths_before = data.draw(st.one_of(st.just(lengths), st.just(planned), others))
    for worker in range(num_workers):
        hint = hint_of(data, work, worker)
        for rank in range(ctas):
            other = RIGHT if data is None else data.draw(st.sampled_from((NOT_ASKED, IN_VAIN, RIGHT)))
            expected = expected_loads(table, lengths, page_size, work, worker, ctas, rank)
            asked = hinted_loads(table_before, lengths_before, page_size, hint, ctas, rank)
            produced = producer.run(record, ctas, rank, worker, hint, (table_before, lengths_before), other)
            is_right = len(asked) > 0 and len(expected) > 0 and begins_like(hint, work, worker)
            is_right = is_right and [load[1:] for load in asked] == [load[1:] for load in expected[0]]
            assert produced.verdict == (RIGHT if is_right else IN_VAIN if asked else NOT_ASKED)
            is_taken = is_right and (ctas == 1 or other == RIGHT)
            shares = (len(asked) > 0) + (ctas > 1 and other != NOT_ASKED)
            whole = expected
            if prefetches:
                whole = with_prefetches(expected, table, lengths, page_size, work, worker, ctas, rank)
            remaining = [event for tile in whole[is_taken:] for event in tile]
            split = len(produced.events) - len(remaining)
            assert produced.events[split:] == remaining
            assert [event for event in produced.events[:split] if event[0] == ASKED] == asked
            # What was asked for in vain has landed, in both CTAs, before anything is loaded to the same place.
            waits = [event[0] for event in produced.events[:split] if event[0] != ASKED]
            vain = [] if is_taken else [AWAITED_LANDED] * PARTS + [AWAITED_DISCARDED] * (ctas > 1)
            second = [AWAITED_LANDED] * (is_taken and ctas == 1 and first_item_tiles(lengths, work, worker) > 1)
            assert waits == [AWAITED_JUDGED] * (ctas > 1) + vain + second
            assert produced.announced_first == shares * TILE_TOKENS * HEAD_DIM_QK * 2 // ctas
            # Each CTA waits for the bytes of whole tiles, whoever of the cluster sends them.
            assert produced.announced == (len(expected) - is_taken) * TILE_TOKENS * HEAD_DIM_QK * 2
            # Both halves of a stage are handed back before it is loaded again; of a cluster, before its CTAs exit, too.
            rounds = range(is_taken, len(expected) + (STAGES if ctas > 1 else 0))
            assert produced.waits == [[n % STAGES, half, (n // STAGES + 1) % 2] for n in rounds for half in range(2)]


@pytest.mark.parametrize(("end_tile", "asks"), [(5, False), (6, True)])
def test_a_hint_that_ends_before_it_begins_leads_nowhere(producer, end_tile, asks):
    lengths, table = np.array([9000], np.int32), np.arange(200, dtype=np.int32)[None]
    work, _ = schedule(lengths, 1)
    record = record_of(table, lengths, work, TILE_TOKENS)
    hint = np.array([0, 5, 0, end_tile], np.int32)  # from tile 5 of sequence 0 to there
    produced = producer.run(record, 1, 0, 0, hint, (table, lengths), RIGHT)
    assert produced.verdict == (IN_VAIN if asks else NOT_ASKED)
    assert produced.events[0][0] == (ASKED if asks else AWAITED_LANDED)


def begins_like(hint: np.ndarray, work: np.ndarray, worker: int) -> bool:
    """Whether the hint's first item begins where the worker's first one does."""
    return bool((hint[:2] == work[worker]).all())


def first_item_tiles(lengths: np.ndarray, work: np.ndarray, worker: int) -> int:
    sequences = [sequence for sequence, _ in worker_tiles(lengths, work, worker)]
    return sequences.count(work[worker][0])


def hinted_loads(
    table: np.ndarray, lengths: np.ndarray, page_size: int, hint: np.ndarray, ctas: int, rank: int
) -> list[tuple[int, ...]]:
    """What a hint leads to: the first tile, if there is one and its share lies in one page of the pool."""
    sequence, tile, last_sequence, last_end_tile = (int(word) for word in hint)
    if last_end_tile <= 0:
        last_sequence, last_end_tile = int(np.int64(last_sequence - 1).astype(np.int32)), (1 << 31) - 1
    if page_size < TILE_TOKENS // ctas or sequence > last_sequence or not 0 <= sequence < len(table):
        return []
    if not 0 <= tile < -(-max(int(lengths[sequence]), 0) // TILE_TOKENS):
        return []
    if sequence == last_sequence and tile >= last_end_tile:
        return []
    column = (tile * TILE_TOKENS + rank * (TILE_TOKENS // ctas)) // page_size
    if column >= table.shape[1] or not 0 <= table[sequence, column] < NUM_PAGES:
        return []
    return tile_loads(table, page_size, sequence, tile, ctas, rank, 0, ASKED)


@pytest.mark.parametrize("ctas", CLUSTERS)
def test_the_first_tile_is_handed_over_if_the_hint_was_right_everywhere(producer, ctas):
    for own in (NOT_ASKED, IN_VAIN, RIGHT):
        for other in (NOT_ASKED, IN_VAIN, RIGHT):
            is_right = own == RIGHT and (ctas == 1 or other == RIGHT)
            # Each part once it has landed.
            assert producer.hand_over(ctas, own, other) == (
                [value for part in range(PARTS) for value in (part, part + 1)] * is_right
            )


KV = 1 << 40  # an address, which nobody reads
PIECE_TOKENS = 16


@settings(max_examples=60)
@given(st.data(), LENGTHS, st.integers(1, 12), st.sampled_from(PAGE_SIZES), st.integers(1, 9))
def test_hints_prefetch_the_first_tile_and_nothing_else(producer, data, lengths, num_workers, page_size, row_blocks):
    lengths = np.array(lengths, np.int32)
    work, _ = schedule(lengths, num_workers)
    columns, num_pages = max(1, -(-int(lengths.max()) // page_size)), 3 * len(lengths)
    is_right = data.draw(st.booleans())
    pages = st.integers(0, num_pages - 1) if is_right else st.one_of(st.integers(-2, num_pages + 1), INT32)
    size = len(lengths) * columns
    table = np.array(data.draw(st.lists(pages, min_size=size, max_size=size)), np.int32).reshape(-1, columns)
    seen = np.ascontiguousarray(work, np.int32)
    if not is_right:
        values = st.lists(st.one_of(st.integers(-2, 12), INT32), min_size=seen.size, max_size=seen.size)
        seen = np.array(data.draw(values), np.int32)
    record = record_of(table, lengths, seen, page_size)
    record["kv"], record["kv_stride_page"] = KV, (page_size + 3) * HEAD_DIM_QK
    record["num_pages"], record["row_blocks"] = num_pages, row_blocks
    page_bytes = int(record["kv_stride_page"][0]) * 2
    for worker in range(num_workers):
        pieces = [producer.prefetch(record, block, worker, False) for block in range(row_blocks)]
        found = [tuple(piece) for piece in np.concatenate(pieces).tolist()]
        for address, size in found:
            page, inside = divmod(address - KV, page_bytes)
            assert 0 <= page < num_pages
            assert inside % ROW_BYTES == 0
            assert inside + size <= page_size * ROW_BYTES
        if is_right:
            first = next(iter(worker_items(work, worker)), None)
            items = [tile for tile in worker_tiles(lengths, work, worker) if tile[0] == first[0]][:1]
            expected = []
            for sequence, tile in items:
                for token in range(tile * TILE_TOKENS, (tile + 1) * TILE_TOKENS, PIECE_TOKENS):
                    if token < lengths[sequence]:
                        column, row = divmod(token, page_size)
                        address = KV + int(table[sequence, column]) * page_bytes + row * ROW_BYTES
                        expected.append((address, PIECE_TOKENS * ROW_BYTES))
            assert sorted(found) == sorted(expected)
        assert all(len(producer.prefetch(record, block, worker, True)) == 0 for block in range(row_blocks))
    record["prefetches_first"] = 0
    assert len(producer.prefetch(record, 0, 0, False)) == 0
