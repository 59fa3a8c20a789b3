"""The paged MLA cache: a pool of pages, a block table that maps sequences onto it, and the rows written into it.

The host's books (`mlacore.host_tables.HostTables`) are the authority. The arrays that attention reads,
`PagedKVCache.block_table` and `PagedKVCache.cache_seqlens`, mirror them and are updated once a step, by one launch; or,
between `reserve` and `advanced`, by the device itself, and the books follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlacore import cache_checks, shapes
from mlacore.cache_layout import Created, NewTokens, StepTokens
from mlacore.cache_state import CacheState, Integers
from mlacore.page_pool import prefix_keys
from mlacore.ranges import marked

__all__ = ["PagedKVCache"]


class PagedKVCache(CacheState):
    """Latent and RoPE rows of many sequences in one pool of fixed-size pages, for one layer or several.

    A sequence is a row of the block table. Tokens are appended to it, pages are claimed from the pool as it grows and
    return when its last holder is freed. A call that raises an error has changed nothing.

    Everywhere below, `seqs` are ``[n]`` sequences, on the host: a ValueError names one that is not alive or comes
    twice. `stream` is the stream to work on; CuPy's current one if None. Calls on one cache belong on one stream, or on
    streams that the caller orders, and in one thread at a time.

    Parameters
    ----------
    num_pages : int
        Pages of the pool.
    page_size : int
        Tokens of a page: 16, 32, 64, 128 or 256. The GPU kernels and `mla_decode` serve these, with rows of 512 + 64
        values, and no others: a cache of other sizes, which NumPy alone takes, is for storing.
    kv_lora_rank : int
        Values of a token's latent, the first part of its row.
    qk_rope_head_dim : int
        Values of a token's shared RoPE key, the rest of its row.
    dtype : str or dtype
        ``bfloat16``, ``float16`` or, in NumPy, ``float32``.
    num_layers : int, optional
        Layers that share the block table; None is one layer without an axis for it.
    interleaved : bool
        Whether the layers of a page lie next to each other, so that a page of all layers is one piece of memory.
    max_seqs : int
        Rows of the block table: the most sequences alive at once.
    max_seq_len : int
        Longest sequence in tokens; the block table has ``ceil(max_seq_len / page_size)`` columns, `num_pages` at most.
    device : int or str, optional
        ``"cpu"`` for NumPy; ``"cuda"`` for CuPy's current device; ``"cuda:1"`` or ``1`` for that one. None takes a
        Hopper GPU if there is one, else NumPy.

    Attributes
    ----------
    pool : array
        dtype ``[num_pages, page_size, 1, kv_lora_rank + qk_rope_head_dim]``; with `num_layers`
        ``[num_layers, num_pages, ...]`` or, interleaved, ``[num_pages, num_layers, ...]``. Slots without a token hold
        anything.
    layers : tuple of arrays
        Views of the pool, ``[num_pages, page_size, 1, kv_lora_rank + qk_rope_head_dim]`` each: `mla_decode`'s kv_cache.
    block_table : array
        int32 ``[max_seqs, max_pages]``; entries past a sequence's pages hold anything.
    cache_seqlens : array
        int32 ``[max_seqs]`` in tokens; 0 for rows without a sequence.
    device : int or None
        CUDA ordinal; None for NumPy.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of its range.
    RuntimeError
        If the device asked for is not a Hopper GPU.

    Examples
    --------
    >>> import numpy as np
    >>> from mlacore.cache import PagedKVCache
    >>> cache = PagedKVCache(num_pages=8, max_seqs=4, dtype="float16", device="cpu")
    >>> seqs = cache.create(2).seqs
    >>> ckv, kpe = np.zeros((100, 512), np.float16), np.zeros((100, 64), np.float16)
    >>> tokens = cache.append(seqs, ckv, kpe, num_tokens=[70, 30])  # two prompts
    >>> tokens = cache.append(seqs, ckv[:2, None], kpe[:2, None])  # then a token each
    >>> cache.seq_lens[seqs].tolist(), cache.num_free_pages
    ([71, 31], 5)
    >>> block_table, cache_seqlens = cache.batch(seqs)  # for mla_decode
    >>> cache.free(seqs)
    """

    # ---- sequences -------------------------------------------------------------------------------------------------

    def create(
        self,
        num_seqs: int = 1,
        *,
        num_tokens: int | Integers | None = None,
        prefix: Sequence[Integers] | None = None,
        stream: Any = None,
    ) -> Created:
        """Start sequences: empty ones, or with what the cache holds of their prompts and room for the rest.

        Parameters
        ----------
        num_seqs : int
            How many, at least 0.
        num_tokens : int or sequence of int, optional
            ``[num_seqs]`` tokens of each prompt; one number stands for all. Pages are claimed for those not found. By
            default for none: sequences then begin with the tokens found, and `append` adds the rest.
        prefix : sequence of int sequences, optional
            Token ids that each prompt begins with. Full pages that `publish` made findable by the same ids, from the
            first one on, are shared and not written again. An engine that needs the last token's output leaves it out.
        stream
            See `PagedKVCache`.

        Returns
        -------
        Created
            Sequences, the number of tokens that each found in the cache, and where its other tokens go.

        Raises
        ------
        TypeError, ValueError
            If a prompt is longer than `max_seq_len`, or `num_tokens` less than the ids in `prefix`.
        OutOfSequencesError
            If fewer rows are free.
        OutOfPagesError
            If fewer pages are free than needed.
        """
        stream = self._stream(stream)
        num_seqs = shapes.check_count("num_seqs", num_seqs, minimum=0)
        ids = [] if prefix is None else cache_checks.check_prefix(prefix, num_seqs)
        page_size, pool = self.layout.page_size, self._host.pool
        hits = [pool.find(prefix_keys(i, page_size)) for i in ids]
        cached = np.zeros(num_seqs, np.int64)
        if hits:
            cached[:] = [len(pages) * page_size for pages in hits]
        lengths = cached
        if num_tokens is not None:
            lengths = np.zeros(num_seqs, np.int64) + cache_checks.check_counts(np.arange(num_seqs), num_tokens)
            cache_checks.check_prompts(lengths, [len(i) for i in ids], self.max_seq_len)
        else:
            cache_checks.check_prompts(lengths, [], self.max_seq_len)
        rows, change = self._host.changes_to_create(hits, lengths)
        tokens = self._update(change, stream)
        self._lookups += sum(map(len, ids))
        self._lookup_hits += int(cached.sum())
        return Created(rows, cached, tokens)

    def publish(self, seq: int, token_ids: Integers) -> None:
        """Make the full pages of a sequence findable by the ids of its tokens, for the prefix of later ones.

        To be called once the rows of these tokens are written, in every layer, on the stream that the sequences to come
        will be read on. It may be called again as the sequence grows. Pages stay findable after their sequences are
        freed, until they are claimed for something else, least recently used first.

        Parameters
        ----------
        seq : int
            A live sequence.
        token_ids : sequence of int
            Its first tokens, at most as many as it holds. Those past the last full page are of no use yet.

        Raises
        ------
        TypeError, ValueError
            If there are more ids than tokens, or ids other than those that a page was published with.
        """
        rows = cache_checks.check_seqs([seq], self._host.alive)
        ids = cache_checks.check_token_ids("token_ids", token_ids)
        length = int(self._host.seq_lens[rows[0]])
        if len(ids) > length:
            raise ValueError(f"token_ids: got {len(ids)}, expected at most {length} (tokens of sequence {rows[0]})")
        keys = list(prefix_keys(ids, self.layout.page_size))
        pages = self._host.table[rows[0], : len(keys)]
        pool = self._host.pool
        for i, (page, key) in enumerate(zip(pages.tolist(), keys, strict=True)):
            if pool.key_of(page) not in (None, key):
                end = (i + 1) * self.layout.page_size
                raise ValueError(f"token_ids: got other ids in [0, {end}) than those that sequence {seq} has published")
        pool.publish(pages, keys)

    def fork(self, seqs: Integers, *, stream: Any = None) -> np.ndarray:
        """Start a sequence beside each of `seqs`, which may repeat, with the same tokens in the same pages.

        A last page that is not full is copied when one of its holders writes into it, and only then. A reservation of a
        forked sequence ends.

        Returns
        -------
        numpy.ndarray
            int32 ``[n]``: the new sequences.

        Raises
        ------
        OutOfSequencesError
            If fewer rows are free.
        """
        stream = self._stream(stream)
        rows = cache_checks.check_seqs(seqs, self._host.alive, distinct=False)
        new_rows, change = self._host.changes_to_fork(rows)
        self._update(change, stream)
        return new_rows

    def truncate(self, seqs: Integers, lengths: int | Integers, *, stream: Any = None) -> None:
        """Keep the first tokens of sequences, as when speculated ones are rejected. A reservation ends.

        Parameters
        ----------
        seqs, stream
            See `PagedKVCache`.
        lengths : int or sequence of int
            ``[n]`` tokens that remain, at most as many as each holds; one number stands for all.

        Raises
        ------
        TypeError, ValueError
            If a length is negative or larger than the sequence's.
        """
        stream = self._stream(stream)
        rows = self._live(seqs)
        kept = cache_checks.check_lengths(rows, lengths, self._host.seq_lens)
        self._update(self._host.changes_to_truncate(rows, kept), stream)

    def free(self, seqs: Integers, *, stream: Any = None) -> None:
        """End sequences. Their rows, and the pages that no other sequence holds, are free for the next call."""
        stream = self._stream(stream)
        rows = self._live(seqs)
        self._update(self._host.changes_to_clear(rows), stream)

    # ---- new tokens ------------------------------------------------------------------------------------------------

    @marked("PagedKVCache.append")
    def append(
        self,
        seqs: Integers,
        ckv: Any,
        kpe: Any,
        *,
        num_tokens: int | Integers | None = None,
        stream: Any = None,
        **transform: Any,
    ) -> NewTokens:
        """Append tokens to sequences of a cache of one layer: `extend` and `write` in one call, with their errors.

        Parameters
        ----------
        seqs, stream
            See `PagedKVCache`.
        ckv : array
            Latents in the cache's dtype, on its device: ``[n, t, kv_lora_rank]``, t tokens each. With `num_tokens`:
            ``[sum(num_tokens), kv_lora_rank]``, the tokens of the first sequence, then those of the second, and so on.
        kpe : array
            RoPE keys: as `ckv`, with ``qk_rope_head_dim`` values.
        num_tokens : int or sequence of int, optional
            ``[n]`` tokens of each sequence, at least 0; one number stands for all.
        **transform
            Options of `write`: ``norm_weight``, ``norm_eps``, ``rope_cos``, ``rope_sin``, ``rope_interleaved``.

        Returns
        -------
        NewTokens
            As from `extend`.
        """
        stream = self._stream(stream)
        if self.layout.num_layers not in (None, 1):
            raise ValueError(
                f"append: got a cache of {self.layout.num_layers} layers, expected one layer (extend, then write each)"
            )
        rows = self._live(seqs)
        dims = self.layout.dims()
        counts, total, leading = cache_checks.bind_tokens(dims, rows, ckv, num_tokens)
        ckv, kpe = cache_checks.check_values(ckv, kpe, self.layout, dims, leading, stream, empty=total == 0)
        change = self._host.changes_to_grow(rows, counts)
        options = cache_checks.check_transform(self.layout, change.tables.end if transform else 0, stream, **transform)
        with self._store.at(stream):
            ckv, kpe = self._store.as_rows(ckv, kpe)  # now, since it may need memory: later the books have changed
            tokens = self._update_here(change, stream)
            if total:
                self._store.write(0, tokens.where, ckv, kpe, options, stream)
        return tokens

    @marked("PagedKVCache.extend")
    def extend(self, seqs: Integers, num_tokens: int | Integers, *, stream: Any = None) -> NewTokens:
        """Make room for new tokens: claim pages, bring block table and lengths up to date.

        The new slots hold anything until `write` fills them, layer by layer. A reservation ends.

        Parameters
        ----------
        seqs, stream
            See `PagedKVCache`.
        num_tokens : int or sequence of int
            ``[n]`` tokens of each sequence, at least 0; one number stands for all.

        Returns
        -------
        NewTokens
            Where each token goes, the tokens of the first sequence, then those of the second, and so on.

        Raises
        ------
        TypeError, ValueError
            If a sequence would grow past `max_seq_len`, or a number is negative.
        OutOfPagesError
            If fewer pages are free than needed.
        """
        stream = self._stream(stream)
        rows = self._live(seqs)
        change = self._host.changes_to_grow(rows, cache_checks.check_counts(rows, num_tokens))
        return self._update(change, stream)

    @marked("PagedKVCache.write")
    def write(
        self,
        tokens: NewTokens,
        ckv: Any,
        kpe: Any,
        *,
        layer: int = 0,
        norm_weight: Any = None,
        norm_eps: float = 1e-6,
        rope_cos: Any = None,
        rope_sin: Any = None,
        rope_interleaved: bool = True,
        stream: Any = None,
    ) -> None:
        """Write the rows of new tokens of one layer, in one kernel launch; normalised and rotated on the way if asked.

        Parameters
        ----------
        tokens : NewTokens
            From `extend`, `create` or `step_tokens`. A token whose slot lies outside the pool is skipped.
        ckv : array
            Latents ``[num_tokens, kv_lora_rank]`` in the cache's dtype, on its device; rows at multiples of 16 bytes,
            such as a slice of a projection's output.
        kpe : array
            RoPE keys ``[num_tokens, qk_rope_head_dim]``, likewise.
        layer : int
            Which layer's.
        norm_weight : array, optional
            dtype of the cache ``[kv_lora_rank]``: RMSNorm of the latents, ``ckv / sqrt(mean(ckv^2) + eps) * weight`` in
            float32, rounded once.
        norm_eps : float
            At least 0.
        rope_cos, rope_sin : array, optional
            float32 ``[positions, qk_rope_head_dim / 2]``: RoPE of the keys by the rows of their positions, scaled
            frequencies (YaRN) and magnitudes included. In float32, rounded once. Where only the device knows a
            position, one past the tables makes the key NaN.
        rope_interleaved : bool
            Pairs of values ``(2i, 2i + 1)``, as DeepSeek has them, else ``(i, i + qk_rope_head_dim / 2)``.
        stream
            See `PagedKVCache`.

        Raises
        ------
        TypeError, ValueError
            If an array has another shape, dtype or device, rows that are not contiguous or not at multiples of 16
            bytes, or a table fewer positions than needed.
        """
        stream = self._stream(stream)
        dims = self.layout.dims()
        tokens = cache_checks.check_tokens(tokens, self.layout, dims)
        index = cache_checks.check_layer(layer, self.layout)
        empty = len(tokens) == 0
        ckv, kpe = cache_checks.check_values(ckv, kpe, self.layout, dims, ("num_tokens",), stream, empty=empty)
        transform = cache_checks.check_transform(
            self.layout,
            tokens.end if rope_cos is not None else 0,
            stream,
            norm_weight=norm_weight,
            norm_eps=norm_eps,
            rope_cos=rope_cos,
            rope_sin=rope_sin,
            rope_interleaved=rope_interleaved,
        )
        if not empty:
            with self._store.at(stream):
                self._store.write(index, tokens.where, ckv, kpe, transform, stream)

    # ---- steps that the device makes by itself ---------------------------------------------------------------------

    def reserve(self, seqs: Integers, num_tokens: int | Integers, *, stream: Any = None) -> None:
        """Claim pages for the next tokens of sequences, so that steps can run with no work on the host.

        Until `num_tokens` are used up, `advance` appends to these sequences. Any other call that changes one of them
        ends its reservation and gives back what is left of it; `reserve` again replaces it.

        Parameters
        ----------
        seqs, stream
            See `PagedKVCache`.
        num_tokens : int or sequence of int
            ``[n]`` tokens of each sequence, at least 0; one number stands for all.

        Raises
        ------
        TypeError, ValueError, OutOfPagesError
            As `extend`.
        """
        stream = self._stream(stream)
        rows = self._live(seqs)
        change = self._host.changes_to_reserve(rows, cache_checks.check_counts(rows, num_tokens))
        self._update(change, stream)

    def step_tokens(self, num_seqs: int | None = None, num_tokens: int = 1, *, stream: Any = None) -> StepTokens:
        """Memory for a step that the device makes by itself; one serves any number of steps and captured graphs.

        Parameters
        ----------
        num_seqs : int, optional
            Rows of the block table that take part, from the first one on: the padded batch. Default `max_seqs`.
        num_tokens : int
            Tokens that a step appends to each reserved sequence.
        """
        stream = self._stream(stream)
        num_seqs = self.max_seqs if num_seqs is None else shapes.check_count("num_seqs", num_seqs)
        if num_seqs > self.max_seqs:
            raise ValueError(f"num_seqs: got {num_seqs}, expected at most {self.max_seqs} (max_seqs of the cache)")
        num_tokens = shapes.check_count("num_tokens", num_tokens)
        with self._store.at(stream):
            return StepTokens(self._store.empty_tokens(num_seqs * num_tokens), None, num_seqs, num_tokens)

    @marked("PagedKVCache.advance")
    def advance(self, tokens: StepTokens, *, stream: Any = None) -> None:
        """Append a step's tokens to the reserved sequences, on the device: lengths grow, `tokens` says where they go.

        It reads and writes arrays of the device alone, so that a CUDA graph that holds it, `DecodePlan.update`, and
        `write` and `mla_decode` of every layer makes a whole step, and can be replayed for as many as are reserved. A
        row without a sequence, one that is not reserved, and one whose reservation is used up keep their length, and
        their tokens go nowhere. After the replays, `advanced` tells the books.

        Parameters
        ----------
        tokens : StepTokens
            From `step_tokens`; written.
        stream
            See `PagedKVCache`.
        """
        stream = self._stream(stream)
        tokens = cache_checks.check_step(tokens, self.layout)
        with self._store.at(stream):
            self._store.advance(tokens.where, tokens.num_tokens, stream)

    def advanced(self, tokens: StepTokens, num_steps: int = 1) -> None:
        """Tell the books that `advance` ran, before any other call that concerns these sequences. Host only.

        Parameters
        ----------
        tokens : StepTokens
            The ones it ran with.
        num_steps : int
            How often.

        Raises
        ------
        ValueError
            If that is more than was reserved for one of the sequences that took part: the device stopped it there.
        """
        tokens = cache_checks.check_step(tokens, self.layout)
        num_steps = shapes.check_count("num_steps", num_steps, minimum=0)
        self._host.advance(tokens.num_seqs, tokens.num_tokens, num_steps)

    def compact(self, *, stream: Any = None) -> int:
        """Move pages so that those with content, held or findable, are the first of the pool. Sequences keep theirs
        in order, and their reservations.

        Returns
        -------
        int
            How many pages were moved.
        """
        stream = self._stream(stream)
        change = self._host.changes_to_compact()
        if change is None:
            return 0
        self._update(change, stream)
        return len(change.copies)

    @classmethod
    def load(cls, source: Any, **options: Any) -> PagedKVCache:
        """The cache that `save` wrote or `to_numpy` gave, on any device; `mlacore.cache_files.load` has the options."""
        from mlacore import cache_files

        return cache_files.load(cls, source, **options)
