// The CTAs that load tiles together, one or a cluster of several: how they start and hand stages back.
#pragma once
#include "ptx.cuh"

// Barriers are initialised in all CTAs that will use them.
template <u32 kClusterCtas>
__device__ __forceinline__ void enter_cluster() {
  if constexpr (kClusterCtas == 1) {
    __syncthreads();
  } else {
    barrier_cluster_arrive();
    barrier_cluster_wait();
  }
}

// By one whole warp: it is done with a stage, of which every CTA of the cluster loads a part. `empty` is this CTA's own
// barrier.
template <u32 kClusterCtas>
__device__ __forceinline__ void release_stage(u32 empty) {
  const u32 lane = threadIdx.x % kWarpThreads;
  if constexpr (kClusterCtas == 1) {
    if (lane == 0) mbarrier_arrive(empty);
  } else {
    if (lane < kClusterCtas) mbarrier_arrive_cluster(empty, lane);
  }
}
