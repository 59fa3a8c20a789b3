"""Kernels for C hosts: what is written, the header's rules against Python's, and the example, run to its end.

Without a GPU the example runs against `fake_libcuda.c`, which computes what the kernels compute in a plain way.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import struct
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlacore import dispatch, jit, params, plan
from mlacore.__main__ import main
from mlacore.arrays import bfloat16

pytest.importorskip("cuda.bindings.nvrtc", reason="needs the cu13 extra")

FAKE = Path(__file__).with_name("fake_libcuda.c")
WARNINGS = ("-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("export") / "new"
    assert main(["export", str(target)]) == 0
    return target


def compiler(name: str = "cc") -> str:
    if (found := shutil.which(name)) is None:
        pytest.skip(f"needs a compiler called {name}")
    return found


def cuda_headers() -> str:
    """The folder of cuda.h: a toolkit's, or that of NVIDIA's runtime package."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    if (spec := find_spec("nvidia")) is not None:
        places += [folder for root in spec.submodule_search_locations or () for folder in Path(root).glob("*/include")]
    for place in places:
        if (place / "cuda.h").is_file():
            return str(place)
    pytest.skip("needs cuda.h, of the CUDA toolkit or of nvidia-cuda-runtime")


def build(source: Path, target: Path, folder: Path, *options: str) -> Path:
    command = [compiler(), "-std=c11", "-O2", *WARNINGS, "-isystem", cuda_headers(), f"-I{folder}", str(source)]
    done = subprocess.run([*command, *options, "-o", str(target), "-lm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


# ---- what is written -----------------------------------------------------------------------------------------------


def test_every_variant_is_written_and_described(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["kernels"]] == list(jit.VARIANTS)
    written = {path.name for path in folder.iterdir()}
    assert written == {f"{name}.cubin" for name in jit.VARIANTS} | {"mlacore.h", "manifest.json", "decode.c"}
    for entry in manifest["kernels"]:
        assert (folder / entry["file"]).read_bytes() == jit.cubin(jit.VARIANTS[entry["name"]])
        assert entry["parameters"][-1]["bytes"] == manifest["structs"][entry["parameters"][-1]["what"]]["bytes"]


def parameter_sizes(cubin: bytes) -> list[int]:
    """Sizes of a cubin's kernel parameters, as the compiler notes them (EIATTR_KPARAM_INFO and its wider form)."""
    sizes = {}
    for attribute, shift in ((b"\x04\x17\x0c\x00", 18), (b"\x04\x45\x0c\x00", 0)):
        at = -1
        while (at := cubin.find(attribute, at + 1)) >= 0:
            index, ordinal, _, size = struct.unpack_from("<IHHI", cubin, at + 4)
            if index == 0:
                sizes[ordinal] = size >> shift
    return [sizes[ordinal] for ordinal in sorted(sizes)]


def test_manifest_agrees_with_the_cubins(folder):
    for entry in json.loads((folder / "manifest.json").read_text())["kernels"]:
        noted = parameter_sizes((folder / entry["file"]).read_bytes())
        assert noted == [parameter["bytes"] for parameter in entry["parameters"]], entry["name"]


def test_structs_of_the_manifest_are_those_of_the_kernels(folder):
    for name, described in json.loads((folder / "manifest.json").read_text())["structs"].items():
        dtype = params.STRUCTS[name]
        assert described["bytes"] == dtype.itemsize
        assert [(f["name"], f["offset"]) for f in described["fields"]] == [(n, dtype.fields[n][1]) for n in dtype.names]
        assert described["fields"][0]["comment"], "comments come from params.cuh"


def test_export_says_why_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["export", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err


# ---- the header ----------------------------------------------------------------------------------------------------

RULES = """
#include "mlacore.h"
void choose(long long rows, long long batch, long long max_seq_len, int *shape) {
  const MlacoreShape found = mlacore_choose(rows, batch, max_seq_len);
  shape[0] = found.tile_rows, shape[1] = found.cluster_ctas, shape[2] = found.row_blocks;
}
void scratch(const int *shape, int batch, int workers, int heads, long long *bytes) {
  const MlacoreScratch found = mlacore_scratch((MlacoreShape){shape[0], shape[1], shape[2]}, batch, workers, heads);
  bytes[0] = (long long)found.work, bytes[1] = (long long)found.splits, bytes[2] = (long long)found.partial_out;
  bytes[3] = (long long)found.partial_lse, bytes[4] = (long long)found.merge_counters;
  bytes[5] = (long long)found.merge_abandoned, bytes[6] = (long long)found.launches;
}
int prefetches_next(const int *shape, int page_size, int is_contiguous) {
  return mlacore_prefetches_next((MlacoreShape){shape[0], shape[1], shape[2]}, page_size, is_contiguous);
}
int prefetches_first(const int *shape, int is_contiguous) {
  return mlacore_prefetches_first((MlacoreShape){shape[0], shape[1], shape[2]}, is_contiguous);
}
void box(const int *shape, int page_size, uint32_t *box) {
  mlacore_box((MlacoreShape){shape[0], shape[1], shape[2]}, page_size, box);
}
int invariant_splits(long long max_seq_len) { return mlacore_invariant_splits(max_seq_len); }
int is_there(const char *name) { return mlacore_kernel(name) != 0; }
"""


@pytest.fixture(scope="module")
def rules(folder, tmp_path_factory) -> ctypes.CDLL:
    place = tmp_path_factory.mktemp("rules")
    (place / "rules.c").write_text(RULES)
    return ctypes.CDLL(str(build(place / "rules.c", place / "rules.so", folder, "-shared", "-fPIC")))


def test_header_chooses_as_dispatch_does(rules):
    shape = (ctypes.c_int * 3)()
    for rows in (1, 16, 17, 32, 33, 64, 65, 96, 128, 129, 192, 256, 1000):
        for batch in (0, 1, 7, 8, 15, 16, 17, 64):
            for longest in (None, 0, 1, 320, 640, 1024, 5120, 5121, 10240, 10241, 20480, 65536, 1 << 40):
                known = -1 if longest is None else longest
                rules.choose(*map(ctypes.c_longlong, (rows, batch, known)), shape)
                expected = dispatch.choose(rows, batch, longest)
                found = (expected.tile_rows, expected.cluster_ctas, expected.row_blocks)
                assert tuple(shape) == found, (rows, batch, longest)
                assert rules.is_there(expected.variant("bfloat16").encode())
                assert rules.is_there(expected.variant("float16").encode())
    assert not rules.is_there(b"nonsense")


def test_header_splits_as_batch_invariant_plans_do(rules):
    for tokens in (1, 64, 1024, 1025, 65536, 65537, 1 << 30):
        assert rules.invariant_splits(ctypes.c_longlong(tokens)) == plan.invariant_splits(-(-tokens // 64)), tokens


def test_scratch_is_what_a_plan_allocates(rules):
    """The shapes in `mlacore.plan.DecodePlan`'s docstring, in bytes."""
    bytes_ = (ctypes.c_longlong * 7)()
    for tile_rows, ctas, blocks, batch, workers, heads in ((16, 1, 1, 3, 132, 1), (64, 2, 4, 128, 33, 2)):
        rules.scratch((ctypes.c_int * 3)(tile_rows, ctas, blocks), batch, workers, heads, bytes_)
        slots = 2 * workers * heads * blocks
        expected = [
            (workers + 1) * 2 * 4,
            batch * 2 * 4,
            slots * tile_rows * 512 * (2 if tile_rows == 64 else 4),
            slots * (tile_rows // 2) * 4 * 4,
            workers * heads * blocks * 4,
            slots * 4,
            8,
        ]
        assert list(bytes_) == expected


def test_header_prefetches_and_boxes_as_the_driver_does(rules):
    from mlacore import driver

    box = (ctypes.c_uint32 * 5)()
    for rows, longest in ((16, None), (64, None), (128, None), (256, None), (128, 100), (128, 16000)):
        kernel = dispatch.choose(rows, 1, longest)
        shape = (ctypes.c_int * 3)(kernel.tile_rows, kernel.cluster_ctas, kernel.row_blocks)
        for page_size in params.PAGE_SIZES:
            pool = np.empty((2, page_size, 1, 576), np.float16)
            assert rules.prefetches_next(shape, page_size, 1) == driver._prefetches_next(kernel, pool)
            with_gaps = np.empty((2, page_size, 1, 640), np.float16)[..., :576]
            assert rules.prefetches_next(shape, page_size, 0) == driver._prefetches_next(kernel, with_gaps) == 0
            assert rules.prefetches_first(shape, 1) == driver._prefetches_first(kernel, pool)
            assert rules.prefetches_first(shape, 0) == driver._prefetches_first(kernel, with_gaps) == 0
            two_heads = np.empty((2, page_size, 2, 576), np.float16)
            assert driver._prefetches_next(kernel, two_heads) == driver._prefetches_first(kernel, two_heads) == 0
            rules.box(shape, page_size, box)
            assert tuple(box) == params.pool_box(page_size, kernel.cluster_ctas)


def test_header_is_cplusplus_too_and_its_checks_can_fail(folder, tmp_path):
    program = [compiler("c++"), "-std=c++17", "-x", "c++", *WARNINGS, "-fsyntax-only", f"-I{folder}", "-"]
    source = '#include "mlacore.h"\nint main() { return mlacore_kernel("mla_plan") == nullptr; }\n'
    assert subprocess.run(program, input=source, text=True).returncode == 0
    text = (folder / "mlacore.h").read_text()
    (tmp_path / "mlacore.h").write_text(text.replace("int32_t num_pages;", "int64_t num_pages;"))
    program[-2] = f"-I{tmp_path}"
    failed = subprocess.run(program, input=source, text=True, capture_output=True)
    assert failed.returncode != 0
    assert "DecodeParams" in failed.stderr


# ---- the example ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_the_host(folder, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("example")
    library = build(FAKE, place / "libcuda.so.1", folder, "-shared", "-fPIC")
    return build(folder / "decode.c", place / "decode", folder, str(library), "-fsanitize=undefined")


SHAPES = ((4, 16, 1000), (2, 24, 300), (3, 128, 200), (2, 64, 4500), (1, 130, 70), (5, 1, 3))


@pytest.mark.parametrize("shape", SHAPES)
def test_example_launches_what_python_launches(on_the_host, folder, shape, tmp_path):
    batch, heads, tokens = shape
    log = tmp_path / "log"
    done = subprocess.run(
        [on_the_host, folder, *map(str, shape)], env={"FAKE_CUDA_LOG": str(log)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("passed\n")
    (_, tensor_map), (planner, plan_launch), (_, plan_record), (kernel, launch), (_, record) = (
        (what, bytes.fromhex(values)) for what, values in map(str.split, log.read_text().splitlines())
    )
    shape_of = dispatch.choose(heads, batch, tokens)
    workers = max(1, 132 // shape_of.row_blocks)
    assert planner == "mla_plan"
    assert np.frombuffer(plan_launch, np.uint32).tolist() == [1, 1, 1, params.PLAN_THREADS, 0]
    assert kernel == jit.VARIANTS[shape_of.variant("bfloat16")].kernel
    assert np.frombuffer(launch, np.uint32).tolist() == [
        *(shape_of.row_blocks, 1, workers),
        *(params.DECODE_THREADS, params.DECODE_SHARED_BYTES),
    ]

    lengths = [tokens * (b + 1) // batch for b in range(batch)]
    pages, max_pages = sum(math.ceil(length / 64) for length in lengths), math.ceil(tokens / 64)
    (planned,), (decoded,) = (
        np.frombuffer(r, f) for r, f in ((plan_record, params.PLAN_PARAMS), (record, params.DECODE_PARAMS))
    )
    assert (planned["batch"], planned["num_workers"], planned["max_splits"]) == (batch, workers, 0)
    for name in ("cache_seqlens", "work", "splits"):
        assert planned[name] == decoded[name]
    is_resident = workers * shape_of.row_blocks <= 132 // shape_of.cluster_ctas * shape_of.cluster_ctas
    expected = {
        "q_stride_batch": heads * 576,
        "q_stride_seq": heads * 576,
        "q_stride_head": 576,
        "block_table_stride": max_pages,
        "kv_stride_page": 64 * 576,
        "num_pages": pages,
        "max_pages": max_pages,
        "batch": batch,
        "seq_len_q": 1,
        "num_heads": heads,
        "num_kv_heads": 1,
        "heads_per_kv": heads,
        "row_blocks": shape_of.row_blocks,
        "blocks_per_worker": shape_of.row_blocks,
        "page_size_log2": 6,
        "causal": 0,
        "prefetches_next": int(shape_of.cluster_ctas > 1 and shape_of.tile_rows == 64),
        "prefetches_first": int(shape_of.cluster_ctas == 1 or shape_of.tile_rows == 64),
        "merge_patience_cycles": params.MERGE_PATIENCE_CYCLES if is_resident else 0,
        "softmax_scale_log2": np.float32(576**-0.5 * math.log2(math.e)),
    }
    addresses = {name for name in params.DECODE_PARAMS.names if params.DECODE_PARAMS[name].str[1:] == "u8"}
    assert expected.keys() | addresses == set(params.DECODE_PARAMS.names)
    assert {name: decoded[name] for name in expected} == expected
    assert all(decoded[name] % 256 == 0 and decoded[name] for name in addresses)
    assert np.frombuffer(tensor_map, np.int32).tolist() == [
        *(9, 5, 64, 64, 9, 1, pages, 1152, 128, 64 * 1152),  # bfloat16; rank, dims, strides of rows, chunks, pages
        *params.pool_box(64, shape_of.cluster_ctas),
        *(1, 0, 3, 3, 0),  # steps; 128-byte swizzle, 256-byte promotion
    ]


def test_example_notices_a_wrong_result(on_the_host, folder, tmp_path):
    source = (folder / "decode.c").read_text()
    (tmp_path / "wrong.c").write_text(source.replace(".page_size_log2 = 6", ".page_size_log2 = 5"))
    wrong = build(tmp_path / "wrong.c", tmp_path / "wrong", folder, str(on_the_host.with_name("libcuda.so.1")))
    done = subprocess.run(
        [wrong, folder, "1", "16", "40"], env={"FAKE_CUDA_LOG": os.devnull}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "FAILED" in done.stdout


def test_example_names_what_is_wrong(on_the_host, folder, tmp_path):
    environment = {"FAKE_CUDA_LOG": os.devnull}
    nowhere = subprocess.run([on_the_host, tmp_path], env=environment, capture_output=True, text=True)
    assert nowhere.returncode == 1
    assert "CUDA_ERROR_FILE_NOT_FOUND" in nowhere.stderr
    for arguments in (["4", "16"], ["4", "16", "0"]):
        done = subprocess.run([on_the_host, folder, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        assert "usage" in done.stderr


def libcuda_path() -> str:
    """The driver library of this machine, as the loader finds it."""
    ctypes.CDLL("libcuda.so.1")
    (path, *_) = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcuda.so" in line]
    return path


def saved(path: Path, batch: int, heads: int, tokens: int) -> tuple[np.ndarray, ...]:
    """What the example wrote: q, pool, block table, lengths, out, lse."""
    lengths = [tokens * (b + 1) // batch for b in range(batch)]
    pages, max_pages = sum(math.ceil(length / 64) for length in lengths), math.ceil(tokens / 64)
    parts: tuple[tuple[Any, tuple[int, ...]], ...] = (
        (bfloat16, (batch, 1, heads, 576)),
        (bfloat16, (pages, 64, 1, 576)),
        (np.int32, (batch, max_pages)),
        (np.int32, (batch,)),
        (bfloat16, (batch, 1, heads, 512)),
        (np.float32, (batch, heads, 1)),
    )
    data, offset, arrays = path.read_bytes(), 0, []
    for dtype, shape in parts:
        count = math.prod(shape)
        arrays.append(np.frombuffer(data, dtype, count, offset).reshape(shape))
        offset += arrays[-1].nbytes
    assert offset == len(data)
    return tuple(arrays)


def test_example_saves_what_it_worked_on(on_the_host, folder, tmp_path):
    import mlacore

    shape = 2, 3, 100
    command = [on_the_host, folder, *map(str, shape), tmp_path / "saved"]
    assert subprocess.run(command, env={"FAKE_CUDA_LOG": os.devnull}).returncode == 0
    q, pool, table, lengths, out, lse = saved(tmp_path / "saved", *shape)
    expected, expected_lse = mlacore.mla_decode(q, pool, table, lengths)
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), atol=2e-2)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)
    assert np.abs(pool.astype(np.float32)).mean() > 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_example_on_the_gpu_gives_the_bits_that_python_gives(folder, shape, tmp_path):
    import cupy

    import mlacore

    program = build(folder / "decode.c", tmp_path / "decode", folder, libcuda_path())
    done = subprocess.run(
        [program, folder, *map(str, shape), tmp_path / "saved"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    q, pool, table, lengths, out, lse = saved(tmp_path / "saved", *shape)
    device = [cupy.asarray(array.view(np.uint16)).view(bfloat16) for array in (q, pool)]
    device += [cupy.asarray(array) for array in (table, lengths)]
    schedule = mlacore.plan_decode(device[3], num_heads=shape[1], max_seq_len=shape[2])
    ours, our_lse = mlacore.mla_decode(*device, plan=schedule)
    assert (ours.view(np.uint16).get() == out.view(np.uint16)).all()
    assert (our_lse.get().view(np.uint32) == lse.view(np.uint32)).all()
