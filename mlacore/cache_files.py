"""A cache in host memory or in a file: parked here, resumed on another machine, another GPU or the CPU backend.

It is a set of NumPy arrays; the file is NumPy's ``.npz``, read without pickle:

    config                     JSON: the constructor's options
    seqs, seq_lens             int32 [n]: sequences, and their tokens
    num_pages                  int32 [n]: pages of each
    block_table                int32 [sum(num_pages)]: their pages, sequence by sequence, as indices into `pages`
    pages                      [num_layers, k, page_size, row]: pages with content; 16-bit values as uint16
    found_pages, found_keys    int32 [m], uint8 [m, 16]: pages that a prefix finds, first to be reused first; their keys

Reservations are not kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mlacore import arrays, cache_checks
from mlacore.block_tables import spread

if TYPE_CHECKING:
    from mlacore.cache_state import CacheState

    Cache = TypeVar("Cache", bound=CacheState)

FORMAT = 1


def to_numpy(cache: CacheState) -> dict[str, np.ndarray]:
    """All that `load` needs, as host arrays. On a GPU this waits for the device."""
    layout, books = cache.layout, cache._host
    seqs = np.flatnonzero(books.alive)
    num_pages = -(-books.seq_lens[seqs] // layout.page_size)
    owner, nth = spread(num_pages)
    listed = books.table[seqs[owner], nth]
    found_pages, found_keys = books.pool.findable_pages()
    kept = np.union1d(listed, found_pages).astype(np.int32)
    with cache._store.at(cache._stream(None)):
        pages = cache._store.read_pages(kept)
    config = {
        "format": FORMAT,
        "num_pages": layout.num_pages,
        "page_size": layout.page_size,
        "kv_lora_rank": layout.kv_lora_rank,
        "qk_rope_head_dim": layout.qk_rope_head_dim,
        "dtype": layout.dtype.name,
        "num_layers": layout.num_layers,
        "interleaved": layout.interleaved,
        "max_seqs": cache.max_seqs,
        "max_seq_len": cache.max_seq_len,
    }
    return {
        "config": np.array(json.dumps(config)),
        "seqs": seqs.astype(np.int32),
        "seq_lens": books.seq_lens[seqs],
        "num_pages": num_pages.astype(np.int32),
        "block_table": np.searchsorted(kept, listed).astype(np.int32),
        "pages": pages.view(np.uint16) if layout.dtype.itemsize == 2 else pages,
        "found_pages": np.searchsorted(kept, found_pages).astype(np.int32),
        "found_keys": found_keys,
    }


def load(
    kind: type[Cache],
    source: Any,
    *,
    device: int | str | None = None,
    num_pages: int | None = None,
    interleaved: bool | None = None,
) -> Cache:
    """The cache that `save` wrote: the same sequences under the same numbers, the same findable pages.

    Parameters
    ----------
    kind : type
        `PagedKVCache`.
    source : str, path, binary file or dict of arrays
        From `save`, or from `to_numpy`.
    device : int or str, optional
        As for `PagedKVCache`.
    num_pages : int, optional
        Pages of the pool, at least as many as have content; default as many as there were.
    interleaved : bool, optional
        Order of layers and pages; default as it was.

    Raises
    ------
    ValueError
        If the file is not of this format, or its pages do not fit.
    """
    if isinstance(source, Mapping):
        data = dict(source)
    else:
        with np.load(source, allow_pickle=False) as file:
            data = dict(file)
    if "config" not in data:
        raise ValueError(f"source: got {', '.join(data)} without a config, expected what PagedKVCache.save wrote")
    config = json.loads(str(data["config"]))
    if config.pop("format", None) != FORMAT:
        raise ValueError(f"source: got another format, expected format {FORMAT}")
    pages = data["pages"].view(arrays.as_dtype(config["dtype"]))
    options = {"num_pages": num_pages, "interleaved": interleaved, "device": device}
    config |= {name: value for name, value in options.items() if value is not None}
    config["num_pages"] = cache_checks.check_int32_count("num_pages", config["num_pages"])
    if config["num_pages"] < pages.shape[1]:
        raise ValueError(f"num_pages: got {config['num_pages']}, expected at least {pages.shape[1]} (with content)")

    cache = kind(**config)
    books = cache._host
    try:
        books.restore(data["seqs"], data["seq_lens"], data["num_pages"], data["block_table"])
        books.pool.restore(data["block_table"], data["found_pages"], [key.tobytes() for key in data["found_keys"]])
        books.check_integrity(books.table, books.seq_lens, books.limits)
    except (IndexError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"source: got tables that contradict themselves ({error}), expected what save wrote"
        ) from error
    stream = cache._stream(None)
    with cache._store.at(stream):
        cache._store.write_pages(pages)
        cache._store.set_tables(books.table, books.seq_lens)
    if stream is not None:
        stream.synchronize()
    return cache
