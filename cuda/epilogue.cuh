// Rows of an accumulator fragment to global memory: a thread holds rows `row` and `row + 8` (index i = 0, 1) of its
// fragment, of each 8 columns two neighbours (layout.cuh).
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

// words[k] of lane q (of each four) goes to words[q] of lane k, so that a lane holds 16 consecutive bytes.
__device__ __forceinline__ void transpose_quad(u32 (&words)[4]) {
  const bool odd = threadIdx.x % 2, high = threadIdx.x % 4 / 2;
#pragma unroll
  for (u32 k = 0; k < 4; k += 2) {
    const u32 received = __shfl_xor_sync(0xffffffffu, odd ? words[k] : words[k + 1], 1);
    (odd ? words[k] : words[k + 1]) = received;
  }
#pragma unroll
  for (u32 k = 0; k < 2; ++k) {
    const u32 received = __shfl_xor_sync(0xffffffffu, high ? words[k] : words[k + 2], 2);
    (high ? words[k] : words[k + 2]) = received;
  }
}

// Row i of column groups 4 c to 4 c + 3 of a fragment: columns 8 k + 2 q and + 1 of each group k, for lane q of each
// four. `i` may be a variable, so that a loop over both rows need not be unrolled.
template <u32 kElements>
__device__ __forceinline__ void take_columns(const float (&fragment)[kElements], u32 i, u32 c, float (&values)[8]) {
#pragma unroll
  for (u32 k = 0; k < 8; ++k) {
    const u32 at = 4 * (4 * c + k / 2) + k % 2;
    values[k] = i == 0 ? fragment[at] : fragment[at + 2];
  }
}

// Of such values, times `scale` and in 16-bit elements, those of columns 8 q to 8 q + 7. All lanes take part.
template <typename Element>
__device__ __forceinline__ uint4 pack_columns_16bit(const float (&values)[8], float scale) {
  u32 words[4];
#pragma unroll
  for (u32 k = 0; k < 4; ++k) words[k] = cvt_pack<Element>(values[2 * k] * scale, values[2 * k + 1] * scale);
  transpose_quad(words);
  return {words[0], words[1], words[2], words[3]};
}

// Row i, times `scale`, in 16-bit elements. All lanes take part; only those of an existing row store.
template <typename Element, u32 kElements>
__device__ __forceinline__ void store_row_16bit(u16* destination, const float (&fragment)[kElements], u32 i,
                                                float scale, bool exists) {
  destination += threadIdx.x % 4 * 8;
#pragma unroll
  for (u32 c = 0; c < kElements / 16; ++c) {
    float values[8];
    take_columns(fragment, i, c, values);
    const uint4 packed = pack_columns_16bit<Element>(values, scale);
    if (exists) *reinterpret_cast<uint4*>(destination + 32 * c) = packed;
  }
}
