// Structs that cross from Python; mlacore/params.py mirrors them field by field (a test compares sizes and offsets).
#pragma once
#include "types.cuh"

struct DecodeParams {
  const u16* q;               // [batch, seq_len_q, num_heads, head_dim_qk], strides in elements below
  const u16* kv;              // [num_pages, page_size, num_kv_heads, head_dim_qk]; read through the tensor map
  const i32* block_table;     // [batch, max_pages]
  const i32* cache_seqlens;   // [batch]
  const i32* work;            // [num_workers + 1, 2]: sequence and tile at which each worker begins
  const i32* splits;          // [batch, 2]: first worker and number of splits
  u16* out;                   // [batch, seq_len_q, num_heads, head_dim_v]
  float* lse;                 // [batch, num_heads, seq_len_q], natural logarithm
  u32* partial_out;           // [2 * num_workers, num_kv_heads, row_blocks, words]: cells (cells.cuh), of which
                              // words = tile_rows * head_dim_v, or half of that with 64 rows
  u32* partial_lse;           // [2 * num_workers, num_kv_heads, row_blocks, row pairs, 4], likewise
  u32* merge_counters;        // [num_workers, num_kv_heads, row_blocks], by the first worker of a sequence (merge.cuh)
  u32* merge_abandoned;       // [2 * num_workers, num_kv_heads, row_blocks]
  u32* launches;              // [2]: LaunchCounters
  i64 q_stride_batch;
  i64 q_stride_seq;
  i64 q_stride_head;
  i64 block_table_stride;
  i64 kv_stride_page;
  i32 num_pages;
  i32 prefetches_next;        // whether clusters prefetch the next tile to L2 while one is on its way
  i32 prefetches_first;       // whether a worker's first tile is prefetched while the previous kernel ends
  i32 batch;
  i32 max_pages;
  i32 seq_len_q;
  i32 num_heads;
  i32 num_kv_heads;
  i32 heads_per_kv;
  i32 row_blocks;             // of tile_rows query rows; the last may be partly, or in clusters wholly, empty
  i32 blocks_per_worker;      // num_kv_heads * row_blocks: CTAs that walk the same items
  i32 page_size_log2;
  i32 causal;
  i32 merge_patience_cycles;  // how long a worker waits for other splits to start; 0: not all CTAs fit the GPU
  float softmax_scale_log2;   // softmax_scale * log2(e)
};

struct PlanParams {
  const i32* cache_seqlens;   // [batch]
  i32* work;                  // [num_workers + 1, 2]
  i32* splits;                // [batch, 2]
  i32 batch;
  i32 num_workers;
  i32 max_splits;             // of a sequence in a batch-invariant schedule; 0: in any other
};

struct WriteParams {
  u16* pool;                  // one layer: [num_pages, page_size, 1, latent + rope], strides in elements below
  const u16* ckv;             // [num_tokens, kv_lora_rank]
  const u16* kpe;             // [num_tokens, qk_rope_head_dim]
  const i64* where;           // [2, num_tokens]: slot page * page_size + offset (outside the pool: skipped), position
  const u16* norm_weight;     // [kv_lora_rank], null for no RMSNorm
  const float* rope_cos;      // [rope_positions, qk_rope_head_dim / 2], null for no RoPE
  const float* rope_sin;
  i64 pool_stride_page;
  i64 pool_stride_row;
  i64 ckv_stride;
  i64 kpe_stride;
  i64 num_slots;              // num_pages * page_size
  i32 page_size_log2;
  i32 num_tokens;
  i32 rope_positions;
  i32 rope_interleaved;       // pairs (2i, 2i + 1), else (i, i + qk_rope_head_dim / 2)
  float norm_eps;
};

struct UpdateParams {
  i32* block_table;           // [max_seqs, max_pages]
  i32* cache_seqlens;         // [max_seqs]
  i32* limits;                // [max_seqs]: how far the device may advance each row by itself
  i64* where;                 // [2, num_tokens], as in WriteParams
  i64 block_table_stride;
  i32 num_changes;
  i32 num_tokens;
  i32 page_size_log2;
};

struct CopyParams {
  u16* pool;                  // [num_layers, num_pages, page_elems] by the strides below, in elements
  const i32* pages;           // [num_copies, 2]: from, to
  i64 pool_stride_layer;
  i64 pool_stride_page;
  i64 page_elems;
  i32 num_layers;
  i32 num_pages;
};

struct GatherParams {
  const u16* pool;            // one layer, as in WriteParams
  u16* rows;                  // [total tokens, latent + rope]
  const i32* block_table;     // [max_seqs, max_pages]
  const i64* spans;           // [num_seqs, 3]: row of the table, tokens, first of `rows`
  i64 pool_stride_page;
  i64 pool_stride_row;
  i64 block_table_stride;
  i32 max_pages;
  i32 num_pages;
  i32 page_size_log2;
};
