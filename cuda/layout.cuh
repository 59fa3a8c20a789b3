// Where an element of a tile lies in shared memory, and the WGMMA descriptors that say so to the tensor core.
//
// Every operand is cut into chunks of 64 rows x 64 columns of 16-bit elements: 128 bytes a row, 8 KB a chunk, aligned
// to 1024 bytes, in the 128-byte swizzle that TMA writes and WGMMA reads. Within each group of 8 rows the 16-byte cell
// of row r, column cell c sits at cell c ^ (r % 8) of that row:
//
//   row 0:  0 1 2 3 4 5 6 7        row 2:  2 3 0 1 6 7 4 5
//   row 1:  1 0 3 2 5 4 7 6        row 7:  7 6 5 4 3 2 1 0
//
// so that the eight cells of one column, and the eight of one row, each cover all 32 banks once.
#pragma once
#include "types.cuh"

constexpr u32 kChunkRows = 64;
constexpr u32 kChunkColumns = 64;
constexpr u32 kChunkRowBytes = kChunkColumns * 2;
constexpr u32 kChunkBytes = kChunkRows * kChunkRowBytes;
constexpr u32 kSwizzleRows = 8;
constexpr u32 kSwizzleBytes = kSwizzleRows * kChunkRowBytes;
constexpr u32 kCellBytes = 16;
constexpr u32 kCellsPerRow = kChunkRowBytes / kCellBytes;

// Bytes from the start of a chunk to 16-byte cell `cell` of row `row`.
__device__ __forceinline__ u32 swizzled_offset(u32 row, u32 cell) {
  return row * kChunkRowBytes + ((cell ^ (row % kSwizzleRows)) * kCellBytes);
}

// Matrix descriptor fields ("Asynchronous Warpgroup Level Matrix Shared Memory Layout"), all in units of 16 bytes:
// start address in bits 0-13, leading-dimension offset 16-29, stride-dimension offset 32-45, swizzle mode 62-63.
__device__ __forceinline__ u64 make_descriptor(u32 address, u32 leading_bytes, u32 stride_bytes) {
  constexpr u64 kSwizzle128 = 1;
  return (kSwizzle128 << 62) | (u64(stride_bytes / 16) << 32) | (u64(leading_bytes / 16) << 16) |
         u64((address & 0x3ffff) / 16);
}

// A chunk as an operand whose reduction runs along its columns (Q and K in QK^T, P in PV): one descriptor covers 16 of
// the 64 columns; the groups of 8 rows are kSwizzleBytes apart. The leading offset is unused at this width.
__device__ __forceinline__ u64 k_major_descriptor(u32 chunk) { return make_descriptor(chunk, 16, kSwizzleBytes); }

// Consecutive chunks as an operand whose reduction runs along its rows (V in PV): one descriptor covers 16 rows; the
// next 64 columns lie kChunkBytes further, the next 8 rows kSwizzleBytes further.
__device__ __forceinline__ u64 n_major_descriptor(u32 chunks) {
  return make_descriptor(chunks, kChunkBytes, kSwizzleBytes);
}

// Descriptor steps to the next 16 elements of the reduction, in the descriptor's 16-byte units.
constexpr u32 kReductionStep = 16;
constexpr u64 kKMajorStep = kReductionStep * 2 / 16;
constexpr u64 kNMajorStep = kReductionStep * kChunkRowBytes / 16;

// Accumulator fragment of a warpgroup, M = 64 ("Register Fragments for wgmma.mma_async.m64nNk16", matrix D): thread t
// holds, for each 8 columns j, elements d[4j..4j+3] = (row, column), (row, column + 1), (row + 8, column), (row + 8,
// column + 1) with the row and first column below.
__device__ __forceinline__ u32 fragment_row(u32 thread) { return (thread / 32) * 16 + (thread % 32) / 4; }
__device__ __forceinline__ u32 fragment_column(u32 thread) { return (thread % 4) * 2; }
