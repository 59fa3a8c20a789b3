"""Paged MLA decode in plain float64: the executable definition that documentation, tests and benches cite."""

from __future__ import annotations

import sys
from typing import Any


def mla_decode_reference(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[Any, Any]:
    """Attend every query to its own sequence: ``softmax(scale * q @ K^T) @ V``, with ``V = K[:, :head_dim_v]``.

    Parameters
    ----------
    q : array ``[batch, seq_len_q, num_heads, head_dim]``
        Queries, any float type.
    kv_cache : array ``[num_pages, page_size, num_kv_heads, head_dim]``
        Pool of pages. Query head ``h`` reads KV head ``h // (num_heads / num_kv_heads)``.
    block_table : int array ``[batch, max_pages]``
        Token ``t`` of sequence ``b`` lies in page ``block_table[b, t // page_size]`` at offset ``t % page_size``.
    cache_seqlens : int array ``[batch]``
        Tokens of each sequence; negative counts as 0. Nothing past them is read, table entries included.
    head_dim_v : int
        Leading values of a cache row that are its V.
    softmax_scale : float, optional
        Default ``head_dim ** -0.5``.
    causal : bool
        Bottom-right aligned: query ``i`` sees the first ``length - (seq_len_q - 1 - i)`` tokens.

    Returns
    -------
    out : float64 array ``[batch, seq_len_q, num_heads, head_dim_v]``
        0 for a query that sees no token.
    lse : float64 array ``[batch, num_heads, seq_len_q]``
        Natural logarithm of the softmax denominator, ``-inf`` for a query that sees no token.

    Notes
    -----
    NumPy arrays are computed in NumPy. CuPy arrays are taken as well and stay on their device, so that large GPU tests
    need not wait for the host.
    """
    xp = sys.modules[type(q).__module__.partition(".")[0]]  # numpy or cupy
    batch, seq_len_q, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    out = xp.zeros((batch, seq_len_q, num_heads, head_dim_v), xp.float64)
    lse = xp.full((batch, num_heads, seq_len_q), -xp.inf, xp.float64)

    hidden = seq_len_q - 1 - xp.arange(seq_len_q) if causal else xp.zeros(seq_len_q, int)  # last tokens a query misses
    for b in range(batch):
        length = max(int(cache_seqlens[b]), 0)
        if length == 0:
            continue
        pages = block_table[b, : -(-length // page_size)]
        is_visible = xp.arange(length) < (length - hidden)[:, None, None]  # [seq_len_q, 1, length]
        for k in range(num_kv_heads):
            heads = slice(k * group, (k + 1) * group)
            keys = kv_cache[pages, :, k].reshape(-1, head_dim)[:length].astype(xp.float64)
            scores = scale * (q[b, :, heads].astype(xp.float64) @ keys.T)  # [seq_len_q, group, length]
            scores = xp.where(is_visible, scores, -xp.inf)
            largest = scores.max(axis=-1, keepdims=True)
            weights = xp.exp(scores - xp.where(largest == -xp.inf, 0, largest))
            total = weights.sum(axis=-1, keepdims=True)
            is_empty = total == 0
            out[b, :, heads] = (weights @ keys[:, :head_dim_v]) / xp.where(is_empty, 1, total)
            log_total = xp.where(is_empty, -xp.inf, largest + xp.log(xp.where(is_empty, 1, total)))
            lse[b, heads] = log_total[..., 0].T
    return out, lse
