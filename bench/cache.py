"""Measure the paged cache: what it costs to append, to update block tables, to gather, and the host's bookkeeping.

``python -m bench.cache`` prints one table, writes ``bench/results/cache/<device>-<date>.json`` and fills the README's
section from the newest such file. Without a Hopper GPU it measures the host's part alone. On a GPU, times are
CUDA-graph replays; an append is held against a kernel that copies the same bytes from one contiguous array to another.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.timing import Budget, capture, host_us, time_in_turns
from mlacore import PagedKVCache, cache_kernels, driver
from mlacore.block_tables import TableChanges
from mlacore.cache_layout import PLAIN
from mlacore.params import HEAD_DIM_QK, KV_LORA_RANK, PAGE_SIZE, PAGE_SIZES, QK_ROPE_HEAD_DIM

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cache"
MARKERS = "<!-- bench:cache -->\n", "<!-- /bench:cache -->"
BATCH = 128
TABLE_SEQS = 1024
GATHERED_TOKENS = 4096  # of each of 16 sequences
CALLS = 50  # in a graph: its own launch, a few µs, is shared by all of them
BUDGET = Budget(rounds=3, seconds=0.2, min_replays=10, max_replays=100)

# One thread a 16-byte cell: the least that writing so many bytes can cost.
COPY_CODE = r"""
extern "C" __global__ void copy(const uint4* source, uint4* target, int num_cells) {
  const int cell = blockIdx.x * blockDim.x + threadIdx.x;
  if (cell < num_cells) target[cell] = source[cell];
}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the JSON and the README's section."""
    parser = argparse.ArgumentParser(prog="python -m bench.cache", description=__doc__.splitlines()[0])
    parser.add_argument("--table-only", action="store_true", help="only rewrite the README's section")
    arguments = parser.parse_args(argv)
    if not arguments.table_only:
        gpus = driver.hopper_devices()
        result = {
            "date": datetime.date.today().isoformat(),
            "device": device_label(bool(gpus)),
            "rows": host_rows() + (gpu_rows() if gpus else []),
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", str(result["device"]).lower()).strip("-")
        (RESULTS / f"{name}-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(table(result))
    write_readme(ROOT / "README.md", newest(RESULTS))
    return 0


# ---- publishing ----------------------------------------------------------------------------------------------------


def newest(folder: Path) -> dict[str, Any]:
    """The latest result, one of a GPU before one without."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise SystemExit(f"{folder}: no result; run python -m bench.cache first")
    return max(results, key=lambda result: (any(row["where"] == "GPU" for row in result["rows"]), result["date"]))


def table(result: dict[str, Any]) -> str:
    """A result as a Markdown table under its device line."""
    lines = [f"**{result['device']}**, {result['date']}.", "", "| where | what | measured | |", "|---|---|---:|---|"]
    lines += [f"| {row['where']} | {row['what']} | {row['text']} | {row['note']} |" for row in result["rows"]]
    return "\n".join(lines)


def write_readme(path: Path, result: dict[str, Any]) -> None:
    """Put the table between the README's markers."""
    begin, end = MARKERS
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{path}: expected one section from {begin.strip()} to {end}")
    before, rest = text.split(begin)
    path.write_text(f"{before}{begin}{table(result)}\n{end}{rest.split(end)[1]}")


def device_label(has_gpu: bool) -> str:
    """The GPU's name, or the host's processor."""
    if has_gpu:
        return driver.device_name(0)
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"CPU {model.group(1).strip() if model else platform.machine()}"


def row(where: str, what: str, value: float, unit: str, note: str = "") -> dict[str, Any]:
    """One figure: as a number, and as it is shown."""
    shown = f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"
    return {"where": where, "what": what, "value": round(value, 4), "text": f"{shown} {unit}", "note": note}


# ---- the host's part -----------------------------------------------------------------------------------------------


def host_rows() -> list[dict[str, Any]]:
    """What books and NumPy cost, on any machine."""
    cache = PagedKVCache(8192, kv_lora_rank=8, qk_rope_head_dim=8, dtype="float16", max_seqs=256, device="cpu")
    rng = np.random.default_rng(0)

    def create_and_free(num_seqs: int, num_tokens: int) -> None:
        cache.free(cache.create(num_seqs, num_tokens=num_tokens).seqs)

    rows = []
    for num_seqs, num_tokens in ((1, 4096), (64, 4096), (128, 64)):
        pages = num_seqs * -(-num_tokens // PAGE_SIZE)
        seconds = clock(functools.partial(create_and_free, num_seqs, num_tokens))
        what = f"create and free, {num_seqs} prompt{'s' * (num_seqs > 1)} of {num_tokens:,} tokens at once"
        rows.append(row("host", what, pages / seconds / 1e3, "K pages/s"))
    ids = rng.integers(0, 100_000, 4096)
    seq = int(cache.create(1, num_tokens=4096).seqs[0])
    cache.publish(seq, ids)
    seconds = clock(lambda: cache.free(cache.create(1, prefix=[ids]).seqs))
    rows.append(
        row("host", "create of 4,096 tokens that are all found, and free", seconds * 1e6, "µs", "hashes included")
    )
    cache.free([seq])
    lengths = rng.integers(64, 1000, BATCH)
    seqs = cache.create(BATCH, num_tokens=lengths).seqs
    books = cache._host
    grow = clock(lambda: books.commit(books.changes_to_grow(seqs, 1)), repeats=100)
    rows.append(row("host", f"books of an append, {BATCH} sequences", grow * 1e6, "µs", "no launch, no check"))
    return rows


def clock(call: Callable[[], Any], repeats: int = 20) -> float:
    """Seconds of a call: the median over bursts."""
    call()
    bursts = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        bursts.append((time.perf_counter() - start) / repeats)
    return float(np.median(bursts))


# ---- the GPU's part ------------------------------------------------------------------------------------------------


def gpu_rows() -> list[dict[str, Any]]:
    """Launches by graph replay, eager calls by the host's clock."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        rows = append_rows(cupy, stream)
        rows += update_rows(cupy, stream)
        for page_size in PAGE_SIZES:
            rows += page_size_rows(cupy, stream, page_size)
    return rows


def append_rows(cupy: Any, stream: Any) -> list[dict[str, Any]]:
    """An append of 128 tokens against a copy of as many bytes; and what the host takes for it."""
    cache, seqs = batch_cache(PAGE_SIZE)
    ckv, kpe = token_inputs(cupy, cache)
    tokens = cache.extend(seqs, 1)
    source, target = (cupy.zeros((BATCH, HEAD_DIM_QK), np.uint16) for _ in range(2))
    copy, cells = cupy.RawKernel(COPY_CODE, "copy"), np.int32(source.nbytes // 16)
    weight, angles = cupy.ones(KV_LORA_RANK, cache.dtype), cupy.ones((4096, QK_ROPE_HEAD_DIM // 2), np.float32)
    step = cache.step_tokens(BATCH)
    cache.reserve(seqs, 1)
    lengths = cache.cache_seqlens.copy()

    def reset() -> None:  # or only the first of many calls would find something reserved
        cache.cache_seqlens.data.copy_from_device_async(lengths.data, lengths.nbytes)

    def advance() -> None:
        reset()
        cache.advance(step)

    calls = {
        "copy": lambda: copy((-(-int(cells) // 128),), (128,), (source, target, cells)),
        "memcpy": lambda: target.data.copy_from_device_async(source.data, source.nbytes),
        "write": lambda: cache.write(tokens, ckv, kpe),
        "both": lambda: cache.write(tokens, ckv, kpe, norm_weight=weight, rope_cos=angles, rope_sin=angles),
        "reset": reset,
        "advance": advance,
    }
    us = graph_us(calls, stream)
    host = host_us(lambda: cache.append(seqs, ckv, kpe, num_tokens=1), stream)
    extend = host_us(lambda: cache.extend(seqs, 1), stream)
    note = f"{us['write'] / us['copy']:.2f}× the copy kernel"
    return [
        row("GPU", f"copy kernel, {BATCH} × 1,152 bytes", us["copy"], "µs", f"device memcpy: {us['memcpy']:.2f} µs"),
        row("GPU", f"write, {BATCH} tokens", us["write"], "µs", note),
        row("GPU", f"write, {BATCH} tokens, RMSNorm and RoPE", us["both"], "µs", f"{us['both'] / us['copy']:.2f}×"),
        row("GPU", f"advance, {BATCH} sequences", us["advance"] - us["reset"], "µs", "once a step, for all layers"),
        row("host", f"append, {BATCH} sequences, launches included", host, "µs"),
        row("host", f"extend, {BATCH} sequences, launch included", extend, "µs"),
    ]


def update_rows(cupy: Any, stream: Any) -> list[dict[str, Any]]:
    """One step's changes for 1,024 sequences, each with a token and a new page."""
    cache = PagedKVCache(2 * TABLE_SEQS, max_seqs=TABLE_SEQS, max_seq_len=16 * PAGE_SIZE, device="cuda")
    store, rows = cache._store, np.arange(TABLE_SEQS)
    where = cupy.empty((2, TABLE_SEQS), np.int64)
    pages = np.arange(TABLE_SEQS, dtype=np.int32)
    plain = TableChanges.pack(rows, lengths=5, tokens=1)
    paged = TableChanges.pack(rows, lengths=1, tokens=1, num_pages=np.ones(TABLE_SEQS, np.int64), pages=pages)

    def update(changes: TableChanges) -> None:
        words = cache_kernels.update_words(changes)
        assert words is not None
        tables = store.block_table, store.cache_seqlens, store.limits, where
        cache_kernels.launch_update(changes, words, *tables, PAGE_SIZE, stream)

    us = graph_us({"plain": lambda: update(plain), "paged": lambda: update(paged)}, stream)
    what = f"block-table update, {TABLE_SEQS:,} sequences"
    return [
        row("GPU", what, us["plain"], "µs"),
        row("GPU", f"{what}, a new page each", us["paged"], "µs"),
    ]


def page_size_rows(cupy: Any, stream: Any, page_size: int) -> list[dict[str, Any]]:
    """What a page size costs: an append of 128 tokens, and gathering 64K tokens in shuffled pages."""
    cache, seqs = batch_cache(page_size)
    ckv, kpe = token_inputs(cupy, cache)
    tokens = cache.extend(seqs, 1)
    pages = GATHERED_TOKENS // page_size
    books = PagedKVCache(16 * pages, page_size, max_seqs=16, max_seq_len=GATHERED_TOKENS, device="cuda")
    table = np.random.default_rng(0).permutation(16 * pages).astype(np.int32).reshape(16, pages)
    spans = cupy.asarray(np.array([(seq, GATHERED_TOKENS, seq * GATHERED_TOKENS) for seq in range(16)], np.int64))
    gathered = cupy.empty((16 * GATHERED_TOKENS, HEAD_DIM_QK), books.dtype)
    device_table = cupy.asarray(table)
    calls = {
        "write": lambda: cache_kernels.launch_write(cache.layers[0], tokens.where, ckv, kpe, PLAIN, stream),
        "gather": lambda: cache_kernels.launch_gather(
            books.layers[0], device_table, spans, GATHERED_TOKENS, gathered, stream
        ),
    }
    us = graph_us(calls, stream)
    gb_per_s = 2 * gathered.nbytes / us["gather"] / 1e3
    note = f"gather of {16 * GATHERED_TOKENS:,} tokens in shuffled pages: {us['gather']:,.1f} µs, {gb_per_s:,.0f} GB/s"
    return [row("GPU", f"page of {page_size}: write, {BATCH} tokens", us["write"], "µs", note)]


def batch_cache(page_size: int) -> tuple[PagedKVCache, np.ndarray]:
    """A cache with 128 sequences of different lengths."""
    lengths = np.random.default_rng(0).integers(100, 2000, BATCH)
    cache = PagedKVCache(BATCH * 8192 // page_size, page_size, max_seqs=BATCH, max_seq_len=8192, device="cuda")
    return cache, cache.create(BATCH, num_tokens=lengths).seqs


def token_inputs(cupy: Any, cache: PagedKVCache) -> tuple[Any, Any]:
    """Rows of 128 tokens as slices of a projection's output."""
    fused = cupy.ones((BATCH, HEAD_DIM_QK), cache.dtype)
    return fused[:, :KV_LORA_RANK], fused[:, KV_LORA_RANK:]


def graph_us(calls: dict[str, Callable[[], Any]], stream: Any) -> dict[str, float]:
    """µs of each call, by replay of graphs that hold it many times."""
    for call in calls.values():
        call()
    stream.synchronize()
    replays = {name: capture([call] * CALLS, stream) for name, call in calls.items()}
    return {name: timing.us for name, timing in time_in_turns(replays, CALLS, stream, BUDGET).items()}


if __name__ == "__main__":
    raise SystemExit(main())
