// Structs that cross from Python; mlacore/params.py mirrors them field by field (a test compares sizes and offsets).
#pragma once
#include "types.cuh"

struct DecodeParams {
  const u16* q;               // [batch, seq_len_q, num_heads, head_dim_qk], strides in elements below
  const i32* block_table;     // [batch, max_pages]
  const i32* cache_seqlens;   // [batch]
  const i32* work;            // [num_workers + 1, 2]: sequence and tile at which each worker begins
  const i32* splits;          // [batch, 2]: first worker and number of splits
  u16* out;                   // [batch, seq_len_q, num_heads, head_dim_v]
  float* lse;                 // [batch, num_heads, seq_len_q], natural logarithm
  float* partial_out;         // [2 * num_workers, num_kv_heads, row_blocks, 64, head_dim_v]
  float* partial_lse;         // [2 * num_workers, num_kv_heads, row_blocks, 64], base 2
  i64 q_stride_batch;
  i64 q_stride_seq;
  i64 q_stride_head;
  i64 block_table_stride;
  i32 batch;
  i32 max_pages;
  i32 seq_len_q;
  i32 num_heads;
  i32 num_kv_heads;
  i32 heads_per_kv;
  i32 row_blocks;             // ceil(seq_len_q * heads_per_kv / 64)
  i32 num_workers;
  i32 causal;
  float softmax_scale_log2;   // softmax_scale * log2(e)
};

struct PlanParams {
  const i32* cache_seqlens;   // [batch]
  i32* work;                  // [num_workers + 1, 2]
  i32* splits;                // [batch, 2]
  i32 batch;
  i32 num_workers;
};

struct AppendParams {
  u16* pool;                  // [num_pages, page_size, 1, latent + rope], strides in elements below
  const u16* ckv;             // [num_tokens, kv_lora_rank]
  const u16* kpe;             // [num_tokens, qk_rope_head_dim]
  const i64* slots;           // [num_tokens]: page * page_size + offset; negative or past the pool: skipped
  i64 pool_stride_page;
  i64 pool_stride_row;
  i64 ckv_stride;
  i64 kpe_stride;
  i64 num_slots;              // num_pages * page_size
  i32 page_size;
  i32 num_tokens;
};
