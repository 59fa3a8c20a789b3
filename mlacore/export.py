"""The kernels for hosts without Python: cubins, a C header, a manifest in JSON and an example in C (``mlacore/c``).

Header and manifest say what `mlacore.driver` and `mlacore.cache_kernels` do: which kernel serves a shape, what it is
launched with, what memory it needs. Structs come from `mlacore.params`, their comments from ``cuda/params.cuh``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlacore
from mlacore import dispatch, jit, params

SCHEMA = 1  # of the manifest
TENSOR_MAP_BYTES = 128

_SCALARS = {"i8": "int64_t", "i4": "int32_t", "f4": "float", "u8": "uint64_t"}
_CONSTANTS = (
    "TILE_TOKENS",
    "TILE_ROWS",
    "HEAD_DIM_QK",
    "HEAD_DIM_V",
    "INVARIANT_SPLIT_TILES",
    "CHUNK_COLUMNS",
    "PART_CHUNKS",
    "MAX_INVARIANT_SPLITS",
    "MERGE_PATIENCE_CYCLES",
    "WRITE_ROWS",
    "UPDATE_ROWS",
    "GATHER_ROWS",
    "COPY_THREADS",
)
_DISPATCH_CONSTANTS = ("FEW_CLUSTER_TOKENS", "MANY_SEQUENCES", "MAX_CLUSTER_ROWS")


@dataclass(frozen=True, slots=True)
class Interface:
    """How a kernel (``cuda/<kernel>.cu``) is launched."""

    struct: str
    threads: int
    grid: tuple[str, str, str]
    shared_bytes: int = 0
    leading: str = ""  # what comes before the struct


_DECODE_GRID = ("row_blocks", "num_kv_heads", "num_workers")
_DECODE = Interface(
    "DecodeParams", params.DECODE_THREADS, _DECODE_GRID, params.DECODE_SHARED_BYTES, "tensor map of the pool"
)
INTERFACES = {
    "mla_decode_sm90": _DECODE,
    "mla_decode_swapped_sm90": _DECODE,
    "mla_plan": Interface("PlanParams", params.PLAN_THREADS, ("1", "1", "1")),
    "cache_write": Interface(
        "WriteParams", params.WRITE_ROWS * params.WARP_THREADS, (f"ceil(num_tokens / {params.WRITE_ROWS})", "1", "1")
    ),
    "cache_update": Interface(
        "UpdateParams",
        params.UPDATE_ROWS * params.WARP_THREADS,
        (f"ceil(num_changes / {params.UPDATE_ROWS})", "1", "1"),
        leading="changes by value, int32",
    ),
    "cache_copy": Interface(
        "CopyParams",
        params.COPY_THREADS,
        ("copies * num_layers", f"ceil(page_elems / {8 * params.COPY_THREADS})", "1"),
    ),
    "cache_gather": Interface(
        "GatherParams",
        params.GATHER_ROWS * params.WARP_THREADS,
        ("sequences", f"min(ceil(longest / {params.GATHER_ROWS}), 65535)", "1"),
    ),
}


def export(folder: Path, report: Callable[[str], object]) -> None:
    """Write cubins, ``mlacore.h``, ``manifest.json`` and ``decode.c`` into `folder`. Needs NVRTC, no GPU.

    Parameters
    ----------
    folder : Path
        Made if it is not there; files of these names are replaced.
    report : callable
        Gets a line for each file.

    Raises
    ------
    ImportError, mlacore.jit.CompileError
        If NVRTC is missing, or refuses a kernel.
    OSError
        If the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cubins = {name: jit.cubin(variant) for name, variant in jit.VARIANTS.items()}
    files = {f"{name}.cubin": cubin for name, cubin in cubins.items()}
    files["mlacore.h"] = header().encode()
    files["manifest.json"] = (json.dumps(manifest(cubins), indent=1) + "\n").encode()
    files["decode.c"] = (_templates() / "decode.c").read_bytes()
    for name, content in files.items():
        (folder / name).write_bytes(content)
        report(f"{len(content):8,} bytes  {folder / name}")


def header() -> str:
    """``mlacore.h``: constants, parameter structs with their sizes and offsets asserted, kernels, launch rules."""
    parts = {
        "VERSION": mlacore.__version__,
        "ARCH": jit.ARCH,
        "CONSTANTS": "\n".join(f"#define MLACORE_{name} {value}" for name, value in constants().items()),
        "STRUCTS": "\n\n".join(_c_struct(name) for name in params.STRUCTS),
        "KERNELS": "\n".join(_c_kernel(entry) for entry in _kernels()),
    }
    text = (_templates() / "mlacore.h.in").read_text()
    return re.sub(r"@(\w+)@", lambda found: parts[found.group(1)], text)


def manifest(cubins: dict[str, bytes]) -> dict[str, Any]:
    """What the header says, for programs: JSON."""
    kernels, slots = list(_kernels()), "num_kv_heads, row_blocks"
    values_a_word = f"(2 if tile_rows is {params.TILE_ROWS} else 1)"
    for entry in kernels:
        entry["sha256"] = hashlib.sha256(cubins[entry["name"]]).hexdigest()
    return {
        "schema": SCHEMA,
        "mlacore": mlacore.__version__,
        "arch": jit.ARCH,
        "nvrtc": list(jit.nvrtc_version()),
        "constants": constants(),
        "structs": {name: _struct(name) for name in params.STRUCTS},
        "kernels": kernels,
        "parameters": "by cuLaunchKernelEx's array of pointers, in the order given; mla_decode_* may be launched with "
        "programmatic stream serialization, no other kernel",
        "tensor_map": {
            "of": "kv, one layer's pool; innermost dimension first",
            "rank": 5,
            "data_type": {"bfloat16": "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16", "float16": "CU_TENSOR_MAP_DATA_TYPE_FLOAT16"},
            "dims": [
                params.CHUNK_COLUMNS,
                "page_size",
                params.HEAD_DIM_QK // params.CHUNK_COLUMNS,
                "num_kv_heads",
                "num_pages",
            ],
            "strides_bytes": [
                "of a row",
                2 * params.CHUNK_COLUMNS,
                "of a KV head (any multiple of 16 if there is one)",
                "of a page (any multiple of 16 if there is one)",
            ],
            "box": [
                params.CHUNK_COLUMNS,
                f"min(page_size, {params.TILE_TOKENS} / cluster_ctas)",
                f"{params.PART_CHUNKS} if page_size >= {params.TILE_TOKENS} and cluster_ctas is 1 else 1",
                1,
                1,
            ],
            "element_strides": [1, 1, 1, 1, 1],
            "interleave": "CU_TENSOR_MAP_INTERLEAVE_NONE",
            "swizzle": "CU_TENSOR_MAP_SWIZZLE_128B",
            "l2_promotion": "CU_TENSOR_MAP_L2_PROMOTION_L2_256B",
            "out_of_bounds": "CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE",
        },
        "dispatch": {
            "rows": f"seq_len_q * num_heads / num_kv_heads; seq_len_q * num_heads is at most {params.MAX_QUERY_ROWS}",
            "cluster_tokens": "ceil(rows / 32) * batch * max_seq_len, or unknown",
            "order": "the first rule that holds decides",
            "rules": [
                {"rows_at_most": 16, "tile_rows": 16, "cluster_ctas": 1, "row_blocks": 1},
                {
                    "rows_at_most": 32,
                    "batch_below": dispatch.MANY_SEQUENCES,
                    "tile_rows": 32,
                    "cluster_ctas": 1,
                    "row_blocks": 1,
                },
                {
                    "rows_at_least": 33,
                    "rows_at_most": dispatch.MAX_CLUSTER_ROWS,
                    "cluster_tokens_at_most": dispatch.FEW_CLUSTER_TOKENS,
                    "tile_rows": 16,
                    "cluster_ctas": 2,
                    "row_blocks": "2 * ceil(rows / 32)",
                },
                {
                    "tile_rows": params.TILE_ROWS,
                    "cluster_ctas": "2 if row_blocks is even else 1",
                    "row_blocks": f"ceil(rows / {params.TILE_ROWS})",
                },
            ],
            "kernel": {
                "tile_rows 64": "mla_decode_sm90.{dtype}.rows64.cluster{cluster_ctas}",
                "fewer": "mla_decode_swapped_sm90.{dtype}.rows{tile_rows}.cluster{cluster_ctas}",
            },
        },
        "num_workers": "max(1, cuOccupancyMaxActiveClusters * cluster_ctas / (row_blocks * num_kv_heads))",
        "batch_invariant": {
            "max_splits": f"max(1, min({params.MAX_INVARIANT_SPLITS}, "
            f"ceil(max_seq_len / {params.TILE_TOKENS * params.INVARIANT_SPLIT_TILES}))); 0 in any other plan",
            "num_workers": "batch * max_splits",
            "dispatch": "as if the batch were 0 and tokens unknown",
        },
        "prefetches_next": f"0 if cluster_ctas is 1, tile_rows < {params.TILE_ROWS}, page_size < {params.TILE_TOKENS}, "
        "num_kv_heads > 1 or rows of a page have gaps; else 1",
        "prefetches_first": "0 if num_kv_heads > 1, rows of a page have gaps, or cluster_ctas is 2 and tile_rows < "
        f"{params.TILE_ROWS}; else 1",
        "merge_patience_cycles": f"{params.MERGE_PATIENCE_CYCLES} if cuOccupancyMaxActiveClusters * cluster_ctas CTAs "
        "hold the grid, else 0",
        "scratch": {
            "work": {"dtype": "int32", "shape": "num_workers + 1, 2"},
            "splits": {"dtype": "int32", "shape": "batch, 2"},
            **{
                name: {"dtype": "uint32", "shape": shape, "zero_before_first_call": True}
                for name, shape in (
                    ("partial_out", f"2 * num_workers, {slots}, tile_rows * {params.HEAD_DIM_V} / {values_a_word}"),
                    ("partial_lse", f"2 * num_workers, {slots}, tile_rows / 2, 4"),
                    ("merge_counters", f"num_workers, {slots}"),
                    ("merge_abandoned", f"2 * num_workers, {slots}"),
                    ("launches", "2"),
                )
            },
        },
    }


def constants() -> dict[str, int]:
    """Those of the parameters and of the dispatch that a host needs."""
    return {name: getattr(params, name) for name in _CONSTANTS} | {
        name: getattr(dispatch, name) for name in _DISPATCH_CONSTANTS
    }


def _kernels() -> Iterator[dict[str, Any]]:
    for name, variant in jit.VARIANTS.items():
        defines, interface = dict(variant.defines), INTERFACES[variant.kernel]
        leading_bytes = 4 * int(defines["MLA_CHANGE_WORDS"]) if "MLA_CHANGE_WORDS" in defines else TENSOR_MAP_BYTES
        leading = [{"what": interface.leading, "bytes": leading_bytes}] if interface.leading else []
        yield {
            "name": name,
            "file": f"{name}.cubin",
            "function": variant.kernel,
            "parameters": [
                *leading,
                {"what": interface.struct, "bytes": params.STRUCTS[interface.struct].itemsize},
            ],
            "grid": list(interface.grid),
            "threads": interface.threads,
            "dynamic_shared_bytes": interface.shared_bytes,
            "cluster": [int(defines.get("MLA_CLUSTER_CTAS", 1)), 1, 1],
        }


def _struct(name: str) -> dict[str, Any]:
    dtype, comments = params.STRUCTS[name], _comments(name)
    assert dtype.names is not None
    assert dtype.fields is not None
    return {
        "bytes": dtype.itemsize,
        "fields": [
            {
                "name": field,
                "type": _SCALARS[dtype.fields[field][0].str[1:]],
                "offset": dtype.fields[field][1],
                "comment": comments[field],
            }
            for field in dtype.names
        ],
    }


def _comments(struct: str) -> dict[str, str]:
    """What ``cuda/params.cuh`` says of each field: what an address points to, and the comment."""
    source = (jit.source_dir() / "params.cuh").read_text()
    body = re.search(rf"^struct {struct} \{{\n(.*?)^\}};", source, re.DOTALL | re.MULTILINE)
    assert body is not None
    comments = {}
    for kind, field, comment in re.findall(r"^  ([\w ]+?\*?) (\w+);(?: *// *(.*))?$", body.group(1), re.MULTILINE):
        comments[field] = ", ".join(filter(None, [kind if kind.endswith("*") else "", comment]))
    return comments


def _c_struct(name: str) -> str:
    struct, c_name = _struct(name), f"Mlacore{name}"
    fields = []
    for field in struct["fields"]:
        declaration = f"  {field['type']} {field['name']};"
        # A space keeps "*/" of a pointer's name from ending the comment.
        fields.append(f"{declaration:<34}/* {field['comment']} */" if field["comment"] else declaration)
    checks = [f'mlacore_assert(sizeof({c_name}) == {struct["bytes"]}, "{name}");']
    checks += [
        f'mlacore_assert(offsetof({c_name}, {field["name"]}) == {field["offset"]}, "{name}.{field["name"]}");'
        for field in struct["fields"]
    ]
    return "\n".join([f"typedef struct {c_name} {{", *fields, f"}} {c_name};", *checks])


def _c_kernel(entry: dict[str, Any]) -> str:
    leading = entry["parameters"][0]["bytes"] if len(entry["parameters"]) == 2 else 0
    numbers = f"{entry['threads']}, {entry['dynamic_shared_bytes']}, {entry['cluster'][0]}, {leading}"
    return f'    {{"{entry["name"]}", "{entry["function"]}", {numbers}}},'


def _templates() -> Path:
    return Path(__file__).resolve().parent / "c"
