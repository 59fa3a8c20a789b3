// Rows of the cache into L2, ahead of the loads that bring them to shared memory.
#pragma once
#include "params.cuh"
#include "ptx.cuh"
#include "work.cuh"

// kRows of a page that exists, from `row` on. For one KV head and rows without gaps.
template <u32 kRows>
__device__ __forceinline__ void prefetch_rows(const DecodeParams& params, i32 page, i32 row) {
  constexpr i32 kRowElems = MLA_HEAD_DIM_QK;
  cp_async_bulk_prefetch(params.kv + page * params.kv_stride_page + row * kRowElems, kRows * kRowElems * sizeof(u16));
}

// A worker's first tile, while the previous kernel of the stream ends: a CTA starts as soon as one of that kernel's has
// left its SM, and then has to wait for the last of them. Memory would idle meanwhile.
//
// All that is read here is a hint. The previous kernel may be about to change it, so that it will be read again, and
// wherever it leads to lies inside the arrays. Once that kernel has ended (mbarrier `begun`) it is too late: the worker
// asks for the same by itself.
//
// By one warp. CTAs that walk the same items share the tile. One tile: with more, workers that end early take memory
// from those that still merge (b=8 of mixed lengths, h_q=128: 10 % slower with four).
__device__ __forceinline__ void prefetch_first_tile(const DecodeParams& params, const Block& block, const Stretch& hint,
                                                    u64& begun) {
  constexpr i32 kPieceTokens = 16, kPieces = i32(kTileTokens) / kPieceTokens;  // no page is smaller
  const i32 lane = i32(threadIdx.x % kWarpThreads), sequence = hint.first_sequence;
  if (params.prefetches_first == 0 || lane >= kPieces || lane % params.row_blocks != block.row_block) return;
  if (!hint.leads_to_items(params)) return;
  const i32 token = i32(u32(hint.first_tile) * kTileTokens) + lane * kPieceTokens;  // a hint may overflow
  const i32 entry = token >> params.page_size_log2, row = token & ((1 << params.page_size_log2) - 1);
  if (u32(entry) >= u32(params.max_pages)) return;
  const i32 length = ld_relaxed_gpu(params.cache_seqlens + sequence);
  const i32 page = ld_relaxed_gpu(params.block_table + sequence * params.block_table_stride + entry);
  if (token >= length || (sequence == hint.last_sequence && hint.first_tile >= hint.last_end_tile)) return;
  if (u32(page) >= u32(params.num_pages) || mbarrier_test_parity(shared_address(&begun), 0)) return;
  prefetch_rows<kPieceTokens>(params, page, row);
}
