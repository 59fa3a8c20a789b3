// Online softmax in base 2 over one row fragment: S arrives as raw dot products, the scale (softmax_scale * log2 e) is
// folded into the exponent. A row's state is kept relative to a reference: its maximum at the time the reference was
// set. The reference moves only when probabilities outgrow it by kReferenceSlack or more, so that in most tiles no
// maximum is taken, nothing is reduced across lanes and nothing is rescaled; a 16-bit probability above 1 has the same
// relative error as one below. A row with nothing but masked scores keeps reference -inf and sum 0 without NaN.
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

constexpr float kReferenceSlack = 256.f;  // bound of a thread's probabilities of one row, summed over a tile
// Of a row that does not exist. Its probabilities are zeros, with which to multiply takes less power: at the limit of
// an H200, b=128, 4 % of the time at 16 heads and two or three query tokens, 5 % at 24 heads.
constexpr float kAbsentReference = 1e30f;

// The two rows of a thread's accumulator fragment (row and row + 8).
struct RowPair {
  float r[2];
};

// Maximum and sum over kCount lanes, each kStep from the next: <1, 4> over the four that share a row of scores.
template <u32 kStep, u32 kCount>
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (u32 step = kStep; step < kStep * kCount; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
template <u32 kStep, u32 kCount>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (u32 step = kStep; step < kStep * kCount; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
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

// This thread's largest score of each row, unscaled.
template <int kScores>
__device__ __forceinline__ RowPair thread_max(const float (&scores)[kScores]) {
  RowPair top = {scores[0], scores[2]};
#pragma unroll
  for (int i = 0; i < kScores; ++i) top.r[(i / 2) % 2] = fmaxf(top.r[(i / 2) % 2], scores[i]);
  return top;
}

// Whether some row of the warp has no reference yet, or has left the slack of the one it has.
__device__ __forceinline__ bool needs_new_reference(const RowPair& tile_sum, const RowPair& reference) {
  return __any_sync(0xffffffffu, tile_sum.r[0] > kReferenceSlack || tile_sum.r[1] > kReferenceSlack ||
                                     reference.r[0] == -infinity() || reference.r[1] == -infinity());
}

// The row maxima (scaled) over what the old references stand for and these scores.
__device__ __forceinline__ RowPair new_reference(const RowPair& top, const RowPair& reference, float scale_log2) {
  return {fmaxf(reference.r[0], lanes_max<1, 4>(top.r[0]) * scale_log2),
          fmaxf(reference.r[1], lanes_max<1, 4>(top.r[1]) * scale_log2)};
}

// What a row's sum of probabilities stands for: the base-2 log-sum-exp of its scores, and what makes them weights. A
// row that sees no key has sum 0, and reference -inf. (log2f would take 30 instructions a row, one after another,
// and a branch; lg2 is off by 2^-22 of its result at most, or of 1.)
__device__ __forceinline__ float log_sum_exp(float reference, float sum) { return reference + lg2(sum); }
__device__ __forceinline__ float inverse_sum(float sum) {
  const float inverse = rcp(sum);
  return sum == 0.f ? 0.f : inverse;
}

// Factor that brings a state kept relative to `from` to be relative to `to`. A state without reference is empty: it is
// left as it is.
__device__ __forceinline__ float rescale_factor(float from, float to) {
  return from == -infinity() ? 1.f : ex2(from - to);
}
__device__ __forceinline__ RowPair rescale_factors(const RowPair& from, const RowPair& to) {
  return {rescale_factor(from.r[0], to.r[0]), rescale_factor(from.r[1], to.r[1])};
}

// Probabilities relative to `reference`, packed in pairs of columns; returns this thread's share of the row sums
// (before rounding).
template <typename Element, int kScores>
__device__ __forceinline__ RowPair exponentiate(const float (&scores)[kScores], u32 (&probabilities)[kScores / 2],
                                                const RowPair& reference, float scale_log2) {
  RowPair sum = {0.f, 0.f};
  const float offset[2] = {finite_or_zero(reference.r[0]), finite_or_zero(reference.r[1])};
#pragma unroll
  for (int i = 0; i < kScores; i += 2) {
    const int row = (i / 2) % 2;
    const float low = ex2(fmaf(scores[i], scale_log2, -offset[row]));
    const float high = ex2(fmaf(scores[i + 1], scale_log2, -offset[row]));
    sum.r[row] += low + high;
    probabilities[i / 2] = cvt_pack<Element>(low, high);
  }
  return sum;
}
