// The CTAs that load tiles together, one or a cluster of several: how they start and hand stages back.
#pragma once
#include "ptx.cuh"

// Barriers are initialised in all CTAs that will use them once threads have met after that. Threads of a cluster arrive
// first and wait when they need the barriers: what they load meanwhile is on its way (0.3 us).
template <u32 kClusterCtas>
__device__ __forceinline__ void arrive_at_start() {
  if constexpr (kClusterCtas == 1) {
    __syncthreads();
  } else {
    barrier_cluster_arrive();
  }
}
template <u32 kClusterCtas>
__device__ __forceinline__ void await_start() {
  if constexpr (kClusterCtas > 1) barrier_cluster_wait();
}

// By one whole warp: it is done with a stage, of which every CTA of the cluster loads a part. `empty` is this CTA's own
// barrier.
template <u32 kClusterCtas>
__device__ __forceinline__ void release_stage(u32 empty, u32 lane) {
  if constexpr (kClusterCtas == 1) {
    if (lane == 0) mbarrier_arrive(empty);
  } else {
    if (lane < kClusterCtas) mbarrier_arrive_cluster(empty, lane);
  }
}
