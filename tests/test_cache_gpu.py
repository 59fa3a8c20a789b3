"""The GPU's side of the cache: launches counted on a pretended GPU, contents on a real one."""

from __future__ import annotations

import numpy as np
import pytest
from cache_model import Model, contents, latents, operations, rows_of, snapshot, token_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_gpu import FakeStream, pretend_gpu, pretend_updates

from mlacore import arrays, driver
from mlacore import cache as cache_module
from mlacore.cache import PagedKVCache

# ---- on a pretended GPU --------------------------------------------------------------------------------------------


@pytest.fixture
def fake_gpu(monkeypatch):
    """Logs of launches that update tables, and of launches that write rows."""
    return pretend_updates(monkeypatch), pretend_gpu(monkeypatch)


def test_one_launch_updates_and_one_writes(fake_gpu):
    updates, writes = fake_gpu
    cache = PagedKVCache(8, max_seqs=4, dtype="float16")
    assert cache.device == 0
    updates.clear()  # the one that compiles the kernel
    seqs = cache.allocate(3)
    assert (updates, writes) == ([], [])
    stream = FakeStream()
    cache.append(seqs, *latents(cache, range(200)), num_tokens=[120, 70, 10], stream=stream)
    assert updates == [3]
    assert writes == [((200, 512), (200, 64), (200,), stream)]
    cache.append(seqs[:2], *(a.reshape(2, 2, -1) for a in latents(cache, range(4))), stream=stream)
    assert updates == [3, 2]
    assert writes[1:] == [((4, 512), (4, 64), (4,), stream)]
    slots = cache.extend(seqs, 1)
    assert (len(updates), len(writes)) == (3, 2)
    cache.write(slots, *latents(cache, range(3)))
    assert (len(updates), len(writes)) == (3, 3)
    cache.free(seqs)
    cache.check_integrity()
    assert (len(updates), len(writes)) == (4, 3)


def test_books_survive_a_failed_launch(fake_gpu, monkeypatch):
    cache = PagedKVCache(8, max_seqs=4, dtype="float16", device="cuda")
    seqs = cache.allocate(2)
    cache.append(seqs, *latents(cache, range(100)), num_tokens=[70, 30])
    before = snapshot(cache)

    def fail(*_: object) -> None:
        raise RuntimeError("launch failed")

    monkeypatch.setattr(cache_module, "apply_changes_cuda", fail)
    for call in (lambda: cache.extend(seqs, 100), lambda: cache.free(seqs)):
        with pytest.raises(RuntimeError, match="launch failed"):
            call()
        assert snapshot(cache) == before
        cache.check_integrity()


@settings(max_examples=20)
@given(operations(longest=150, max_size=8), st.integers(1, 12))
def test_random_operations_on_a_pretended_gpu(ops, num_pages):
    with pytest.MonkeyPatch.context() as patch:
        pretend_updates(patch)
        pretend_gpu(patch)
        Model(PagedKVCache(num_pages, max_seqs=5, max_seq_len=700, dtype="float16", device="cuda:0")).run(ops)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "float32"}, TypeError, "dtype: got float32, expected bfloat16 or float16"),
        ({"page_size": 16}, ValueError, r"page_size: got 16, expected 64 \(what the GPU kernels take\)"),
        ({"kv_lora_rank": 256}, ValueError, "kv_lora_rank: got 256, expected 512"),
        ({"qk_rope_head_dim": 128}, ValueError, "qk_rope_head_dim: got 128, expected 64"),
    ],
)
def test_what_the_gpu_does_not_take(fake_gpu, arguments, error, message):
    with pytest.raises(error, match=message):
        PagedKVCache(4, **arguments)


def test_host_arrays_are_refused_on_the_gpu(fake_gpu):
    cache = PagedKVCache(4, dtype="float16")
    seqs = cache.allocate(1)
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
@settings(max_examples=40)
@given(operations(longest=150, max_size=20), st.integers(1, 24), st.sampled_from(["bfloat16", "float16"]))
def test_random_operations_match_plain_lists_on_gpu(ops, num_pages, dtype):
    Model(PagedKVCache(num_pages, max_seqs=5, max_seq_len=700, dtype=dtype, device="cuda")).run(ops)


@pytest.mark.gpu
def test_steps_on_a_stream_of_their_own():
    import cupy

    cache = PagedKVCache(64, max_seqs=16, device="cuda")
    model, stream = Model(cache), cupy.cuda.Stream(non_blocking=True)
    seqs = cache.allocate(16)
    model.tokens = {int(seq): [] for seq in seqs}
    for step in range(100):
        tokens = list(range(16 * step, 16 * step + 16))
        with stream:
            ckv, kpe = latents(cache, tokens)
        cache.append(seqs, ckv[:, None], kpe[:, None], stream=stream)
        for seq, token in zip(seqs, tokens, strict=True):
            model.tokens[int(seq)].append(token)
    table, lengths = cache.batch(seqs[::-1], stream=stream)
    stream.synchronize()
    assert cupy.asnumpy(lengths).tolist() == [100] * 16
    np.testing.assert_array_equal(cupy.asnumpy(table), cupy.asnumpy(cache.block_table)[seqs[::-1], :2])
    model.check()


@pytest.mark.gpu
def test_long_prompts_fill_many_blocks():
    cache = PagedKVCache(700, max_seqs=3, device="cuda")
    model = Model(cache)
    model.run([("allocate", 3), ("append", [0, 1, 2], [33_000, 1, 9_999], "ragged"), ("free", [0])])


@pytest.mark.gpu
def test_strided_inputs_on_gpu():
    import cupy

    cache = PagedKVCache(4, max_seqs=2, device="cuda")
    seqs = cache.allocate(2)
    rows = token_rows(range(6), 640, cache.dtype).reshape(2, 3, 640)
    fused = cupy.asarray(rows)
    cache.append(seqs, fused[:, :, :512], fused[:, :, 512:576])
    for i, seq in enumerate(seqs):
        np.testing.assert_array_equal(contents(cache, seq), rows[i, :, :576])


@pytest.mark.gpu
def test_host_arrays_are_refused_on_a_real_gpu():
    cache = PagedKVCache(4, max_seqs=2, dtype="float16", device="cuda")
    seqs = cache.allocate(1)
    with pytest.raises(TypeError, match="expected a GPU array"):
        cache.append(seqs, *rows_of(1, rank=512, rope=64, dtype=np.float16), num_tokens=1)
    cache.check_integrity()
    assert cache.num_free_pages == 4
