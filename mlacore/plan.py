"""The split-KV schedule: which worker attends to which tiles of which sequence.

Lay all sequences end to end on a line and cut it into equal stretches, one a worker; a cut inside a sequence splits
it. Either each sequence takes its tiles and ``ITEM_COST_TILES`` more, which is what another item costs a worker: then
the stretches balance ``tiles + ITEM_COST_TILES * (items - 1)`` within one tile. Or, where the stretches get no longer
by it, each takes a whole number of stretches, so that no worker has more than one item. `schedule` is the executable
definition; the planner kernel (``cuda/mla_plan.cu``) computes the same integers.

The plan holds where workers begin, not where sequences end: those are read from ``cache_seqlens`` when attention runs.
A plan whose lengths have moved on is therefore out of balance but never wrong.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlacore import arrays, dispatch, shapes
from mlacore.dispatch import KernelShape
from mlacore.params import (
    INVARIANT_SPLIT_TILES,
    ITEM_COST_TILES,
    MAX_INVARIANT_SPLITS,
    MAX_PLANNED_TILES,
    MAX_QUERY_ROWS,
    TILE_TOKENS,
)
from mlacore.ranges import marked
from mlacore.schedule_view import ScheduleView

if TYPE_CHECKING:
    from mlacore.launch import Launch

MAX_WORKERS = 65535
MAX_KV_HEADS = 65535


class _Remembered:
    """What a plan remembers for its next calls, absent before the first. Not fields, so that a copy, which may have
    other arrays, begins without, and a pickle too."""

    __slots__ = ("_last_decode", "_planner")

    _last_decode: Any  # `mla_decode`'s
    _planner: tuple[Launch, int, int]  # the launch of `DecodePlan.update`, addresses of `work` and `splits`


@dataclass(frozen=True, slots=True, eq=False)
class DecodePlan(_Remembered):
    """A split schedule for one batch shape, with the scratch memory that its splits need. Made by `plan_decode`.

    Calls that share a GPU plan must run one after another, as on one stream: they share its scratch memory. A plan must
    outlive the CUDA graphs that captured it.

    Attributes
    ----------
    batch, seq_len_q, num_heads, num_kv_heads : int
        The shape it serves; `mla_decode` refuses others.
    causal : bool
        The mask it serves.
    num_workers : int
        Workers that share the tiles: on a GPU ``num_kv_heads * row_blocks`` CTAs each, in NumPy a thread's task.
    device : int or None
        CUDA ordinal; None for NumPy.
    work : int32 ``[num_workers + 1, 2]``
        Sequence and tile at which each worker begins; the last row is ``(batch, 0)``.
    splits : int32 ``[batch, 2]``
        First worker and number of workers of each sequence.
    max_splits : int
        Most splits of a sequence, if the plan is batch-invariant; 0 for others.
    kernel : KernelShape or None
        The GPU kernel (`mlacore.dispatch`); None for NumPy.
    partial_out : uint32 ``[2 * num_workers, num_kv_heads, row_blocks, kernel.state_words]`` or None
        Outputs of the splits of shared sequences, on a GPU: slot ``2 * w`` is worker ``w``'s first item, ``2 * w + 1``
        its last one if that is another. In the order of the kernel's registers, each four words packed with a mark of
        the launch that wrote them.
    partial_lse : uint32 ``[2 * num_workers, num_kv_heads, row_blocks, tile_rows // 2, 4]`` or None
        Their log-sum-exp in base 2, of each two rows, packed likewise.
    merge_counters : uint32 ``[num_workers, num_kv_heads, row_blocks]`` or None
        Splits of a sequence that have started, or of two those that are done, by its first worker; zero between calls.
    merge_abandoned : uint32 ``[2 * num_workers, num_kv_heads, row_blocks]`` or None
        Slots whose worker did not wait to merge; zero between calls.
    launches : uint32 ``[2]`` or None
        CTAs of the launch under way that have started, zero between calls; the number of calls, modulo
        ``STATE_MARKS * CLEAR_TURNS`` of `mlacore.params`.
    planned_seqlens : int32 ``[batch]`` or None
        The lengths last planned for: the caller's own array, which may have moved on. Only `describe` and `plot` look.
    """

    batch: int
    seq_len_q: int
    num_heads: int
    num_kv_heads: int
    causal: bool
    num_workers: int
    device: int | None
    work: Any
    splits: Any
    max_splits: int = 0
    kernel: KernelShape | None = None
    partial_out: Any = None
    partial_lse: Any = None
    merge_counters: Any = None
    merge_abandoned: Any = None
    launches: Any = None
    planned_seqlens: Any = None

    @marked("DecodePlan.update")
    def update(self, cache_seqlens: Any, *, stream: Any = None) -> None:
        """Recompute the schedule in place for new lengths of the same batch.

        On a GPU this is one kernel launch that reads the lengths on the device, and a CUDA graph can capture it.

        Parameters
        ----------
        cache_seqlens : int32 ``[batch]``
            Tokens of each sequence, on the side the plan was made for.
        stream : CuPy stream, int or object with ``__cuda_stream__``, optional
            Stream of the launch; CuPy's current stream if None.

        Raises
        ------
        TypeError, ValueError
            If `cache_seqlens` has another type, shape or device than the plan.
        """
        lengths, stream = _take_lengths(cache_seqlens, stream, self.batch, self.device)
        if self.device is None:
            self.work[...], self.splits[...] = schedule(lengths, self.num_workers, self.max_splits)
        else:
            self._launch_planner(lengths, stream)
        object.__setattr__(self, "planned_seqlens", lengths)  # frozen for callers

    def _launch_planner(self, lengths: Any, stream: Any) -> None:
        try:
            launch, work, splits = self._planner
        except AttributeError:  # the first launch
            from mlacore import driver

            assert self.device is not None
            launch = driver.prepare_plan(self.device, self.batch, self.num_workers, self.max_splits)
            work, splits = self.work.data.ptr, self.splits.data.ptr
            object.__setattr__(self, "_planner", (launch, work, splits))
        launch(stream.ptr, (lengths.data.ptr, work, splits))

    def describe(self, *, stream: Any = None) -> str:
        """The schedule as text: what it is for, totals and balance, then each worker's items.

        It shows the lengths that are in the planned array now. On a GPU it copies them and the schedule to the host and
        waits for the copies.

        Parameters
        ----------
        stream : CuPy stream, int or object with ``__cuda_stream__``, optional
            Stream of the copies; CuPy's current stream if None.

        Returns
        -------
        str
        """
        return self._view(stream).describe()

    def plot(self, path: str | os.PathLike[str], *, stream: Any = None) -> None:
        """Draw the schedule: a bar a worker, in tiles, a piece an item, coloured by sequence.

        On a GPU it copies to the host as `describe` does.

        Parameters
        ----------
        path : str or path
            File to write; its ending chooses the format, as in matplotlib.
        stream : CuPy stream, int or object with ``__cuda_stream__``, optional
            Stream of the copies; CuPy's current stream if None.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        self._view(stream).plot(path)

    def _view(self, stream: Any) -> ScheduleView:
        lengths, work, splits = self.planned_seqlens, self.work, self.splits
        if self.device is None:
            arrays.check_no_stream(stream)
            unit = "1 worker is a task of a thread"
        else:
            assert self.kernel is not None
            stream = arrays.as_stream(stream, self.device)
            lengths, work, splits = (array.get(stream=stream) for array in (lengths, work, splits))
            ctas = self.num_kv_heads * self.kernel.row_blocks
            rows, cluster = self.kernel.tile_rows, self.kernel.cluster_ctas
            unit = f"1 worker is {_counted(ctas, 'CTA')} of {rows} query rows, in clusters of {cluster}"
        heading = (
            f"plan on {arrays.device_name(self.device)}: {_counted(self.batch, 'sequence')}, "
            f"{_counted(self.seq_len_q, 'query token')}, {_counted(self.num_heads, 'head')}, "
            f"{_counted(self.num_kv_heads, 'KV head')}{', causal' if self.causal else ''}; "
            f"{_counted(self.num_workers, 'worker')}, {unit}"
        )
        items = [worker_items(work, worker) for worker in range(self.num_workers)]
        return ScheduleView.of(heading, lengths, splits, items)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


@marked("plan_decode")
def plan_decode(
    cache_seqlens: Any,
    *,
    num_heads: int,
    seq_len_q: int = 1,
    num_kv_heads: int = 1,
    causal: bool = False,
    max_seq_len: int | None = None,
    batch_invariant: bool = False,
    num_workers: int | None = None,
    stream: Any = None,
) -> DecodePlan:
    """Plan the splits of one decode step, from lengths alone; every layer of the step can share the plan.

    Parameters
    ----------
    cache_seqlens : int32 ``[batch]``
        Tokens of each sequence, in NumPy or on a GPU, where they are read without a copy to the host.
    num_heads : int
        Query heads of this rank.
    seq_len_q : int
        Query tokens of each sequence; with all heads at most 2²⁰ query rows.
    num_kv_heads : int
        KV heads, a divisor of `num_heads`; MLA has 1.
    causal : bool
        Whether `mla_decode` will mask causally.
    max_seq_len : int, optional
        Bound of the lengths in tokens, where the host knows one. It only helps to choose the kernel: small batches of
        short sequences with more than 32 query rows are faster with it, and no result depends on it being right.
    batch_invariant : bool
        Split each sequence by its own length alone, so that the bits of its results depend neither on the other
        sequences nor on how many there are. Needs `max_seq_len`, and lengths within it: longer sequences are attended
        to correctly, but in other splits than a larger `max_seq_len` would give them. Scratch memory grows with the
        batch and `max_seq_len`, since each split has a worker of its own: up to 4 KB for each of its query rows, and at
        most 65,535 splits in all.
    num_workers : int, optional
        Default: as many as fill the GPU's SMs; in NumPy the CPUs this process may use.
    stream : CuPy stream, int or object with ``__cuda_stream__``, optional
        Stream of the planner kernel; CuPy's current stream if None.

    Returns
    -------
    DecodePlan

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, shape, dtype or range.
    RuntimeError
        If the GPU is not of compute capability 9.0.
    """
    options = check_plan_options(num_heads, seq_len_q, num_kv_heads, causal, max_seq_len, batch_invariant, num_workers)
    device = None if arrays.on_numpy(cache_seqlens=cache_seqlens) else -1
    lengths, stream = _take_lengths(cache_seqlens, stream, None, device)
    device = None if device is None else lengths.data.device_id
    shape = plan_shape(lengths.shape[0], device, *options)
    batch, num_workers, max_splits = shape["batch"], shape["num_workers"], shape["max_splits"]
    if device is None:
        work, splits = schedule(lengths, num_workers, max_splits)
        return DecodePlan(**shape | {"kernel": None}, device=None, work=work, splits=splits, planned_seqlens=lengths)

    with arrays.on_device(device, stream) as cupy:
        plan = DecodePlan(
            **shape,
            device=device,
            work=cupy.empty((num_workers + 1, 2), cupy.int32),
            splits=cupy.empty((batch, 2), cupy.int32),
            planned_seqlens=lengths,
            **{
                name: cupy.zeros(extents, cupy.uint32)
                for name, extents in scratch(num_workers, shape["num_kv_heads"], shape["kernel"]).items()
            },
        )
    plan._launch_planner(lengths, stream)
    return plan


PlanOptions = tuple[int, int, int, bool, int | None, bool, int | None]  # as `check_plan_options` takes them


def check_plan_options(
    num_heads: Any,
    seq_len_q: Any,
    num_kv_heads: Any,
    causal: Any,
    max_seq_len: Any,
    batch_invariant: Any,
    num_workers: Any,
) -> PlanOptions:
    """The arguments of `plan_decode` but lengths and stream, validated."""
    num_heads = shapes.check_count("num_heads", num_heads)
    seq_len_q = shapes.check_count("seq_len_q", seq_len_q)
    num_kv_heads = shapes.check_count("num_kv_heads", num_kv_heads)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: got {num_kv_heads}, expected a divisor of num_heads={num_heads}")
    if num_heads * seq_len_q > MAX_QUERY_ROWS:
        raise ValueError(
            f"seq_len_q: got {seq_len_q} with num_heads={num_heads}, expected at most {MAX_QUERY_ROWS} query rows a "
            "sequence (a partial state has 32-bit offsets)"
        )
    if num_kv_heads > MAX_KV_HEADS:
        raise ValueError(f"num_kv_heads: got {num_kv_heads}, expected at most {MAX_KV_HEADS} (CUDA's grid)")
    causal = shapes.check_bool("causal", causal)
    batch_invariant = shapes.check_bool("batch_invariant", batch_invariant)
    if max_seq_len is not None:
        max_seq_len = shapes.check_count("max_seq_len", max_seq_len)
    if num_workers is not None:
        num_workers = shapes.check_count("num_workers", num_workers)
        if num_workers > MAX_WORKERS:
            raise ValueError(f"num_workers: got {num_workers}, expected at most {MAX_WORKERS} (CUDA's grid)")
    if batch_invariant and (max_seq_len is None or num_workers is not None):
        got = "no max_seq_len" if max_seq_len is None else f"num_workers={num_workers}"
        raise ValueError(f"batch_invariant: got {got}, expected max_seq_len and no num_workers (a worker a split)")
    return num_heads, seq_len_q, num_kv_heads, causal, max_seq_len, batch_invariant, num_workers


def plan_shape(
    batch: int,
    device: int | None,
    num_heads: int,
    seq_len_q: int,
    num_kv_heads: int,
    causal: bool,
    max_seq_len: int | None,
    batch_invariant: bool,
    num_workers: int | None,
) -> dict[str, Any]:
    """The fields of a `DecodePlan` that are settled without a look at the lengths; `device` None is a CPU."""
    max_splits = 0
    if batch_invariant:
        assert max_seq_len is not None
        max_splits = invariant_splits(-(-max_seq_len // TILE_TOKENS))
        num_workers = batch * max_splits
        if num_workers > MAX_WORKERS:
            raise ValueError(
                f"batch_invariant: got batch={batch} with up to {max_splits} splits each (max_seq_len={max_seq_len}), "
                f"expected at most {MAX_WORKERS} splits in all (CUDA's grid)"
            )
    # The kernel decides about bits as well: a batch-invariant choice looks at the rows alone.
    rows = seq_len_q * (num_heads // num_kv_heads)
    kernel = dispatch.choose(rows, *((0, None) if batch_invariant else (batch, max_seq_len)))
    if num_workers is None and device is None:
        num_workers = available_cpus()
    elif num_workers is None:
        from mlacore import driver

        num_workers = max(1, driver.resident_ctas(kernel, device) // (kernel.row_blocks * num_kv_heads))
    return {
        "batch": batch,
        "seq_len_q": seq_len_q,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "causal": causal,
        "num_workers": num_workers,
        "max_splits": max_splits,
        "kernel": kernel,
    }


def scratch(num_workers: int, num_kv_heads: int, kernel: KernelShape) -> dict[str, tuple[int, ...]]:
    """Shape of each scratch array of a GPU plan, which `DecodePlan` explains: uint32, zeros before the first call."""
    slots = (2 * num_workers, num_kv_heads, kernel.row_blocks)
    return {
        "partial_out": (*slots, kernel.state_words),
        "partial_lse": (*slots, kernel.tile_rows // 2, 4),
        "merge_counters": (num_workers, *slots[1:]),
        "merge_abandoned": slots,
        "launches": (2,),
    }


Schedule = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]


def schedule(lengths: npt.NDArray[np.integer], num_workers: int, max_splits: int = 0) -> Schedule:
    """The schedule of one batch: the executable definition of what the planner kernel computes.

    Parameters
    ----------
    lengths : int array ``[batch]``
        Tokens of each sequence; negative counts as 0.
    num_workers : int
        At least 1.
    max_splits : int
        For a batch-invariant schedule: most splits of a sequence, with ``batch * max_splits`` workers. Else 0.

    Returns
    -------
    work : int32 ``[num_workers + 1, 2]``
        Sequence and tile at which each worker begins; the last row is ``(batch, 0)``.
    splits : int32 ``[batch, 2]``
        First worker and number of workers of each sequence.
    """
    batch = len(lengths)
    tiles = -(-np.maximum(lengths.astype(np.int64), 0) // TILE_TOKENS)
    if max_splits:
        return _batch_invariant_schedule(tiles, num_workers, max_splits)
    tiles = np.minimum(tiles, MAX_PLANNED_TILES // batch)  # the planner kernel counts in 32 bits
    positions = np.maximum(tiles, 1)  # an empty sequence still is one item, at one position
    total = int(tiles.sum())
    extent = max(1, -(-(total + ITEM_COST_TILES * (batch - 1)) // num_workers))  # positions of one worker
    spans = tiles + ITEM_COST_TILES
    if batch <= num_workers:
        for aligned in range(max(1, -(-total // num_workers)), extent + 1):
            workers = -(-positions // aligned)
            if workers.sum() <= num_workers:
                extent, spans = aligned, workers * aligned
                break
    begin = np.cumsum(spans) - spans  # position of each sequence's first tile
    end = begin + positions

    starts = np.arange(num_workers, dtype=np.int64) * extent
    sequence = np.searchsorted(end, starts, side="right")
    inside = sequence < batch
    tile = np.where(inside, np.maximum(starts - begin[np.minimum(sequence, batch - 1)], 0), 0)
    work = np.vstack([np.column_stack([sequence, tile]), [[batch, 0]]]).astype(np.int32)

    # The last worker takes what rounding leaves over: an empty last sequence may lie just past the last stretch.
    first = np.minimum(begin // extent, num_workers - 1)
    last = np.minimum((end - 1) // extent, num_workers - 1)
    return work, np.column_stack([first, last - first + 1]).astype(np.int32)


def _batch_invariant_schedule(tiles: npt.NDArray[np.int64], num_workers: int, max_splits: int) -> Schedule:
    batch, positions = len(tiles), np.maximum(tiles, 1)
    extent = -(-positions // np.minimum(-(-positions // INVARIANT_SPLIT_TILES), max_splits))
    num_splits = -(-positions // extent)
    first = np.cumsum(num_splits) - num_splits
    sequence = np.repeat(np.arange(batch), num_splits)
    tile = (np.arange(len(sequence)) - first[sequence]) * extent[sequence]
    work = np.zeros((num_workers + 1, 2), np.int32)
    work[:, 0] = batch
    work[: len(sequence)] = np.column_stack([sequence, tile])
    return work, np.column_stack([first, num_splits]).astype(np.int32)


def invariant_splits(tiles: int) -> int:
    """Splits of a sequence of that many tiles in a batch-invariant schedule, at most."""
    return max(1, min(MAX_INVARIANT_SPLITS, -(-tiles // INVARIANT_SPLIT_TILES)))


def worker_items(work: npt.NDArray[np.int32], worker: int) -> list[tuple[int, int, int | None]]:
    """What `worker` does, in order: (sequence, first tile, end tile); the end is None for the sequence's own end."""
    (begin_sequence, begin_tile), (end_sequence, end_tile) = work[worker].tolist(), work[worker + 1].tolist()
    return [
        (sequence, begin_tile if sequence == begin_sequence else 0, end_tile if sequence == end_sequence else None)
        for sequence in range(begin_sequence, end_sequence + (end_tile > 0))
    ]


def available_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _take_lengths(cache_seqlens: Any, stream: Any, batch: int | None, device: int | None) -> tuple[Any, Any]:
    """Validated lengths and stream; `device` -1 stands for any GPU."""
    if (
        type(cache_seqlens) is arrays.cupy_type()
        and cache_seqlens.shape == (batch,)
        and cache_seqlens.strides == (4,)
        and cache_seqlens.dtype == arrays.int32
        and cache_seqlens.data.device_id == device is not None
    ):
        return cache_seqlens, arrays.as_stream(stream, device)  # what nearly every update brings
    is_numpy = arrays.on_numpy(cache_seqlens=cache_seqlens)
    if is_numpy != (device is None):
        got = "a GPU array" if device is None else "a NumPy array"
        raise TypeError(f"cache_seqlens: got {got}, expected one on {arrays.device_name(device)} (from the plan)")
    if device is None:
        arrays.check_no_stream(stream)
        lengths = cache_seqlens
    else:
        lengths = arrays.to_device("cache_seqlens", cache_seqlens, None if stream is None else arrays.as_stream(stream))
        if device not in (-1, lengths.data.device_id):
            got = arrays.device_name(lengths.data.device_id)
            raise ValueError(f"cache_seqlens: got {got}, expected {arrays.device_name(device)} (from the plan)")
    dims = shapes.Dims()
    if batch is not None:
        dims.bind("batch", batch, "from the plan")
    dims.match("cache_seqlens", lengths.shape, ("batch",))
    shapes.check_dtype("cache_seqlens", lengths.dtype, [arrays.int32], "lengths are int32")
    shapes.check_contiguous("cache_seqlens", lengths)
    return lengths, None if device is None else arrays.as_stream(stream, lengths.data.device_id)
