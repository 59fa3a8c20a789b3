"""Which decode kernel serves a shape: query rows on the M side of the matrix units, or on N, and in what clusters.

`mla_decode_sm90` puts 64 query rows on M. `mla_decode_swapped_sm90` puts tokens, then latent columns there and 16 or 32
rows on N: few rows are not padded, states are small, code is short. Measured on an H100 (2026-11-23, graph replay, µs):

=====================  =======  =======  =======
heads, batch, tokens   16 rows  32 rows  64 rows
=====================  =======  =======  =======
16, b=1, 4K                7.8      8.2     10.2
16, b=1, 128K             56.9     57.6     59.9
16, b=128, 16K           780.9    783.9    790.6
32 (s_q=2), b=32, 8K     110.4    111.8    111.8
128, b=1, 1K               7.9      8.6     11.0
128, b=1, 4K              11.4     12.0     15.1
128, b=1, 8K              15.9     15.8     18.1
128, b=4, 4K              26.3     22.3     23.4
128, b=16, 1K             23.4     23.1     24.4
128, b=1, 32K                      34.4     32.8
128, b=8, 4K                       36.3     32.7
128, b=1, 64K                      58.1     48.7
128, b=1, 128K                      104       76
=====================  =======  =======  =======

With more than 32 rows the swapped kernel works in clusters of two CTAs of 16, which multicast every tile to each other;
several clusters take the rows of a sequence. It starts and merges sooner, but needs more time a tile: it wins while
there are few tokens in all, which is known only if the caller says so (``max_seq_len`` of `mlacore.plan_decode`).
Clusters of four or eight leave SMs idle, 12 of an H100's 132, and lose 5 to 15 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlacore.params import HEAD_DIM_V, TILE_ROWS

# Up to how many tokens of a batch, times clusters of 32 rows, CTAs of 16 rows are fastest for more than 32 rows.
FEW_CLUSTER_TOKENS = 20480
MAX_CLUSTER_ROWS = 128  # of a KV head; more rows are for 64 rows a CTA
MANY_SEQUENCES = 16  # from which on 17 to 32 rows are for 64 rows a CTA, too


@dataclass(frozen=True, slots=True)
class KernelShape:
    """How a decode kernel divides the query rows of one KV head.

    Attributes
    ----------
    tile_rows : int
        Query rows of a CTA: 64, or 16 or 32 in the swapped kernel.
    cluster_ctas : int
        CTAs that load each tile together.
    row_blocks : int
        CTAs that a worker has for each KV head, a multiple of `cluster_ctas`.
    """

    tile_rows: int
    cluster_ctas: int
    row_blocks: int

    def variant(self, dtype: str) -> str:
        """Name of the kernel variant, a key of `mlacore.jit.VARIANTS`."""
        kernel = "mla_decode_sm90" if self.tile_rows == TILE_ROWS else "mla_decode_swapped_sm90"
        return f"{kernel}.{dtype}.rows{self.tile_rows}.cluster{self.cluster_ctas}"

    @property
    def state_words(self) -> int:
        """uint32 of a CTA's partial state (`cuda/cells.cuh`): 16 bits a value with 64 rows, else 32."""
        return self.tile_rows * HEAD_DIM_V // (2 if self.tile_rows == TILE_ROWS else 1)


def choose(rows: int, batch: int, max_seq_len: int | None) -> KernelShape:
    """The kernel for `rows` query rows of a KV head and `batch` sequences of at most so many tokens (None: unknown).

    What must not depend on the batch, as the bits of batch-invariant plans, gives 0 for it and None.
    """
    if rows <= 16:
        return KernelShape(16, 1, 1)
    if rows <= 32 and batch < MANY_SEQUENCES:
        return KernelShape(32, 1, 1)
    clusters = -(-rows // 32)
    is_small = max_seq_len is not None and clusters * batch * max_seq_len <= FEW_CLUSTER_TOKENS
    if 32 < rows <= MAX_CLUSTER_ROWS and is_small:
        return KernelShape(16, 2, 2 * clusters)
    blocks = -(-rows // TILE_ROWS)
    return KernelShape(
        TILE_ROWS, 2 if blocks % 2 == 0 else 1, blocks
    )  # an odd block would leave an SM of its pair idle
