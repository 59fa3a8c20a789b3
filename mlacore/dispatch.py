"""Which decode kernel serves a shape: query rows on the M side of the matrix units, or on N, and in what clusters.

`mla_decode_sm90` puts 64 query rows on M. `mla_decode_swapped_sm90` puts tokens, then latent columns there and 16 or 32
rows on N: few rows are not padded, code is short. Measured on an H100 (2026-11-23, graph replay, µs):

=====================  =======  =======  =======
heads, batch, tokens   16 rows  32 rows  64 rows
=====================  =======  =======  =======
16, b=1, 4K                7.6      8.2     10.1
16, b=1, 128K             56.7     57.7     60.4
16, b=128, 16K           780.4    782.8    784.0
32, b=8, 4K                        21.4     21.1
32, b=32, 4K                       61.6     59.0
32, b=128, 4K                     220.8    214.7
32, b=128, 16K                    803.7    797.9
32 (s_q=2), b=32, 8K     109.8    111.5    108.8
32 (s_q=2), b=128, 8K             405.0    408.4
64, b=1, 4K                9.4              11.0
64, b=1, 10K              12.9              15.0
64, b=16, 1K              17.6              16.7
128, b=1, 1K               7.5               9.7
128, b=1, 4K              11.1              12.1
128, b=1, 5K              12.3              12.9
128, b=1, 8K              15.6              14.1
128, b=4, 4K              26.1              18.7
128, b=1, 32K             44.7              28.1
=====================  =======  =======  =======

On an H200 64 rows take 18.0 instead of 17.3 µs at b=8 of the cases with 32 heads, else 1 to 6 % less than 32 rows.

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
