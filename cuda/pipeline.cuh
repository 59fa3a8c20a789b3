// A ring of shared-memory stages: who holds which stage, and in which round.
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

// The producer's position in the ring. Consumers, which look ahead, compute theirs from the number of the tile.
template <u32 kStages>
struct RingPosition {
  u32 stage = 0;
  u32 phase = 0;  // parity of the round: a consumer waits for `phase`, a producer for the round before

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ RingPosition before() const {
    return stage == 0 ? RingPosition{kStages - 1, phase ^ 1} : RingPosition{stage - 1, phase};
  }
};

// Bounds a loop that waits. In debug builds ("-DMLA_WATCHDOG" added to mlacore.jit.FLAGS) a hang of some seconds
// becomes a fault.
class Watchdog {
 public:
  __device__ __forceinline__ void turn() {
#ifdef MLA_WATCHDOG
    // A store to nowhere, not `trap`, with which ptxas forgoes the registers of setmaxnreg and serialises the WGMMAs.
    const u32 now = u32(clock64() >> 20) | 1u;  // in half milliseconds
    if (begun_ == 0) begun_ = now;
    if (now - begun_ > 8192u) asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(now) : "memory");
#endif
  }

 private:
  u32 begun_ = 0;
};

// Spins until the barrier has completed the phase of this parity.
__device__ __forceinline__ void wait_phase(u32 barrier, u32 parity) {
  Watchdog watchdog;
  while (!mbarrier_try_wait_parity(barrier, parity)) watchdog.turn();
}

// P is zero for tokens past the end, but 0 * NaN is not: `kThreads` threads clear those rows of kChunks chunks of V
// from address `v` on. True if there are such rows; the threads then have to meet before V is multiplied.
template <u32 kChunks, u32 kThreads>
__device__ __forceinline__ bool clear_tokens(u32 v, i32 valid_tokens, u32 thread) {
  if (valid_tokens >= i32(kChunkRows)) return false;
  constexpr u32 kCellsPerToken = kChunks * kCellsPerRow;
  for (u32 i = thread; i < (kChunkRows - u32(valid_tokens)) * kCellsPerToken; i += kThreads) {
    const u32 token = u32(valid_tokens) + i / kCellsPerToken, cell = i % kCellsPerToken;
    st_shared_zero_16(v + cell / kCellsPerRow * kChunkBytes + token * kChunkRowBytes +
                      cell % kCellsPerRow * kCellBytes);
  }
  fence_proxy_async();
  return true;
}
