// A partial state in memory: what a split leaves for whoever merges it (merge.cuh).
//
// A cell is 16 bytes: four accumulators of one thread, two columns of two query rows (a row pair), divided by the row
// sums, and the number of the launch. A row pair has another, with the base-2 logarithms of its softmax denominators.
// The number tells a reader that a cell is there: no flag, no fence and no second look. It costs each value the last 8
// bits of its mantissa, up to 2^-15 of the value where rounding the result takes up to 2^-9 (bfloat16) or 2^-12.
//
// A unit is what a warp merges at a time: kUnitCells cells a lane, neighbours in memory from lane to lane.
#pragma once
#include "epilogue.cuh"
#include "layout.cuh"
#include "ptx.cuh"

constexpr u32 kHeadDimV = MLA_HEAD_DIM_V;

__device__ __forceinline__ float without_last_bits(float x) { return __uint_as_float(__float_as_uint(x) & ~0xffu); }

// x, y, z lose their last byte to those of w.
__device__ __forceinline__ uint4 pack_cell(float x, float y, float z, float w, u32 launch) {
  const u32 last = __float_as_uint(w);
  return {__byte_perm(__float_as_uint(x), last, 0x3215), __byte_perm(__float_as_uint(y), last, 0x3216),
          __byte_perm(__float_as_uint(z), last, 0x3217), launch};
}
__device__ __forceinline__ float4 unpack_cell(const uint4& cell) {
  const u32 last = __byte_perm(__byte_perm(cell.x, cell.y, 0x0400), cell.z, 0x4210);
  return {__uint_as_float(cell.x & ~0xffu), __uint_as_float(cell.y & ~0xffu), __uint_as_float(cell.z & ~0xffu),
          __uint_as_float(last & ~0xffu)};
}
__device__ __forceinline__ uint4 pack_lse(float first_row, float second_row, u32 launch) {
  return {__float_as_uint(first_row), __float_as_uint(second_row), 0, launch};
}
__device__ __forceinline__ float2 unpack_lse(const uint4& cell) {
  return {__uint_as_float(cell.x), __uint_as_float(cell.y)};
}

// Query rows on the M side (mla_decode_sm90): a thread's four neighbouring accumulators are columns 8 g + 2 q, + 1 of
// rows r and r + 8, for column group g and lane q of each four. A unit is 16 rows of four column groups.
struct HeadsOnM {
  static constexpr u32 kRows = 64;
  static constexpr u32 kRowPairs = kRows / 2;
  static constexpr u32 kCells = kRows * kHeadDimV / 4;
  static constexpr u32 kUnitCells = 4;
  static constexpr u32 kCellStride = kWarpgroupThreads;  // between a lane's cells
  static constexpr u32 kUnitColumns = 8 * kUnitCells;
  static constexpr u32 kWarpUnits = kHeadDimV / kUnitColumns;

  // Of the warpgroup's thread `thread`: [column group][thread].
  __device__ __forceinline__ static u32 memory_index(u32 column_group, u32 thread) {
    return column_group * kWarpgroupThreads + thread;
  }
  __device__ __forceinline__ static u32 pair_of(u32 thread) { return thread / 4; }

  // Units that hold one of the first `rows` rows; they come first.
  __device__ __forceinline__ static i32 units(i32 rows) { return (rows + 15) / 16 * i32(kWarpUnits); }

  // Where this lane's share of a unit lies.
  const u32 thread, first_group;
  __device__ __forceinline__ HeadsOnM(i32 unit)
      : thread(u32(unit) / kWarpUnits * kWarpThreads + threadIdx.x % kWarpThreads),
        first_group(u32(unit) % kWarpUnits * kUnitCells) {}
  __device__ __forceinline__ u32 pair() const { return pair_of(thread); }
  __device__ __forceinline__ u32 first_row() const { return thread / kWarpThreads * 16 + thread % kWarpThreads / 4; }
  __device__ __forceinline__ u32 second_row() const { return first_row() + 8; }
  __device__ __forceinline__ u32 memory_index() const { return memory_index(first_group, thread); }
  __device__ __forceinline__ bool has_first_column() const { return first_group == 0 && thread % 4 == 0; }

  // The sums of both rows, times `scale`, to `rows` of 16-bit elements; a null row does not exist.
  template <typename Element>
  __device__ __forceinline__ void store(u16* const (&rows)[2], const float4 (&sums)[kUnitCells],
                                        const float (&scale)[2]) const {
    u32 words[2][kUnitCells];
#pragma unroll
    for (u32 c = 0; c < kUnitCells; ++c) {
      words[0][c] = cvt_pack<Element>(sums[c].x * scale[0], sums[c].y * scale[0]);
      words[1][c] = cvt_pack<Element>(sums[c].z * scale[1], sums[c].w * scale[1]);
    }
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      transpose_quad(words[i]);
      if (rows[i] == nullptr) continue;
      *reinterpret_cast<uint4*>(rows[i] + 8 * (first_group + thread % 4)) = {words[i][0], words[i][1], words[i][2],
                                                                            words[i][3]};
    }
  }
};

// Tokens, then latent columns on the M side (mla_decode_swapped_sm90): a thread's four neighbouring accumulators are
// columns r and r + 8 of rows 8 j + 2 q and + 1, for chunk c of 64 columns, row group j, warp w, lane 4 i + q, r = 64 c
// + 16 w + i. A unit is 8 rows of 16 columns.
template <u32 kTileRows>
struct HeadsOnN {
  static constexpr u32 kRows = kTileRows;
  static constexpr u32 kRowPairs = kRows / 2;
  static constexpr u32 kCells = kRows * kHeadDimV / 4;
  static constexpr u32 kUnitCells = 1, kCellStride = 0;
  static constexpr u32 kRowGroups = kRows / 8;
  static constexpr u32 kGroupUnits = kHeadDimV / 16;

  // [chunk][row group][warp][q][i]: the cells of a row pair that one warp holds are 128 bytes. A chunk and row group
  // begins a fixed distance behind another, whichever the thread.
  __device__ __forceinline__ static constexpr u32 begin_of(u32 chunk, u32 row_group) {
    return (chunk * kRowGroups + row_group) * kWarpgroupThreads;
  }
  __device__ __forceinline__ static u32 memory_index(u32 chunk, u32 row_group, u32 thread) {
    const u32 lane = thread % kWarpThreads;
    return begin_of(chunk, row_group) + thread - lane + lane % 4 * 8 + lane / 4;
  }

  // Units that hold one of the first `rows` rows; they come first.
  __device__ __forceinline__ static i32 units(i32 rows) { return (rows + 7) / 8 * i32(kGroupUnits); }

  // Where this lane's share of a unit lies. Lanes go along memory.
  const u32 row_group, within;
  const u32 lane = threadIdx.x % kWarpThreads;
  __device__ __forceinline__ HeadsOnN(i32 unit) : row_group(u32(unit) / kGroupUnits), within(u32(unit) % kGroupUnits) {}
  __device__ __forceinline__ u32 pair() const { return row_group * 4 + lane / 8; }
  __device__ __forceinline__ u32 first_row() const { return 2 * pair(); }
  __device__ __forceinline__ u32 second_row() const { return 2 * pair() + 1; }
  __device__ __forceinline__ u32 memory_index() const {
    return begin_of(within / 4, row_group) + within % 4 * kWarpThreads + lane;
  }
  __device__ __forceinline__ bool has_first_column() const { return within == 0 && lane % 8 == 0; }

  template <typename Element>
  __device__ __forceinline__ void store(u16* const (&rows)[2], const float4 (&sums)[kUnitCells],
                                        const float (&scale)[2]) const {
    const u32 column = 16 * within + lane % 8;
    const u32 words[2] = {cvt_pack<Element>(sums[0].x * scale[0], sums[0].y * scale[0]),
                          cvt_pack<Element>(sums[0].z * scale[1], sums[0].w * scale[1])};
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      if (rows[i] == nullptr) continue;
      rows[i][column] = u16(words[i]);
      rows[i][column + 8] = u16(words[i] >> 16);
    }
  }
};
