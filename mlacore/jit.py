"""CUDA sources to cubins: NVRTC, a cache on disk, and the list of kernel variants.

What decides a cubin (all sources, constants, flags, NVRTC version) goes into one digest, which names its file in the
cache. Compiling needs no GPU; loading is `mlacore.driver`'s part.

Environment: ``MLACORE_CACHE_DIR`` (default ``$XDG_CACHE_HOME/mlacore``), ``MLACORE_COMPILE=eager|lazy``.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlacore import params

log = logging.getLogger("mlacore.jit")

ARCH = "sm_90a"  # the "a" unlocks WGMMA and setmaxnreg; cubins only, so that the driver never compiles PTX
FLAGS = (f"-arch={ARCH}", "-std=c++17", "-lineinfo", "--ptxas-options=-v")
_CHECKSUM_BYTES = hashlib.sha256().digest_size


class CompileError(RuntimeError):
    """A CUDA source did not compile; the message holds kernel, definitions and the compiler's log."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled form of a kernel: the file ``cuda/<kernel>.cu`` under a set of definitions."""

    name: str
    kernel: str
    defines: tuple[tuple[str, str | int], ...]
    is_default: bool = True  # loaded at import; the others at their first use


@dataclass(frozen=True, slots=True)
class Compiled:
    """A cubin and what the compiler said about it."""

    cubin: bytes
    log: str


_DIMS = (("MLA_HEAD_DIM_QK", params.HEAD_DIM_QK), ("MLA_HEAD_DIM_V", params.HEAD_DIM_V))
_TILE = (("MLA_TILE_ROWS", params.TILE_ROWS), ("MLA_TILE_TOKENS", params.TILE_TOKENS))
ELEMENTS = {"bfloat16": "Bf16", "float16": "Fp16"}


def _variants() -> Iterator[Variant]:
    for dtype, element in ELEMENTS.items():
        is_default = dtype == "bfloat16"
        of_dtype = (*_DIMS, *_TILE, ("MLA_ELEMENT", element))
        launch = (
            ("MLA_THREADS", params.DECODE_THREADS),
            ("MLA_SHARED_BYTES", params.DECODE_SHARED_BYTES),
            ("MLA_CHUNK_COLUMNS", params.CHUNK_COLUMNS),
            ("MLA_PART_CHUNKS", params.PART_CHUNKS),
            ("MLA_STATE_MARKS", params.STATE_MARKS),
            ("MLA_CLEAR_TURNS", params.CLEAR_TURNS),
        )
        for ctas in params.CLUSTER_CTAS:
            name = f"mla_decode_sm90.{dtype}.rows{params.TILE_ROWS}.cluster{ctas}"
            defines = (*of_dtype, *launch, ("MLA_CLUSTER_CTAS", ctas))
            yield Variant(name, "mla_decode_sm90", defines, is_default)
        for rows, ctas in params.SWAPPED_VARIANTS:
            name = f"mla_decode_swapped_sm90.{dtype}.rows{rows}.cluster{ctas}"
            swapped = (
                *_DIMS,
                ("MLA_TILE_ROWS", rows),
                ("MLA_TILE_TOKENS", params.TILE_TOKENS),
                ("MLA_ELEMENT", element),
            )
            yield Variant(
                name,
                "mla_decode_swapped_sm90",
                (*swapped, *launch, ("MLA_CLUSTER_CTAS", ctas)),
                is_default and ctas == 1,
            )
    plan = (
        ("MLA_ITEM_COST_TILES", params.ITEM_COST_TILES),
        ("MLA_MAX_PLANNED_TILES", params.MAX_PLANNED_TILES),
        ("MLA_INVARIANT_SPLIT_TILES", params.INVARIANT_SPLIT_TILES),
        ("MLA_PLAN_THREADS", params.PLAN_THREADS),
    )
    yield Variant("mla_plan", "mla_plan", (*_TILE, *plan))
    for dtype, element in ELEMENTS.items():
        write = (*_DIMS, ("MLA_ELEMENT", element), ("MLA_WRITE_ROWS", params.WRITE_ROWS))
        yield Variant(f"cache_write.{dtype}", "cache_write", write, dtype == "bfloat16")
    for words in params.UPDATE_WORDS:
        update = (("MLA_UPDATE_ROWS", params.UPDATE_ROWS), ("MLA_CHANGE_WORDS", words))
        yield Variant(f"cache_update.{words}", "cache_update", update)
    yield Variant("cache_copy", "cache_copy", (("MLA_COPY_THREADS", params.COPY_THREADS),))
    yield Variant("cache_gather", "cache_gather", (*_DIMS, ("MLA_GATHER_ROWS", params.GATHER_ROWS)))


VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _variants()}


def source_dir() -> Path:
    """Folder of the CUDA sources: ``mlacore/cuda`` in an installed wheel, ``cuda`` beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "cuda"
    return installed if installed.is_dir() else package.parent / "cuda"


@functools.cache
def _sources() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(source_dir().glob("*.cu*"))}


@functools.cache
def _nvrtc() -> Any:
    """The NVRTC binding.

    Raises
    ------
    ImportError
        When the binding or the library is missing; says what to install.
    """
    hint = (
        "compiling kernels needs NVRTC: pip install 'cuda-bindings==13.*' 'nvidia-cuda-nvrtc==13.*' (with a driver of "
        "CUDA 12.8 or 12.9 mlacore[cu12])"
    )
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # the library itself is loaded at the first call
    except Exception as error:  # the binding raises its own classes for a missing library
        raise ImportError(f"{hint}; {type(error).__name__}: {error}") from error
    return nvrtc


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC in use."""
    _, major, minor = _nvrtc().nvrtcVersion()
    return major, minor


def compile(variant: Variant) -> Compiled:
    """Compile one variant with NVRTC, without looking at the cache. Needs no GPU.

    Raises
    ------
    CompileError
        With kernel, definitions and the compiler's log.
    """
    nvrtc = _nvrtc()
    started = time.perf_counter()
    headers = {name: text for name, text in _sources().items() if name.endswith(".cuh")}
    source = _sources()[f"{variant.kernel}.cu"]
    options = [*FLAGS, *(f"-D{name}={value}" for name, value in variant.defines)]
    encoded = [option.encode() for option in options]
    _, program = nvrtc.nvrtcCreateProgram(
        source, f"{variant.kernel}.cu".encode(), len(headers), list(headers.values()), [h.encode() for h in headers]
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        text = _read(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
        if int(status) != 0:
            raise CompileError(f"{variant.name} did not compile ({status.name}) with {' '.join(options)}\n{text}")
        cubin = _read(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    log.debug("compiled %s in %.2f s", variant.name, time.perf_counter() - started)
    return Compiled(cubin, text)


def _read(nvrtc: Any, program: Any, what: str) -> bytes:
    _, size = getattr(nvrtc, f"nvrtcGet{what}Size")(program)
    buffer = bytes(size)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer


def cache_dir() -> Path:
    """Folder of the cubin cache."""
    if override := os.environ.get("MLACORE_CACHE_DIR"):
        return Path(override)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "mlacore"
    home = os.path.expanduser("~")
    if home == "~":  # no HOME and no passwd entry, as in containers that run under an arbitrary user id
        return Path(tempfile.gettempdir()) / f"mlacore-{os.getuid()}"
    return Path(home) / ".cache" / "mlacore"


def digest(variant: Variant) -> str:
    """Name of the variant's cache entry: sources, definitions, flags and compiler version in one hash."""
    state = hashlib.sha256()
    for name, text in _sources().items():
        if name.endswith(".cuh") or name == f"{variant.kernel}.cu":
            state.update(f"{name} {len(text)}\n".encode() + text)
    state.update(repr((variant.defines, FLAGS, nvrtc_version())).encode())
    return state.hexdigest()[:40]


def _entry(variant: Variant) -> Path:
    return cache_dir() / f"{variant.name}-{digest(variant)}.cubin"


def _read_entry(path: Path) -> bytes | None:
    """The cubin, or None when the entry is absent or damaged (then it is rebuilt)."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    cubin = data[_CHECKSUM_BYTES:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == data[:_CHECKSUM_BYTES] else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def cubin(variant: Variant) -> bytes:
    """The variant's cubin, from the cache or compiled into it. Safe across processes; a folder that cannot be
    written only costs the compilation."""
    entry = _entry(variant)
    if (found := _read_entry(entry)) is not None:
        return found
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry.with_suffix(".lock")):
            if (found := _read_entry(entry)) is not None:  # another process was faster
                return found
            built = compile(variant).cubin
            with contextlib.suppress(OSError):  # a full disk
                _publish(entry, built)
            return built
    except OSError as error:
        log.debug("no cubin cache in %s: %s", entry.parent, error)
        return compile(variant).cubin


def _publish(entry: Path, built: bytes) -> None:
    """Write aside and rename, so that a reader sees a whole entry or none."""
    handle, temporary = tempfile.mkstemp(dir=entry.parent, prefix=entry.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(built).digest() + built)
        os.replace(temporary, entry)
    except BaseException:
        os.unlink(temporary)
        raise


def status() -> list[tuple[str, bool]]:
    """(variant, is it in the cache) for all variants."""
    return [(name, _read_entry(_entry(variant)) is not None) for name, variant in VARIANTS.items()]


def build_all(report: Callable[[str], object]) -> None:
    """Build what the cache lacks, ahead of use; report a line a variant.

    Raises
    ------
    OSError
        If the folder cannot keep it.
    """
    for name, variant in VARIANTS.items():
        entry = _entry(variant)
        was_there = _read_entry(entry) is not None
        size = len(cubin(variant))
        if _read_entry(entry) is None:
            raise OSError(f"{entry.parent}: {name} cannot be kept there (MLACORE_CACHE_DIR names another folder)")
        report(f"{name:48} {size:7d} bytes  {'already there' if was_there else 'built'}")
    report(f"{len(VARIANTS)} kernels in {cache_dir()}")


def compile_all(report: Callable[[str], object]) -> None:
    """Compile every variant afresh into the cache; report registers, shared memory and spills, a line each."""
    for name, variant in VARIANTS.items():
        started = time.perf_counter()
        built = compile(variant)
        seconds = time.perf_counter() - started
        entry = _entry(variant)
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            _publish(entry, built.cubin)
        except OSError as error:
            report(f"{name}: not kept, {entry.parent} cannot be written ({error})")
        usage = "; ".join(
            line.split("ptxas info    :")[-1].strip().removeprefix("ptxas         .").strip()
            for line in built.log.splitlines()
            if "Used" in line or "spill" in line
        )
        dynamic = (
            f"; {params.DECODE_SHARED_BYTES} bytes dynamic shared" if variant.kernel.startswith("mla_decode") else ""
        )
        report(f"{name:48} {len(built.cubin):7d} bytes  {seconds:5.2f} s  {usage}{dynamic}")
