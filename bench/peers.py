"""The peers, for measuring only: FlashMLA and FlashAttention-3's MLA mode, from op libraries that the user supplies.

The two ship in the `vllm` wheel as stable-ABI libraries, `_flashmla_C.abi3.so` and `_vllm_fa3_C.abi3.so` (plain or as
`.xz`), which load under torch >= 2.11 without vllm. Put them into `.peers/`, or name their folder in `MLACORE_PEERS`.
This is the one module of the repository that imports torch; its tensors are views of the bench's own CuPy arrays.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import lzma
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from bench.inputs import Inputs

Call = Callable[[], Any]


class Peer(Protocol):
    """One implementation of paged MLA decode."""

    name: str

    def variants(self, inputs: Inputs) -> Iterator[list[Call]]:
        """For each configuration worth trying, one call an input set; a call returns a tuple, its output first."""
        ...


class FlashMla:
    """DeepSeek's dense SM90 kernel: split kernel and combine; the schedule is made once, outside the timed calls."""

    name = "FlashMLA"
    library = "_flashmla_C.abi3.so"

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._op = torch.ops._flashmla_C.dense_decode_fwd

    def variants(self, inputs: Inputs) -> Iterator[list[Call]]:
        """The one configuration there is."""
        view = self._torch.from_dlpack
        kv, lengths = view(inputs.pool), view(inputs.cache_seqlens)
        sets = [(view(q), view(table)) for q, table in zip(inputs.q, inputs.block_table, strict=True)]

        def attend(q: Any, table: Any, meta: Any, num_splits: Any, out: Any) -> Any:
            scale, causal = inputs.softmax_scale, inputs.case.causal
            return self._op(q, kv, 512, lengths, table, scale, causal, meta, num_splits, out)

        out, _, meta, num_splits = attend(*sets[0], None, None, None)
        out = out.reshape(out.shape[0], 1, -1, out.shape[-1])  # as the op wants it: [b, KV heads, rows, 512]
        yield [functools.partial(attend, q, table, meta, num_splits, out) for q, table in sets]


class FlashAttention3:
    """FA3 with `qv`: the rotary part as q and k, the latent as qv and v. Both split heuristics that callers use."""

    name = "FA3"
    library = "_vllm_fa3_C.abi3.so"

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._ops = torch.ops._vllm_fa3_C

    def variants(self, inputs: Inputs) -> Iterator[list[Call]]:
        """`num_splits` 0 (its own choice) and 32."""
        torch, case = self._torch, inputs.case
        view = torch.from_dlpack
        kv, lengths = view(inputs.pool), view(inputs.cache_seqlens)
        rows = (case.batch * case.seq_len_q, case.num_heads)
        cu_q = torch.arange(case.batch + 1, dtype=torch.int32, device=kv.device) * case.seq_len_q
        max_k, page_size = int(inputs.lengths.max()), inputs.pool.shape[1]
        causal = case.causal or case.seq_len_q == 1  # the same for one query, and what its callers always pass
        sets = []
        for q, table in zip(map(view, inputs.q), map(view, inputs.block_table), strict=True):
            q_rope, q_latent = q[..., 512:].reshape(*rows, 64), q[..., :512].reshape(*rows, 512)
            sets.append((q_rope.contiguous(), q_latent.contiguous(), table))

        def attend(q_rope: Any, q_latent: Any, table: Any, meta: Any, num_splits: int) -> Any:
            return self._ops.fwd(
                *(q_rope, kv[..., 512:], kv[..., :512], None, None, q_latent, None, cu_q, None, None, None),
                *(lengths, case.seq_len_q, max_k, table, None, None, None, None, None, None, None, None),
                *(inputs.softmax_scale, causal, -1, -1, 0.0, True, meta, num_splits, None, 0, None, 1, 0, None),
            )

        for num_splits in (0, 32):
            meta = self._ops.get_scheduler_metadata(
                *(case.batch, case.seq_len_q, max_k, case.num_heads, 1, 64, 512, kv.dtype, lengths, cu_q),
                *(None, None, None, None, page_size, 0, causal, -1, -1, False, num_splits, None, 0),
            )
            yield [functools.partial(attend, *one, meta, num_splits) for one in sets]


class Peers:
    """The peers found, and torch's side of running them.

    Attributes
    ----------
    found : list of Peer
        In the order of the table's columns.
    missing : dict
        Name of each peer left out, and why.
    torch : module or None
        torch, where it is installed and sees the GPU.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.found: list[Peer] = []
        self.missing: dict[str, str] = {}
        folder = folder or Path(os.environ.get("MLACORE_PEERS", ".peers"))
        with ThreadPoolExecutor() as threads:  # unpacking takes as long as importing torch: both at once
            paths = {kind: threads.submit(_find, folder, kind.library) for kind in (FlashMla, FlashAttention3)}
            self.torch, why = import_torch()
        for kind, found in paths.items():
            if self.torch is None:
                self.missing[kind.name] = why
            elif (path := found.result()) is None:
                self.missing[kind.name] = f"no {kind.library} in {folder}"
            else:
                try:
                    self.torch.ops.load_library(str(path))
                    self.found.append(kind(self.torch))
                except (OSError, RuntimeError, AttributeError) as error:
                    self.missing[kind.name] = f"{path.name} does not load: {str(error).splitlines()[0]}"

    @classmethod
    def none(cls) -> Peers:
        """No peers, and torch not imported."""
        peers = cls.__new__(cls)
        peers.found, peers.missing, peers.torch = [], {}, None
        return peers

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """A context in which torch launches on CuPy `stream`."""
        return self.torch.cuda.stream(self.torch.cuda.ExternalStream(stream.ptr))

    def capture(self, calls: Sequence[Call], stream: Any) -> Callable[[], None]:
        """`bench.timing.capture` for torch calls, whose temporaries live in the graph's own memory pool."""
        graph = self.torch.cuda.CUDAGraph()
        external = self.torch.cuda.ExternalStream(stream.ptr)
        with self.torch.cuda.graph(graph, stream=external, capture_error_mode="relaxed"):
            for call in calls:
                call()

        def replay(_keep: Sequence[Call] = tuple(calls)) -> None:  # the calls' tensors must outlive the graph
            with self.on(stream):
                graph.replay()

        return replay

    def free_memory(self) -> None:
        """Hand back what torch holds for graphs that are gone: CuPy allocates beside it and cannot ask for it."""
        if self.torch is not None:
            self.torch.cuda.empty_cache()

    def to_cupy(self, result: Any) -> Any:
        """The output of a peer's call as a CuPy array."""
        import cupy

        return cupy.from_dlpack(result[0])


def import_torch() -> tuple[Any, str]:
    """torch, where it is installed and sees the GPU, else None and why not."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None, "torch is not installed"
    if not torch.cuda.is_available():
        return None, "torch sees no GPU"
    return torch, ""


def _find(folder: Path, library: str) -> Path | None:
    if (folder / library).is_file():
        return (folder / library).resolve()
    packed = folder / f"{library}.xz"
    if not packed.is_file():
        return None
    unpacked = Path(tempfile.mkdtemp(prefix="mlacore-peers-")) / library
    atexit.register(shutil.rmtree, unpacked.parent, ignore_errors=True)
    with lzma.open(packed) as source, unpacked.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    return unpacked
