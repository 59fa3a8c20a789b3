"""The GPU's side of the cache: launches counted on a pretended GPU, contents on a real one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cache_model import Model, contents, histories, latents, operations, rows_of, snapshot, token_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_gpu import FakeStream, pretend_gpu, pretend_numba

from mlacore import arrays, cache_kernels, driver
from mlacore.cache import PagedKVCache

# ---- on a pretended GPU --------------------------------------------------------------------------------------------


@pytest.fixture
def fake_gpu(monkeypatch):
    """Logs of Numba's launches, and of those of CUDA kernels (variant, grid, stream)."""
    return pretend_numba(monkeypatch), pretend_gpu(monkeypatch)


def names(launches: list[tuple]) -> list[str]:
    taken = [name for name, *_ in launches]
    launches.clear()
    return taken


def test_launches_of_every_call(fake_gpu):
    numba, launches = fake_gpu
    cache = PagedKVCache(64, max_seqs=64, max_seq_len=4000, dtype="bfloat16")
    assert cache.device == 0
    assert numba == ["apply_changes", "advance_rows"]  # which compile the kernels
    numba.clear()
    assert names(launches) == ["cache_update.960"]
    stream = FakeStream()
    stream.ptr = 0x50
    seqs = cache.create(3, stream=stream).seqs
    cache.append(seqs, *latents(cache, range(200)), num_tokens=[120, 70, 10], stream=stream)
    assert all(launch[2] == stream.ptr for launch in launches)
    assert [grid for _, grid, _ in launches] == [(1, 1, 1), (1, 1, 1), (50, 1, 1)]
    assert names(launches) == ["cache_update.960", "cache_update.960", "cache_write.bfloat16"]
    cache.append(seqs[:2], *(a.reshape(2, 2, -1) for a in latents(cache, range(4))))
    assert names(launches) == ["cache_update.960", "cache_write.bfloat16"]
    cache.fork(seqs)
    assert names(launches) == ["cache_update.960"]
    cache.extend(seqs, 1)
    assert names(launches) == ["cache_copy", "cache_update.960"]
    cache.gather(seqs)
    assert names(launches) == ["cache_gather"]
    cache.compact()
    assert names(launches) == []
    assert numba == []
    cache.create(1, num_tokens=1500)  # a prompt
    assert (names(launches), numba) == ([], ["apply_changes"])
    cache.reserve(seqs, 3)
    step = cache.step_tokens(4)
    numba.clear()
    names(launches)
    cache.advance(step)
    cache.write(step, *latents(cache, range(4)))
    cache.advanced(step)
    assert (names(launches), numba) == (["cache_write.bfloat16"], ["advance_rows"])
    cache.check_integrity()
    cache.create(50)
    assert names(launches) == ["cache_update.960"]


def test_books_survive_a_failed_launch(fake_gpu, monkeypatch):
    cache = PagedKVCache(8, max_seqs=4, dtype="bfloat16", device="cuda")
    seqs = cache.create(2).seqs
    cache.append(seqs, *latents(cache, range(100)), num_tokens=[70, 30])
    before = snapshot(cache)

    def fail(*_: object) -> None:
        raise RuntimeError("launch failed")

    monkeypatch.setattr(cache_kernels, "_update_launch", fail)
    calls = {
        "extend": lambda: cache.extend(seqs, 100),
        "create": lambda: cache.create(1, num_tokens=5),
        "fork": lambda: cache.fork(seqs),
        "truncate": lambda: cache.truncate(seqs, 3),
        "reserve": lambda: cache.reserve(seqs, 3),
        "free": lambda: cache.free(seqs),
    }
    for call in calls.values():
        with pytest.raises(RuntimeError, match="launch failed"):
            call()
        assert snapshot(cache) == before
        cache.check_integrity()


@settings(max_examples=60)
@given(
    operations(longest=60, max_size=10),
    st.integers(1, 30),
    st.sampled_from([16, 32, 64, 128, 256]),
    st.sampled_from([None, 2]),
)
def test_random_operations_on_a_pretended_gpu(ops, num_pages, page_size, num_layers):
    with pytest.MonkeyPatch.context() as patch:
        pretend_numba(patch)
        pretend_gpu(patch)
        options = {"num_layers": num_layers, "interleaved": bool(num_layers), "dtype": "bfloat16"}
        Model(PagedKVCache(num_pages, page_size, max_seqs=5, max_seq_len=400, device="cuda:0", **options)).run(ops)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "float32"}, TypeError, "dtype: got float32, expected bfloat16 or float16"),
        (
            {"page_size": 48},
            ValueError,
            r"page_size: got 48, expected 16, 32, 64, 128, 256 \(what the GPU kernels take\)",
        ),
        ({"kv_lora_rank": 256}, ValueError, "kv_lora_rank: got 256, expected 512"),
        ({"qk_rope_head_dim": 128}, ValueError, "qk_rope_head_dim: got 128, expected 64"),
    ],
)
def test_what_the_gpu_does_not_take(fake_gpu, arguments, error, message):
    with pytest.raises(error, match=message):
        PagedKVCache(4, **arguments)


def test_host_arrays_are_refused_on_the_gpu(fake_gpu):
    cache = PagedKVCache(4, dtype="float16")
    seqs = cache.create(1).seqs
    ckv, kpe = latents(cache, range(3))
    before = snapshot(cache)
    for bad in ((np.array(ckv), kpe), (ckv, np.array(kpe))):
        with pytest.raises(TypeError, match=r"got numpy.ndarray, expected a GPU array \(the cache is on cuda:0\)"):
            cache.append(seqs, *bad, num_tokens=3)
        with pytest.raises(TypeError, match=r"got numpy.ndarray, expected a GPU array \(the cache is on cuda:0\)"):
            cache.append(seqs, *(array[:0] for array in bad), num_tokens=0)
    with pytest.raises(TypeError, match="num_tokens: got a GPU array, expected integers on the host"):
        cache.append(seqs, ckv, kpe, num_tokens=arrays.import_cupy().asarray([3]))
    assert snapshot(cache) == before


def test_a_gpu_that_is_not_there_is_an_error():
    if driver.hopper_devices():
        pytest.skip("needs a machine without a Hopper GPU")
    assert PagedKVCache(1, max_seqs=1).device is None
    for device in ("cuda", "cuda:0", 0):
        with pytest.raises(RuntimeError) as caught:
            PagedKVCache(1, device=device)
        assert str(caught.value) == (
            f"device: got {device!r} and found no CUDA device 0, expected a Hopper GPU (H100, H200, H800, H20); "
            'device="cpu" works without one, and `python -m mlacore info` tells more'
        )


def test_a_gpu_of_another_kind_is_named(monkeypatch):
    monkeypatch.setattr(driver, "hopper_devices", list)
    monkeypatch.setattr(driver, "compute_capability", lambda device: (8, 0))
    monkeypatch.setattr(driver, "device_name", lambda device: "NVIDIA A100")
    message = r"device: got 'cuda:1' and found NVIDIA A100 \(device 1, compute capability 8.0\), expected a Hopper GPU"
    with pytest.raises(RuntimeError, match=message):
        PagedKVCache(1, device="cuda:1")
    assert PagedKVCache(1, max_seqs=1).device is None


# ---- on a real GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_random_operations_match_plain_lists_on_gpu(page_size):
    """10,000 over the five page sizes."""
    count = 0

    @settings(max_examples=120)
    @given(
        operations(longest=90, max_size=30, min_size=15),
        st.integers(1, 24),
        st.sampled_from(["bfloat16", "float16"]),
        st.sampled_from([(None, False), (2, False), (2, True)]),
        st.sampled_from([0, 1024]),
    )
    def run(ops, num_pages, dtype, layers, longest):
        nonlocal count
        options = {"num_layers": layers[0], "interleaved": layers[1], "dtype": dtype, "device": "cuda"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_kernels, "UPDATE_LONGEST", longest)  # 0 sends most updates through Numba
            model = Model(PagedKVCache(num_pages, page_size, max_seqs=5, max_seq_len=700, **options))
            model.run(ops)
        count += model.num_operations

    run()
    assert count >= 2_000


@pytest.mark.gpu
def test_steps_on_a_stream_of_their_own():
    import cupy

    cache = PagedKVCache(64, max_seqs=16, device="cuda")
    model, stream = Model(cache), cupy.cuda.Stream(non_blocking=True)
    seqs = cache.create(16).seqs
    model.tokens = {int(seq): [] for seq in seqs}
    cupy.cuda.get_current_stream().synchronize()
    for step in range(100):
        for seq, token in zip(seqs.tolist(), range(16 * step, 16 * step + 16), strict=True):
            model.tokens[seq].append(token)
        with stream:
            ckv, kpe = latents(cache, [histories(model.tokens[seq])[-1] for seq in seqs.tolist()])
        cache.append(seqs, ckv[:, None], kpe[:, None], stream=stream)
    table, lengths = cache.batch(seqs[::-1], stream=stream)
    stream.synchronize()
    assert cupy.asnumpy(lengths).tolist() == [100] * 16
    np.testing.assert_array_equal(cupy.asnumpy(table), cupy.asnumpy(cache.block_table)[seqs[::-1], :2])
    model.check()


@pytest.mark.gpu
def test_long_prompts_fill_many_blocks():
    cache = PagedKVCache(700, max_seqs=3, device="cuda")
    model = Model(cache)
    prompts = [(0, 0, 0)] * 3
    model.run([("create", prompts, "new"), ("append", [0, 1, 2], [33_000, 1, 9_999], 1, "ragged"), ("free", [0])])


@pytest.mark.gpu
def test_strided_inputs_on_gpu():
    import cupy

    cache = PagedKVCache(4, max_seqs=2, device="cuda")
    seqs = cache.create(2).seqs
    rows = token_rows(range(6), 640, cache.dtype).reshape(2, 3, 640)
    fused = cupy.asarray(rows)
    cache.append(seqs, fused[:, :, :512], fused[:, :, 512:576])
    for i, seq in enumerate(seqs):
        np.testing.assert_array_equal(contents(cache, seq), rows[i, :, :576])


@pytest.mark.gpu
def test_host_arrays_are_refused_on_a_real_gpu():
    cache = PagedKVCache(4, max_seqs=2, dtype="float16", device="cuda")
    seqs = cache.create(1).seqs
    with pytest.raises(TypeError, match="expected a GPU array"):
        cache.append(seqs, *rows_of(1, rank=512, rope=64, dtype=np.float16), num_tokens=1)
    cache.check_integrity()
    assert cache.num_free_pages == 4


SANITIZED = """
import cupy
import numpy as np
from mlacore import PagedKVCache
cupy.cuda.set_allocator(None)  # an allocation each, so that one byte past any of them shows
for dtype, page_size, layers in (("bfloat16", 16, None), ("float16", 256, 2), ("bfloat16", 64, 3)):
    cache = PagedKVCache(19, page_size, max_seqs=7, max_seq_len=5 * page_size, dtype=dtype, num_layers=layers)
    seqs, _, tokens = cache.create(3, num_tokens=[5 * page_size, 2 * page_size - 3, 1])
    rows = cupy.ones((len(tokens), 584), cache.dtype)
    table = cupy.ones((5 * page_size, 32), np.float32)
    options = {"norm_weight": rows[0, :512], "rope_cos": table, "rope_sin": table}
    count = len(cache.layers)
    for layer in range(count):
        cache.write(tokens, rows[:, :512], rows[:, 520:], layer=layer)
        cache.write(tokens, rows[:, :512], rows[:, 520:], layer=layer, **options)
        cache.write(tokens, rows[:, :512], rows[:, 520:], layer=layer, rope_interleaved=False, **options)
    (child,) = cache.fork(seqs[1:2])
    cache.extend([child], 1)
    cache.reserve([child, seqs[2]], [2, page_size])
    step = cache.step_tokens()
    for _ in range(page_size + 2):
        cache.advance(step)
        for layer in range(count):
            cache.write(step, rows[:7, :512], rows[:7, 520:], layer=layer, **options)
    cache.free(seqs[:1])
    cache.compact()
    for layer in range(count):
        cache.gather(seqs[1:], layer=layer)
cupy.cuda.Device().synchronize()
"""


@pytest.mark.gpu
def test_memcheck_is_clean():
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer on the PATH")
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    command = [sanitizer, *options, sys.executable, "-c", SANITIZED]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
