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

// Row i, times `scale`, in 16-bit elements. All lanes take part in the shuffles; only those of an existing row store.
template <typename Element, u32 kElements>
__device__ __forceinline__ void store_row_16bit(u16* destination, const float (&fragment)[kElements], u32 i,
                                                float scale, bool exists) {
  destination += threadIdx.x % 4 * 8;
#pragma unroll
  for (u32 j = 0; j < kElements / 4; j += 4) {
    u32 words[4];
#pragma unroll
    for (u32 k = 0; k < 4; ++k) {
      const u32 at = 4 * (j + k) + 2 * i;
      words[k] = cvt_pack<Element>(fragment[at] * scale, fragment[at + 1] * scale);
    }
    transpose_quad(words);
    if (exists) *reinterpret_cast<uint4*>(destination + 8 * j) = {words[0], words[1], words[2], words[3]};
  }
}
