// A partial state in memory: what a split leaves for whoever merges it (merge.cuh).
//
// A cell is 16 bytes: accumulators of one thread and one query row, divided by the row's sum, and a mark of the launch.
// Each two rows (a row pair) have another, with the base-2 logarithms of their softmax denominators. The mark tells a
// reader that a cell is there: no flag, no fence and no second look.
//
// A unit is what a warp merges at a time: kUnitCells cells a lane. Units lie one behind the other, and within one the
// first cells of all lanes, then the second ones.
#pragma once
#include "epilogue.cuh"
#include "layout.cuh"
#include "ptx.cuh"

constexpr u32 kHeadDimV = MLA_HEAD_DIM_V;

// Marks come again after kMarks launches. By then nothing carries one of an earlier launch: a slot of states that a
// launch leaves unused is cleared in kClearTurns of them, a stretch each (merge.cuh). So all launches that use the same
// memory must have the same workers and query rows.
constexpr u32 kMarks = MLA_STATE_MARKS;  // from 1 on: memory is zero at first
constexpr u32 kClearTurns = MLA_CLEAR_TURNS;
constexpr u32 kLaunchNumbers = kMarks * kClearTurns;
static_assert(kClearTurns < kMarks && kMarks < 255, "255 is what tests fill memory with");

// ---- what is in a cell ---------------------------------------------------------------------------------------------

// Four values in float32. The last one gives 8 bits of its mantissa for the mark: up to 2^-15 of it, where rounding the
// result takes up to 2^-9 (bfloat16) or 2^-12. The fewest instructions, for states that are small anyway: with
// integers 16 rows were 2 to 7 % slower.
class FloatCell {
 public:
  static constexpr u32 kValues = 4;

  // Of `values` times `scale`.
  __device__ __forceinline__ FloatCell(const float (&values)[kValues], float scale) {
#pragma unroll
    for (u32 i = 0; i < kValues; ++i) values_[i] = values[i] * scale;
    values_[kValues - 1] = without_mark(__float_as_uint(values_[kValues - 1]));
  }
  __device__ __forceinline__ explicit FloatCell(const uint4& cell)
      : values_{__uint_as_float(cell.x), __uint_as_float(cell.y), __uint_as_float(cell.z), without_mark(cell.w)} {}

  __device__ __forceinline__ uint4 packed(u32 mark) const {
    return {__float_as_uint(values_[0]), __float_as_uint(values_[1]), __float_as_uint(values_[2]),
            __float_as_uint(values_[3]) | mark};
  }
  // The cell carries the mark if none of kMarkBits differs.
  static constexpr u32 kMarkBits = 0xff;
  __device__ __forceinline__ static u32 mark_difference(const uint4& cell, u32 mark) { return cell.w ^ mark; }

  // Value i is number(i) times unit(1).
  __device__ __forceinline__ float number(u32 i) const { return values_[i]; }
  __device__ __forceinline__ float unit(float weight) const { return weight; }

 private:
  __device__ __forceinline__ static float without_mark(u32 bits) { return __uint_as_float(bits & ~kMarkBits); }

  float values_[kValues];
};

// Eight values as integers of 14 bits with one exponent: off by up to 2^-13 of the largest of them. All are NaN if one
// is not finite. For large states: 132 of 64 rows in float32 took 10 of 32 us at b=1, h_q=128, 32K on an H100 to be
// written and read; with these the call takes 27.6.
class IntegerCell {
 public:
  static constexpr u32 kValues = 8;

  // Of `values` times `scale`, which is not negative.
  __device__ __forceinline__ IntegerCell(const float (&values)[kValues], float scale) {
    float top = fabsf(values[0]);
#pragma unroll
    for (u32 i = 1; i < kValues; ++i) top = max_nan(top, fabsf(values[i]));
    // 1 + 2^-12: the largest may be rounded up.
    exponent_ = max(__float_as_uint(top * (scale * (1.f + 1.f / 4096.f))) & kExponentMask, kLeastExponent);
    const float inverse_unit = scale * __uint_as_float(kInverseExponent - exponent_);
#pragma unroll
    for (u32 i = 0; i < kValues; ++i) shifted_[i] = fmaf(values[i], inverse_unit, kShift);
  }
  __device__ __forceinline__ explicit IntegerCell(const uint4& cell) {
    const u32 words[4] = {cell.x, cell.y, cell.z, cell.w};
#pragma unroll
    for (u32 i = 0; i < kValues; ++i) {
      shifted_[i] = __uint_as_float((words[i / 2] >> i % 2 * kBits & kIntegerMask) | kShiftBits);
    }
    exponent_ = (cell.z >> 5 & kLastBits >> 5) | (cell.w >> 1 & kLastBits >> 1);
  }

  // Two integers a word; its last four bits are half of the mark, or of the exponent.
  __device__ __forceinline__ uint4 packed(u32 mark) const {
    const u32 last_bits[4] = {mark << 28, mark << 24, exponent_ << 5, exponent_ << 1};
    u32 words[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u32 low = __float_as_uint(shifted_[2 * i]), high = __float_as_uint(shifted_[2 * i + 1]) << kBits;
      words[i] = select_bits(kLastBits, last_bits[i], select_bits(kIntegerMask, low, high));
    }
    return {words[0], words[1], words[2], words[3]};
  }
  static constexpr u32 kLastBits = 0xf0000000u;  // of a word
  static constexpr u32 kMarkBits = kLastBits;
  __device__ __forceinline__ static u32 mark_difference(const uint4& cell, u32 mark) {
    return (cell.x ^ mark << 28) | (cell.y ^ mark << 24);
  }

  // Value i is number(i) times unit(1). The last bit makes a NaN of a unit that would be infinite.
  __device__ __forceinline__ float number(u32 i) const { return shifted_[i] - kShift; }
  __device__ __forceinline__ float unit(float weight) const {
    return __uint_as_float(exponent_ | 1u) * (weight * (1.f / 4096.f));
  }

 private:
  static constexpr u32 kBits = 14;
  static constexpr u32 kIntegerMask = (1u << kBits) - 1;
  static constexpr u32 kExponentMask = 0x7f800000u;    // of a float32
  static constexpr u32 kLeastExponent = 16u << 23;     // below, the inverse of the unit would overflow
  static constexpr u32 kInverseExponent = 266u << 23;  // exponents of the largest value and what scales it add up to it
  static constexpr u32 kShiftBits = 0x4b000000u;       // 2^23: its last mantissa bit is worth 1
  static constexpr float kShift = 8388608.f + float(1u << (kBits - 1));

  float shifted_[kValues];  // 2^23 + 2^13 + integer: the last bits are those in memory
  u32 exponent_;            // where a float32 has it
};

template <typename Cell>
__device__ __forceinline__ bool is_marked(const uint4& cell, u32 mark) {
  return (Cell::mark_difference(cell, mark) & Cell::kMarkBits) == 0;
}

__device__ __forceinline__ uint4 pack_lse(float first_row, float second_row, u32 mark) {
  return {__float_as_uint(first_row), __float_as_uint(second_row), 0, mark};
}
__device__ __forceinline__ bool is_marked_lse(const uint4& cell, u32 mark) { return cell.w == mark; }
// Of the pair's row 0 or 1.
__device__ __forceinline__ float unpack_lse(const uint4& cell, u32 i) {
  return __uint_as_float(i == 0 ? cell.x : cell.y);
}

// ---- what cells there are ------------------------------------------------------------------------------------------

// Query rows on the M side (mla_decode_sm90): a thread has of rows r and r + 8 (i = 0, 1) columns 8 g + 2 q and + 1,
// for column group g and lane q of each four. A cell is four column groups of one row, a unit eight of 8 rows.
struct HeadsOnM {
  using Cell = IntegerCell;
  static constexpr u32 kRows = 64;
  static constexpr u32 kRowPairs = kRows / 2;
  static constexpr u32 kCells = kRows * kHeadDimV / Cell::kValues;
  static constexpr u32 kUnitCells = 2;
  static constexpr u32 kUnitRows = 8;
  static constexpr u32 kSplitLanes = 1;  // from a lane that sees to one split of a row to that of the next split
  static constexpr u32 kCellColumns = 32;
  static constexpr u32 kRowCells = kHeadDimV / kCellColumns;  // of a lane
  static constexpr u32 kRowUnits = kRowCells / kUnitCells;

  // Cell of the warpgroup's thread `thread` at columns kCellColumns * `columns` and on.
  __device__ __forceinline__ static u32 memory_index(u32 columns, u32 i, u32 thread) {
    return ((thread / kWarpThreads * 2 + i) * kRowCells + columns) * kWarpThreads + thread % kWarpThreads;
  }
  __device__ __forceinline__ static u32 pair_of(u32 thread) { return thread / 4; }

  // Units that hold one of the first `rows` rows; they come first.
  __device__ __forceinline__ static i32 units(i32 rows) { return (rows + 7) / 8 * i32(kRowUnits); }

  // This lane's share of a unit.
  const u32 row_group, first_column;
  const u32 lane = threadIdx.x % kWarpThreads;
  __device__ __forceinline__ HeadsOnM(i32 unit)
      : row_group(u32(unit) / kRowUnits), first_column(u32(unit) % kRowUnits * (kUnitCells * kCellColumns)) {}
  __device__ __forceinline__ u32 row() const { return row_group * 8 + lane / 4; }
  __device__ __forceinline__ u32 pair() const { return pair_of(row_group / 2 * kWarpThreads + lane); }
  __device__ __forceinline__ u32 row_of_pair() const { return row_group % 2; }
  __device__ __forceinline__ bool has_first_column() const { return first_column == 0 && lane % 4 == 0; }
  // Lanes of one row each see to one of a batch of splits.
  __device__ __forceinline__ u32 split_of_lane() const { return lane % 4; }
  __device__ __forceinline__ u32 lane_of_split(u32 split) const { return lane / 4 * 4 + split; }

  // The row's sums, times `scale`, in 16-bit elements; not if `row` is null. All lanes take part.
  template <typename Element>
  __device__ __forceinline__ void store(u16* row, const float (&sums)[kUnitCells][Cell::kValues], float scale) const {
#pragma unroll
    for (u32 c = 0; c < kUnitCells; ++c) {
      const uint4 packed = pack_columns_16bit<Element>(sums[c], scale);
      if (row == nullptr) continue;
      *reinterpret_cast<uint4*>(row + first_column + c * kCellColumns + lane % 4 * 8) = packed;
    }
  }
};

// Tokens, then latent columns on the M side (mla_decode_swapped_sm90): a thread has of rows 8 j + 2 q + e (e = 0, 1)
// columns r and r + 8 of its group's four chunks of 64, for row group j, warp w, lane 4 i + q, r = 16 w + i. A cell is
// two chunks of one row, a unit those of a warp.
template <u32 kTileRows>
struct HeadsOnN {
  using Cell = FloatCell;
  static constexpr u32 kRows = kTileRows;
  static constexpr u32 kRowPairs = kRows / 2;
  static constexpr u32 kCells = kRows * kHeadDimV / Cell::kValues;
  static constexpr u32 kUnitCells = 1;
  static constexpr u32 kUnitRows = 4;
  static constexpr u32 kSplitLanes = 4;
  static constexpr u32 kCellChunks = Cell::kValues / 2;
  static constexpr u32 kGroupColumns = kHeadDimV / 2;
  static constexpr u32 kWarpUnits = kGroupColumns / kChunkColumns / kCellChunks;
  static constexpr u32 kGroupUnits = kWarpUnits * (kWarpgroupThreads / kWarpThreads);
  static constexpr u32 kRowUnits = 2 * kGroupUnits;

  // [row group][e][group][warp][chunks][lane]: a row group, e or chunks begin a fixed distance behind another.
  __device__ __forceinline__ static constexpr u32 begin_of(u32 row_group, u32 e, u32 chunks) {
    return ((2 * row_group + e) * kRowUnits + chunks) * kWarpThreads;
  }
  __device__ __forceinline__ static u32 memory_index(u32 group, u32 thread) {
    const u32 warp = thread / kWarpThreads;
    return (group * kGroupUnits + warp * kWarpUnits) * kWarpThreads + thread % kWarpThreads;
  }

  // Units that hold one of the first `rows` rows; they come first.
  __device__ __forceinline__ static i32 units(i32 rows) { return (rows + 7) / 8 * i32(2 * kRowUnits); }

  // This lane's share of a unit.
  const u32 row_group, e, first_column;
  const u32 lane = threadIdx.x % kWarpThreads;
  __device__ __forceinline__ HeadsOnN(i32 unit)
      : row_group(u32(unit) / (2 * kRowUnits)),
        e(u32(unit) / kRowUnits % 2),
        first_column(u32(unit) / kGroupUnits % 2 * kGroupColumns + u32(unit) % kGroupUnits / kWarpUnits * 16 +
                     u32(unit) % kWarpUnits * (kCellChunks * kChunkColumns)) {}
  __device__ __forceinline__ u32 pair() const { return row_group * 4 + lane % 4; }
  __device__ __forceinline__ u32 row_of_pair() const { return e; }
  __device__ __forceinline__ u32 row() const { return 2 * pair() + e; }
  __device__ __forceinline__ bool has_first_column() const { return first_column == 0 && lane < 4; }
  __device__ __forceinline__ u32 split_of_lane() const { return lane / 4; }
  __device__ __forceinline__ u32 lane_of_split(u32 split) const { return split * 4 + lane % 4; }

  template <typename Element>
  __device__ __forceinline__ void store(u16* row, const float (&sums)[kUnitCells][Cell::kValues], float scale) const {
    if (row == nullptr) return;
#pragma unroll
    for (u32 chunk = 0; chunk < kCellChunks; ++chunk) {
      const u32 word = cvt_pack<Element>(sums[0][2 * chunk] * scale, sums[0][2 * chunk + 1] * scale);
      u16* const to = row + first_column + chunk * kChunkColumns + lane / 4;
      to[0] = u16(word);
      to[8] = u16(word >> 16);
    }
  }
};
