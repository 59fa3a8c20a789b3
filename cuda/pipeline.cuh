// A ring of shared-memory stages: who holds which stage, and in which round.
#pragma once
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
};

// Spins until the barrier has completed the phase of this parity. In debug builds ("-DMLA_WATCHDOG" added to
// mlacore.jit.FLAGS) a hang becomes a trap.
__device__ __forceinline__ void wait_phase(u32 barrier, u32 parity) {
#ifdef MLA_WATCHDOG
  for (u32 spins = 0; !mbarrier_try_wait_parity(barrier, parity); ++spins) {
    if (spins > 20000000u) trap();
  }
#else
  while (!mbarrier_try_wait_parity(barrier, parity)) {
  }
#endif
}
