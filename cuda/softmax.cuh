// Online softmax in base 2 over one row fragment: S arrives as raw dot products, the scale (softmax_scale * log2 e) is
// folded into the exponent. A row with nothing but masked scores keeps max = -inf and sum = 0 without NaN.
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

// The two rows of a thread's accumulator fragment (row and row + 8).
struct RowPair {
  float r[2];
};

// Maximum and sum over the four lanes that share a row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Subtracting an infinite maximum would give NaN; zero leaves exp2(-inf) = 0.
__device__ __forceinline__ float finite_or_zero(float x) { return x == -infinity() ? 0.f : x; }

// Scores of columns at or past the row's limit become -inf. `column` is the thread's first column.
template <int kScores>
__device__ __forceinline__ void mask_scores(float (&scores)[kScores], u32 column, const i32 (&limit)[2]) {
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const i32 c = i32(column) + (i / 4) * 8 + i % 2;
    if (c >= limit[(i / 2) % 2]) scores[i] = -infinity();
  }
}

// New row maxima (scaled) after seeing these scores.
template <int kScores>
__device__ __forceinline__ RowPair update_max(const float (&scores)[kScores], const RowPair& max, float scale_log2) {
  RowPair updated;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float top = scores[2 * row];
#pragma unroll
    for (int i = 0; i < kScores; i += 4) top = fmaxf(top, fmaxf(scores[i + 2 * row], scores[i + 2 * row + 1]));
    updated.r[row] = fmaxf(max.r[row], quad_max(top) * scale_log2);
  }
  return updated;
}

// Factors that bring states kept relative to `from` to be relative to `to` (>= from).
__device__ __forceinline__ RowPair rescale_factors(const RowPair& from, const RowPair& to) {
  return {ex2(from.r[0] - finite_or_zero(to.r[0])), ex2(from.r[1] - finite_or_zero(to.r[1]))};
}

// Scores become probabilities relative to `max`; returns this thread's share of the row sums (before rounding).
template <int kScores>
__device__ __forceinline__ RowPair exponentiate(float (&scores)[kScores], const RowPair& max, float scale_log2) {
  RowPair sum = {0.f, 0.f};
  const float offset[2] = {finite_or_zero(max.r[0]), finite_or_zero(max.r[1])};
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const int row = (i / 2) % 2;
    scores[i] = ex2(fmaf(scores[i], scale_log2, -offset[row]));
    sum.r[row] += scores[i];
  }
  return sum;
}
