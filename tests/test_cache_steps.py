"""Steps that the device makes by itself: reserve, advance, advanced; on the CPU step by step, on a GPU as one CUDA
graph that is replayed. Both must give what the host's own loop gives, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cache_model import contents, latents, make_cache

from mlacore import arrays, mla_decode, plan_decode
from mlacore.cache import PagedKVCache

NUM_LAYERS = 2
NUM_ROWS = 6  # the padded batch


class Loop:
    """A made-up model: each layer's new row is the last layer's output for the same sequence, normalised and rotated,
    so that whatever goes wrong in a step reaches all later ones."""

    def __init__(self, device: str, *, page_size: int = 16, num_heads: int = 4, dtype: str = "bfloat16") -> None:
        self.xp = np if device == "cpu" else arrays.import_cupy()
        self.cache = PagedKVCache(
            160, page_size, num_layers=NUM_LAYERS, interleaved=True, max_seqs=8, dtype=dtype, device=device
        )
        rng = np.random.default_rng(0)
        self.q = [self.draw(rng, (NUM_ROWS, 1, num_heads, 576)) for _ in range(NUM_LAYERS)]
        angles = np.arange(1024)[:, None] * 1e-4 ** (np.arange(32) / 32)
        self.transform = {
            "norm_weight": self.draw(rng, (512,)),
            "rope_cos": self.xp.asarray(np.cos(angles).astype(np.float32)),
            "rope_sin": self.xp.asarray(np.sin(angles).astype(np.float32)),
        }
        self.out = [self.draw(rng, (NUM_ROWS, 1, num_heads, 512)) for _ in range(NUM_LAYERS)]
        self.lse = self.xp.empty((NUM_ROWS, num_heads, 1), np.float32)
        self.rng = rng
        self.plan = plan_decode(self.cache.cache_seqlens[:NUM_ROWS], num_heads=num_heads)

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
        values = rng.standard_normal(shape, dtype=np.float32).astype(self.cache.dtype)
        return values if self.xp is np else self.xp.asarray(values.view(np.uint16)).view(self.cache.dtype)

    def join(self, length: int) -> int:
        """A prompt, and a first input for its row."""
        seqs, _, tokens = self.cache.create(1, num_tokens=length)
        for layer in range(NUM_LAYERS):
            self.cache.write(tokens, self.draw(self.rng, (length, 512)), self.draw(self.rng, (length, 64)), layer=layer)
            self.out[layer][int(seqs[0])] = self.draw(self.rng, self.out[layer].shape[1:])
        return int(seqs[0])

    def attend(self, tokens: Any, rows: Any, stream: Any = None) -> None:
        """Write and attend, layer by layer; `rows` are those of the batch that `tokens` stand for."""
        cache = self.cache
        self.plan.update(cache.cache_seqlens[:NUM_ROWS], stream=stream)
        for layer in range(NUM_LAYERS):
            previous = self.out[layer - 1][:, 0]
            if rows is not None:  # picked as bits, which CuPy can index whatever they stand for
                previous = previous.view(np.uint16)[self.xp.asarray(rows)].view(previous.dtype)
            ckv, kpe = previous[:, 0], previous[:, 1, :64]
            cache.write(tokens, ckv, kpe, layer=layer, stream=stream, **self.transform)
            mla_decode(
                self.q[layer],
                cache.layers[layer],
                cache.block_table[:NUM_ROWS],
                cache.cache_seqlens[:NUM_ROWS],
                plan=self.plan,
                out=self.out[layer],
                lse=self.lse,
                stream=stream,
            )

    def eager(self, seqs: list[int]) -> bytes:
        """A step by the host's books."""
        self.attend(self.cache.extend(seqs, 1), np.array(seqs))
        return self.result()

    def result(self) -> bytes:
        return self.host(self.out[-1]).tobytes() + self.host(self.lse).tobytes()

    def host(self, array: Any) -> np.ndarray:
        return array if self.xp is np else self.xp.asnumpy(array)

    def rows(self, seq: int, layer: int) -> np.ndarray:
        return self.host(self.cache.gather([seq], layer=layer)).view(np.uint16)


# Phases between which sequences join and leave: (lengths that join, rows that leave, steps).
PHASES = [([40, 3], [], 100), ([17], [], 60), ([1, 30], [1], 56), ([], [0, 2], 40)]


def run_eagerly(device: str, **options: Any) -> tuple[Loop, list[bytes]]:
    loop, results, alive = Loop(device, **options), [], []
    for joining, leaving, steps in PHASES:
        loop.cache.free(leaving)
        alive = sorted([seq for seq in alive if seq not in leaving] + [loop.join(length) for length in joining])
        results += [loop.eager(alive) for _ in range(steps)]
        loop.cache.check_integrity()
    return loop, results


def run_by_itself(device: str, **options: Any) -> tuple[Loop, list[bytes]]:
    loop, results, alive = Loop(device, **options), [], []
    step = loop.cache.step_tokens(NUM_ROWS)
    replay = None
    for joining, leaving, steps in PHASES:
        loop.cache.free(leaving)
        alive = sorted([seq for seq in alive if seq not in leaving] + [loop.join(length) for length in joining])
        loop.cache.reserve(alive, steps)
        before = loop.cache.seq_lens.copy()
        if replay is None:
            replay = captured(loop, step) if device != "cpu" else lambda: run_step(loop, step)
        for _ in range(steps):
            replay()
            results.append(loop.result())
        np.testing.assert_array_equal(loop.cache.seq_lens, before)
        loop.cache.advanced(step, steps)
        loop.cache.check_integrity()
    return loop, results


def run_step(loop: Loop, step: Any, stream: Any = None) -> None:
    loop.cache.advance(step, stream=stream)
    loop.attend(step, None, stream)


def captured(loop: Loop, step: Any) -> Any:
    """One graph for the whole step, captured once."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    warm_up(loop, step)
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(no_allocation):
        stream.begin_capture()
        try:
            run_step(loop, step, stream)
        finally:
            graph = stream.end_capture()

    def replay() -> None:
        cupy.cuda.get_current_stream().synchronize()  # sequences join and leave on another stream
        graph.launch(stream)
        stream.synchronize()

    return replay


def no_allocation(size: int) -> Any:
    raise AssertionError(f"{size} bytes allocated in a capture")


def warm_up(loop: Loop, step: Any) -> None:
    """Load every kernel on a twin, whose books may suffer."""
    twin = Loop("cuda", page_size=loop.cache.page_size, num_heads=loop.q[0].shape[2], dtype=loop.cache.dtype.name)
    twin.join(5)
    run_step(twin, twin.cache.step_tokens(NUM_ROWS))


def assert_same(eager: tuple[Loop, list[bytes]], replayed: tuple[Loop, list[bytes]]) -> None:
    assert len(eager[1]) == sum(steps for _, _, steps in PHASES) == 256
    for step, (expected, actual) in enumerate(zip(eager[1], replayed[1], strict=True)):
        assert actual == expected, f"step {step}"
    np.testing.assert_array_equal(replayed[0].cache.seq_lens, eager[0].cache.seq_lens)
    for seq in np.flatnonzero(eager[0].cache.seq_lens).tolist():
        for layer in range(NUM_LAYERS):
            np.testing.assert_array_equal(replayed[0].rows(seq, layer), eager[0].rows(seq, layer))


def test_256_steps_equal_the_eager_loop_bit_by_bit():
    assert_same(run_eagerly("cpu"), run_by_itself("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize(("page_size", "num_heads", "dtype"), [(64, 16, "bfloat16"), (64, 128, "float16")])
def test_256_replays_of_one_graph_equal_the_eager_loop_bit_by_bit(page_size, num_heads, dtype):
    options = {"page_size": page_size, "num_heads": num_heads, "dtype": dtype}
    assert_same(run_eagerly("cuda", **options), run_by_itself("cuda", **options))


def rows_after_a_step(device: str) -> np.ndarray:
    """A prompt of 40 tokens and the one that a step adds, in the last layer."""
    loop = Loop(device, page_size=64)
    seq = loop.join(40)
    loop.cache.reserve([seq], 1)
    step = loop.cache.step_tokens(NUM_ROWS)
    run_step(loop, step)
    loop.cache.advanced(step)
    return loop.rows(seq, NUM_LAYERS - 1).view(loop.cache.dtype).astype(np.float32)


def test_a_step_adds_a_row():
    rows = rows_after_a_step("cpu")
    assert rows.shape == (41, 576)
    assert 0.5 < np.abs(rows[40, :512]).mean() < 2  # normalised


@pytest.mark.gpu
def test_the_gpus_steps_are_near_the_cpus():
    np.testing.assert_allclose(rows_after_a_step("cuda"), rows_after_a_step("cpu"), atol=0.05, rtol=0.02)


def test_rows_that_are_not_reserved_stay_as_they_are():
    cache = make_cache()
    seqs = cache.create(3, num_tokens=[5, 6, 7]).seqs
    cache.reserve(seqs[[0, 2]], [2, 4])
    step = cache.step_tokens(4, 2)
    kept = contents(cache, 1).copy()
    for _ in range(3):  # the last one finds no room
        cache.advance(step)
        cache.write(step, *latents(cache, range(8)))
    assert cache.cache_seqlens.tolist() == [7, 6, 11, 0, 0]
    assert step.slots.tolist() == [-1] * 8
    np.testing.assert_array_equal(contents(cache, 1), kept)
    with pytest.raises(ValueError, match=r"num_steps: got 2, expected at most 1 .* sequence 0 holds 5"):
        cache.advanced(step, 2)


def test_used_up_reservations_do_not_hold_others_back():
    cache = make_cache()
    seqs = cache.create(2, num_tokens=[5, 6]).seqs
    cache.reserve(seqs, [2, 5])
    step = cache.step_tokens()
    for steps in (2, 3):
        for _ in range(steps):
            cache.advance(step)
        cache.advanced(step, steps)
    assert cache.seq_lens[seqs].tolist() == [7, 11]
    cache.check_integrity()


def test_reserving_again_replaces_and_other_calls_end_it():
    cache = make_cache()
    (seq,) = cache.create(1, num_tokens=3).seqs
    cache.reserve([seq], 20)
    assert cache.num_free_pages == 6
    cache.reserve([seq], 2)
    assert cache.num_free_pages == 10
    cache.reserve([seq], 9)
    cache.extend([seq], 1)  # the first reserved page is enough
    assert cache.num_free_pages == 11
    cache.reserve([seq], 5)
    (child,) = cache.fork([seq])
    assert cache.num_free_pages == 11
    cache.reserve([seq, child], 5)
    assert cache.num_free_pages == 7
    cache.truncate([seq], 3)
    assert cache.num_free_pages == 9
    step = cache.step_tokens()
    cache.advance(step)
    assert cache.cache_seqlens[[seq, child]].tolist() == [3, 5]
    cache.advanced(step)
    cache.check_integrity()


def test_reserving_copies_a_shared_last_page_at_once():
    cache = make_cache()
    cache.append(cache.create(1).seqs, *latents(cache, range(6)), num_tokens=6)
    (child,) = cache.fork([0])
    cache.reserve([child], 1)
    step = cache.step_tokens()
    cache.advance(step)
    cache.write(step, *latents(cache, range(5)))
    cache.advanced(step)
    np.testing.assert_array_equal(contents(cache, child)[:6], contents(cache, 0))
    assert cache.block_table[child, 1] != cache.block_table[0, 1]
    cache.check_integrity()
