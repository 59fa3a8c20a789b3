// How the accumulators of O lie in a partial state: cell by cell, a cell being a float4 of one thread, x and y of one
// query row, z and w of another, its row pair. Logical cells count 256 to a row pair; in memory the cells that a warp
// writes with one instruction are neighbours.
#pragma once
#include "layout.cuh"

constexpr u32 kHeadDimV = MLA_HEAD_DIM_V;

// Query rows on the M side (mla_decode_sm90): a thread's four neighbouring accumulators are columns 8 g + 2 q, + 1 of
// rows r and r + 8, for column group g and lane q of each four.
struct HeadsOnM {
  static constexpr u32 kRows = 64;
  static constexpr u32 kRowPairs = kRows / 2;
  static constexpr u32 kCellsPerPair = kHeadDimV / 2;
  static constexpr u32 kCells = kRowPairs * kCellsPerPair;

  // Row pairs that hold one of the first `rows` rows.
  __device__ __forceinline__ static i32 row_pairs(i32 rows) { return rows / 16 * 8 + min(rows % 16, 8); }
  __device__ __forceinline__ static u32 first_row(i32 pair) { return u32(pair / 8 * 16 + pair % 8); }
  __device__ __forceinline__ static u32 second_row(i32 pair) { return first_row(pair) + 8; }

  // Of the warpgroup's thread `thread`: [column group][thread].
  __device__ __forceinline__ static u32 memory_index(u32 column_group, u32 thread) {
    return column_group * kWarpgroupThreads + thread;
  }
  __device__ __forceinline__ static u32 pair_of(u32 thread) { return thread / 4; }
  __device__ __forceinline__ static u32 memory_index(i32 cell) {
    const u32 pair = u32(cell) / kCellsPerPair, within = u32(cell) % kCellsPerPair;
    return memory_index(within / 4, pair * 4 + within % 4);
  }
  // `packed` holds both columns of one row.
  __device__ __forceinline__ static void store(u16* row, i32 cell, u32 packed) {
    *reinterpret_cast<u32*>(row + u32(cell) % kCellsPerPair * 2) = packed;
  }
};

// Tokens, then latent columns on the M side (mla_decode_swapped_sm90): a thread's four neighbouring accumulators are
// columns r and r + 8 of rows 8 j + 2 q and + 1, for chunk c of 64 columns, row group j, warp w, lane 4 i + q, r = 64 c
// + 16 w + i.
template <u32 kTileRows>
struct HeadsOnN {
  static constexpr u32 kRows = kTileRows;
  static constexpr u32 kRowPairs = kRows / 2;
  static constexpr u32 kCellsPerPair = kHeadDimV / 2;
  static constexpr u32 kCells = kRowPairs * kCellsPerPair;
  static constexpr u32 kRowGroups = kRows / 8;

  __device__ __forceinline__ static i32 row_pairs(i32 rows) { return (rows + 1) / 2; }
  __device__ __forceinline__ static u32 first_row(i32 pair) { return 2 * u32(pair); }
  __device__ __forceinline__ static u32 second_row(i32 pair) { return first_row(pair) + 1; }

  // [chunk][row group][warp][q][i]: the cells of a row pair that one warp holds are 128 bytes.
  __device__ __forceinline__ static u32 memory_index(u32 chunk, u32 row_group, u32 thread) {
    const u32 lane = thread % kWarpThreads;
    return (chunk * kRowGroups + row_group) * kWarpgroupThreads + thread - lane + lane % 4 * 8 + lane / 4;
  }
  __device__ __forceinline__ static u32 memory_index(i32 cell) {
    const u32 pair = u32(cell) / kCellsPerPair, within = u32(cell) % kCellsPerPair;
    return (within / 32 * kRowGroups + pair / 4) * kWarpgroupThreads + within / 8 % 4 * kWarpThreads + pair % 4 * 8 +
           within % 8;
  }
  // `packed` holds both columns of one row.
  __device__ __forceinline__ static void store(u16* row, i32 cell, u32 packed) {
    const u32 within = u32(cell) % kCellsPerPair, column = within / 8 * 16 + within % 8;
    row[column] = u16(packed);
    row[column + 8] = u16(packed >> 16);
  }
};
