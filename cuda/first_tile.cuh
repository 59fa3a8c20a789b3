// A worker's first tile, asked for on a hint: schedule and page ids as they were before the previous kernel of the
// stream had ended. A CTA starts as soon as one of that kernel's has left its SM, and then has to wait for the last of
// them. Meanwhile it reads the hint and has the tile brought to L2; once the wait is over the loads go out at once, and
// schedule and page ids are read again while they are on their way: one trip to L2 less (0.3 us at b=1, 4K).
//
// The previous kernel may be about to change all that a hint rests on, so wherever it leads to lies inside the arrays,
// and what it has brought counts only if it was right. Of a cluster, both CTAs must have been: each loads half.
//
//   judged         1 + bytes    producers -> the warp that hands over, in clusters producers, too: verdicts are there
//   landed[p]      1 + bytes    producer, TMA -> the warp that hands over: part p is in place. If it was asked for in
//                               vain, -> producer, and consumers that have no tiles: nothing is on its way any more
//   discarded      1 a CTA      producers of a cluster -> each other: so it is in both CTAs
#pragma once
#include "cluster.cuh"
#include "pages.cuh"
#include "params.cuh"
#include "pipeline.cuh"
#include "work.cuh"

enum Verdict : u32 {
  kNotAsked,
  kInVain,  // or for a tile that there is no longer
  kRight
};

template <u32 kClusterCtas, u32 kParts, u32 kPartBytes>
struct FirstTile {
  u64 landed[kParts];
  u64 judged;
  u64 discarded;
  u32 verdicts[2];  // this CTA's, and that of the other one of a cluster

  __device__ __forceinline__ void init() {
    for (u64& part : landed) mbarrier_init(shared_address(&part), 1);
    mbarrier_init(shared_address(&judged), 1);
    mbarrier_init(shared_address(&discarded), kClusterCtas);
  }

  // By the producer's warp: whether the hint was right, in both CTAs of a cluster. If not, whatever it has brought to
  // either has landed.
  __device__ __forceinline__ bool judge(Verdict verdict) {
    const u32 lane = threadIdx.x % kWarpThreads;
    if (lane == 0) {
      verdicts[0] = verdict;
      if constexpr (kClusterCtas == 1) {
        mbarrier_arrive(shared_address(&judged));
      } else {
        st_async_cluster(shared_address(&verdicts[1]), verdict, shared_address(&judged), cluster_ctarank() ^ 1);
        mbarrier_arrive_expect_tx(shared_address(&judged), sizeof(u32));
      }
    }
    u32 shares = verdict == kNotAsked ? 0 : 1;  // of the tile that are on their way
    bool is_right = verdict == kRight;
    if constexpr (kClusterCtas > 1) {
      wait_phase(shared_address(&judged), 0);
      const u32 other = verdicts[1];
      shares += other == kNotAsked ? 0 : 1;
      is_right = is_right && other == kRight;
    }
    // Bytes that have come before are counted, too: the phase cannot end without this arrival.
    if (lane == 0) {
      for (u64& part : landed) {
        mbarrier_arrive_expect_tx(shared_address(&part), shares * (kPartBytes / kClusterCtas));
      }
    }
    if (is_right) return true;
    await_landing();
    if constexpr (kClusterCtas > 1) {
      if (lane < kClusterCtas) mbarrier_arrive_cluster(shared_address(&discarded), lane);
      wait_phase(shared_address(&discarded), 0);
    }
    return false;
  }
  // Nothing that a hint has asked for is on its way to this CTA any more.
  __device__ __forceinline__ void await_landing() const {
#pragma unroll 1
    for (u32 part = 0; part < kParts; ++part) wait_phase(shared_address(&landed[part]), 0);
  }

  // By another warp: the tile's parts to those who wait for `full`, if the hint was right.
  __device__ __forceinline__ void hand_over(u64 (&full)[kParts]) const {
    wait_phase(shared_address(&judged), 0);
    if (verdicts[0] != kRight || (kClusterCtas > 1 && verdicts[1] != kRight)) return;
    for (u32 part = 0; part < kParts; ++part) {
      wait_phase(shared_address(&landed[part]), 0);
      if (threadIdx.x % kWarpThreads == 0) mbarrier_arrive(shared_address(&full[part]));
    }
  }
};

// Into L2, by one warp: `pages` are those of a hint, `length` the sequence's, or 0 if it leads to no tile. Once the
// previous kernel has ended (mbarrier `begun`) it is too late: the loads go out. CTAs that walk the same items share
// the tile. One tile: with more, workers that end early take memory from those that still merge (b=8 of mixed lengths,
// h_q=128: 10 % slower with four).
__device__ __forceinline__ void prefetch_first_tile(const DecodeParams& params, const Block& block,
                                                    const PageIds& pages, i32 length, u64& begun) {
  constexpr i32 kPieceTokens = 16, kPieces = i32(kTileTokens) / kPieceTokens;  // no page is smaller
  const i32 piece = i32(threadIdx.x % kWarpThreads), token = pages.first_token() + piece % kPieces * kPieceTokens;
  const i32 page = pages.page(token);
  if (params.prefetches_first == 0 || piece >= kPieces || piece % params.row_blocks != block.row_block) return;
  if (u32(token) >= u32(length) || mbarrier_test_parity(shared_address(&begun), 0)) return;
  prefetch_rows<kPieceTokens>(params, page, pages.row(token));
}
