// The only file with inline assembly: one function per PTX instruction, named after it, and keep_order.
// Section titles refer to NVIDIA's "Parallel Thread Execution ISA". Whatever waits, arrives or fences clobbers memory,
// so that the compiler keeps loads and stores on their side of it.
#pragma once
#include "types.cuh"

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// ---- mbarrier ("Parallel Synchronization and Communication Instructions: mbarrier") -------------------------------

__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the async proxy (TMA) and to the rest of the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Address of the same offset in CTA `rank` of the cluster.
__device__ __forceinline__ u32 mapa(u32 address, u32 rank) {
  u32 remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Arrives at the barrier at the same offset in CTA `rank` of the cluster. The arrival has CTA scope, as is usual for
// barriers that hand a stage back to TMA: what it guards has been read by completed WGMMAs or written before a proxy
// fence. release.cluster would put a MEMBAR.ALL.GPU before every arrival: 20 % of the time at b=128, h_q=128, s_q=2,
// s_k=16K on an H100.
__device__ __forceinline__ void mbarrier_arrive_cluster(u32 barrier, u32 rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapa(barrier, rank)) : "memory");
}

// A word to the same offset in CTA `rank` of the cluster, where it counts as bytes of `barrier` ("st.async"): whoever
// has seen that phase end sees the word.
__device__ __forceinline__ void st_async_cluster(u32 address, u32 value, u32 barrier, u32 rank) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(mapa(address, rank)),
               "r"(value), "r"(mapa(barrier, rank))
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait_parity(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n .reg .pred p;\n"
      " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      " selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// The same without a pause.
__device__ __forceinline__ bool mbarrier_test_parity(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n .reg .pred p;\n"
      " mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      " selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// ---- named barriers ("barrier{.cta}") ------------------------------------------------------------------------------
// bar.* is the aligned form of barrier.cta.*: the threads of a warp come to it together.

__device__ __forceinline__ void bar_sync(u32 id, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The unaligned form, for a barrier at which both groups wait, each perhaps in code of its own: compute-sanitizer's
// synccheck takes the aligned one there for divergence. Costs 2 to 3 % where it stands in the loop over tiles.
__device__ __forceinline__ void barrier_cta_sync(u32 id, u32 threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Waits as bar_sync, and tells every thread whether `value` holds in any of them.
__device__ __forceinline__ bool bar_red_or(u32 id, u32 threads, bool value) {
  u32 any;
  asm volatile(
      "{\n .reg .pred p, q;\n"
      " setp.ne.u32 p, %3, 0;\n"
      " bar.red.or.pred q, %1, %2, p;\n"
      " selp.u32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(u32(value))
      : "memory");
  return any != 0;
}

__device__ __forceinline__ void bar_arrive(u32 id, u32 threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- clusters ("barrier.cluster", "Special Registers: %cluster_ctarank") --------------------------------------------

__device__ __forceinline__ u32 cluster_ctarank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Relaxed: fence_mbarrier_init has released what other CTAs rely on, their barriers. With release, which waits for all
// memory of the thread, a cluster starts 0.2 us later (0.5 us behind another kernel).
__device__ __forceinline__ void barrier_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void barrier_cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// ---- global memory that CTAs share ("ld, st, atom: Memory Consistency Model") ---------------------------------------

__device__ __forceinline__ u32 ld_relaxed_gpu(const u32* address) {
  u32 value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ i32 ld_relaxed_gpu(const i32* address) {
  return i32(ld_relaxed_gpu(reinterpret_cast<const u32*>(address)));
}
__device__ __forceinline__ void st_relaxed_gpu(u32* address, u32 value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// 16 bytes at once: a reader never sees a part of what was written. PTX promises it of `b128` accesses on both sides.
// Stores of four words are not split by the hardware either, and shorter: `st.relaxed.b128` takes 36 us where they take
// 32 (64 rows, b=4, 4K on an H100). To PTX they are weak, and race with the loads.
__device__ __forceinline__ uint4 ld_relaxed_gpu_16(const uint4* address) {
  u64 low, high;
  asm volatile(
      "{\n"
      ".reg .b128 whole;\n"
      "ld.relaxed.gpu.global.b128 whole, [%2];\n"
      "mov.b128 {%0, %1}, whole;\n"
      "}\n"
      : "=l"(low), "=l"(high)
      : "l"(address)
      : "memory");
  return {u32(low), u32(low >> 32), u32(high), u32(high >> 32)};
}
__device__ __forceinline__ void st_global_16(uint4* address, const uint4& value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// Adds 1, or goes back to 0 from `last`; returns what was there before.
__device__ __forceinline__ u32 atom_inc_relaxed_gpu(u32* address, u32 last) {
  u32 before;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(last) : "memory");
  return before;
}
// The same, after all that this thread has read and written, and before all that follows.
__device__ __forceinline__ u32 atom_inc_acq_rel_gpu(u32* address, u32 last) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(last) : "memory");
  return before;
}

// A flag in shared memory, from one thread of the block to others.
__device__ __forceinline__ void st_relaxed_shared(u32 address, u32 value) {
  asm volatile("st.relaxed.cta.shared::cta.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ __forceinline__ u32 ld_relaxed_shared(u32 address) {
  u32 value;
  asm volatile("ld.relaxed.cta.shared::cta.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
// The same, and what was written or known before it.
__device__ __forceinline__ void st_release_shared(u32 address, u32 value) {
  asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ __forceinline__ u32 ld_acquire_shared(u32 address) {
  u32 value;
  asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// Of two threads that write, pass this and read what the other has written, at least one sees it.
__device__ __forceinline__ void fence_sc_gpu() { asm volatile("fence.sc.gpu;" ::: "memory"); }

// ---- proxies, register budgets, dependent grids --------------------------------------------------------------------

// Orders this thread's ordinary shared-memory accesses before later ones of the async proxy (WGMMA operands, TMA).
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <u32 kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <u32 kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Lets a dependent grid begin its prologue; it calls griddepcontrol_wait before it relies on our results.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Returns when every grid this one depends on has completed and its writes are visible.
__device__ __forceinline__ void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- copies ("Data Movement and Conversion Instructions: cp.async, cp.async.bulk.tensor") --------------------------

// 16 bytes from global to shared memory; the bytes past source_bytes (0 or 16) are filled with zeros.
__device__ __forceinline__ void cp_async_16(u32 destination, const void* source, u32 source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(source_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

struct alignas(64) TensorMap {
  u64 opaque[16];
};

__device__ __forceinline__ void prefetch_tensormap(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<u64>(map)) : "memory");
}

// Cache policies of L2 ("createpolicy"): for data that is read once and may leave first, and the usual one.
__device__ __forceinline__ u64 createpolicy_evict_first() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ u64 createpolicy_evict_normal() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// One box of a rank-5 tensor map into shared memory; the bytes are counted on `barrier`. Coordinates outside the
// tensor read as zeros.
__device__ __forceinline__ void cp_async_bulk_tensor_5d(u32 destination, const TensorMap* map, u32 barrier, i32 c0,
                                                        i32 c1, i32 c2, i32 c3, i32 c4, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(destination),
      "l"(reinterpret_cast<u64>(map)), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(policy)
      : "memory");
}

// The same into every CTA of `cta_mask`, at the same offset and counted on the barrier at the same offset of each.
__device__ __forceinline__ void cp_async_bulk_tensor_5d_multicast(u32 destination, const TensorMap* map, u32 barrier,
                                                                  i32 c0, i32 c1, i32 c2, i32 c3, i32 c4,
                                                                  u16 cta_mask) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(destination),
      "l"(reinterpret_cast<u64>(map)), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "h"(cta_mask)
      : "memory");
}

// Brings `bytes`, a multiple of 16, from global memory to L2.
__device__ __forceinline__ void cp_async_bulk_prefetch(const void* source, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

// ---- matrices in shared memory ("stmatrix") ------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void stmatrix_x4(u32 address, u32 r0, u32 r1, u32 r2, u32 r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

// The same with every matrix transposed: the addresses are those of its columns.
__device__ __forceinline__ void stmatrix_x4_trans(u32 address, u32 r0, u32 r1, u32 r2, u32 r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0),
               "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

__device__ __forceinline__ void stmatrix_x2_trans(u32 address, u32 r0, u32 r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r0), "r"(r1)
               : "memory");
}

__device__ __forceinline__ void st_shared_zero_16(u32 address) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0u) : "memory");
}

// ---- arithmetic ("ex2.approx, lg2.approx, rcp.approx, max.NaN, cvt, lop3, mad.wide") ------------------------------

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// NaN if either is.
__device__ __forceinline__ float max_nan(float x, float y) {
  float top;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(top) : "f"(x), "f"(y));
  return top;
}

__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// `low` lands in bits 0-15, as the element with the lower column.
template <typename Element>
__device__ __forceinline__ u32 cvt_pack(float low, float high) {
  u32 packed;
  if constexpr (kIsSame<Element, Bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// The inverse: two floats from packed elements.
template <typename Element>
__device__ __forceinline__ void cvt_unpack(u32 packed, float& low, float& high) {
  if constexpr (kIsSame<Element, Bf16>) {
    low = __uint_as_float(packed << 16);
    high = __uint_as_float(packed & 0xffff0000u);
  } else {
    asm("{\n .reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;\n}"
        : "=f"(low), "=f"(high)
        : "r"(packed));
  }
}

// Bits of `ones` where the mask has ones, else of `zeros` ("lop3"). In C++ it may become two instructions.
__device__ __forceinline__ u32 select_bits(u32 mask, u32 ones, u32 zeros) {
  u32 selected;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(selected) : "r"(mask), "r"(ones), "r"(zeros));
  return selected;
}

// An address, `count` times `bytes` after another. In C++ it is two instructions.
template <typename T>
__device__ __forceinline__ const T* bytes_after(const T* from, u32 bytes, u32 count) {
  const T* to;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(to) : "r"(bytes), "r"(count), "l"(from));
  return to;
}

// ---- WGMMA ("Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions") --------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns when at most kPending of this warp's committed groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Pins accumulators in program order: what reads or writes them cannot cross this point.
template <int kCount>
__device__ __forceinline__ void keep_order(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

#define MLA_ACC4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MLA_ACC16(i) MLA_ACC4(i), MLA_ACC4(i + 4), MLA_ACC4(i + 8), MLA_ACC4(i + 12)
#define MLA_ACC32(i) MLA_ACC16(i), MLA_ACC16(i + 16)
#define MLA_ACC8(i) MLA_ACC4(i), MLA_ACC4(i + 4)
#define MLA_ACC128 MLA_ACC32(0), MLA_ACC32(32), MLA_ACC32(64), MLA_ACC32(96)
#define MLA_REGS8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define MLA_REGS16 MLA_REGS8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define MLA_REGS32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MLA_REGS128 MLA_REGS32 "," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define MLA_WGMMA_M64N64K16_SS(TYPE)                                                                \
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n"                                       \
               " wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" MLA_REGS32 "},"    \
               " %32, %33, p, 1, 1, 0, 0;\n}"                                                       \
               : MLA_ACC32(0)                                                                       \
               : "l"(a), "l"(b), "r"(accumulate))

#define MLA_WGMMA_M64N256K16_SS(TYPE)                                                               \
  asm volatile("{\n wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" MLA_REGS128 "}," \
               " %128, %129, 1, 1, 1, 0, 1;\n}"                                                     \
               : MLA_ACC128                                                                         \
               : "l"(a), "l"(b))

#define MLA_WGMMA_M64N256K16_RS(TYPE)                                                               \
  asm volatile("{\n wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" MLA_REGS128 "}," \
               " {%128, %129, %130, %131}, %132, 1, 1, 1, 1;\n}"                                    \
               : MLA_ACC128                                                                         \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b))

// `N` accumulators follow the shape: 8 for n16, 16 for n32; the descriptors, the flag (`accumulate`) and the
// transposition of a come next.
#define MLA_WGMMA_M64K16_SS(SHAPE, TYPE, REGS, ACC, A, B, P, TRANSPOSED)                       \
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, " P ", 0;\n"                               \
               " wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" REGS "},"     \
               " " A ", " B ", p, 1, 1, " TRANSPOSED ", 0;\n}"                                 \
               : ACC                                                                           \
               : "l"(a), "l"(b), "r"(accumulate))
#define MLA_WGMMA_M64N16K16(TYPE, TRANSPOSED) \
  MLA_WGMMA_M64K16_SS("m64n16k16", TYPE, MLA_REGS8, MLA_ACC8(0), "%8", "%9", "%10", TRANSPOSED)
#define MLA_WGMMA_M64N32K16(TYPE, TRANSPOSED) \
  MLA_WGMMA_M64K16_SS("m64n32k16", TYPE, MLA_REGS16, MLA_ACC16(0), "%16", "%17", "%18", TRANSPOSED)

// d[64 x N] = a[64 x 16] * b[N x 16]^T, plus d if `accumulate`; a and b K-major in shared memory.
template <typename Element, int kAccumulators>
__device__ __forceinline__ void wgmma_m64k16_ss(float (&d)[kAccumulators], u64 a, u64 b, u32 accumulate) {
  static_assert(kAccumulators == 8 || kAccumulators == 16, "n16 and n32");
  if constexpr (kAccumulators == 8) {
    if constexpr (kIsSame<Element, Bf16>) {
      MLA_WGMMA_M64N16K16("bf16", "0");
    } else {
      MLA_WGMMA_M64N16K16("f16", "0");
    }
  } else {
    if constexpr (kIsSame<Element, Bf16>) {
      MLA_WGMMA_M64N32K16("bf16", "0");
    } else {
      MLA_WGMMA_M64N32K16("f16", "0");
    }
  }
}

// d[64 x N] += a[16 x 64]^T * b[N x 16]^T; a M-major, b K-major in shared memory.
template <typename Element, int kAccumulators>
__device__ __forceinline__ void wgmma_m64k16_ts(float (&d)[kAccumulators], u64 a, u64 b) {
  static_assert(kAccumulators == 8 || kAccumulators == 16, "n16 and n32");
  constexpr u32 accumulate = 1;
  if constexpr (kAccumulators == 8) {
    if constexpr (kIsSame<Element, Bf16>) {
      MLA_WGMMA_M64N16K16("bf16", "1");
    } else {
      MLA_WGMMA_M64N16K16("f16", "1");
    }
  } else {
    if constexpr (kIsSame<Element, Bf16>) {
      MLA_WGMMA_M64N32K16("bf16", "1");
    } else {
      MLA_WGMMA_M64N32K16("f16", "1");
    }
  }
}

// d[64 x 64] = a[64 x 16] * b[64 x 16]^T, plus d if `accumulate`; a and b K-major in shared memory.
template <typename Element>
__device__ __forceinline__ void wgmma_m64n64k16_ss(float (&d)[32], u64 a, u64 b, u32 accumulate) {
  if constexpr (kIsSame<Element, Bf16>) {
    MLA_WGMMA_M64N64K16_SS("bf16");
  } else {
    MLA_WGMMA_M64N64K16_SS("f16");
  }
}

// d[64 x 256] += a[64 x 16] * b[16 x 256]; a K-major, b N-major, both in shared memory.
template <typename Element>
__device__ __forceinline__ void wgmma_m64n256k16_ss(float (&d)[128], u64 a, u64 b) {
  if constexpr (kIsSame<Element, Bf16>) {
    MLA_WGMMA_M64N256K16_SS("bf16");
  } else {
    MLA_WGMMA_M64N256K16_SS("f16");
  }
}

// d[64 x 256] += a[64 x 16] * b[16 x 256]; a in registers, b N-major in shared memory.
template <typename Element>
__device__ __forceinline__ void wgmma_m64n256k16_rs(float (&d)[128], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
  if constexpr (kIsSame<Element, Bf16>) {
    MLA_WGMMA_M64N256K16_RS("bf16");
  } else {
    MLA_WGMMA_M64N256K16_RS("f16");
  }
}

#undef MLA_WGMMA_M64N64K16_SS
#undef MLA_WGMMA_M64N256K16_SS
#undef MLA_WGMMA_M64N256K16_RS
#undef MLA_WGMMA_M64N32K16
#undef MLA_WGMMA_M64N16K16
#undef MLA_WGMMA_M64K16_SS
#undef MLA_REGS128
#undef MLA_REGS32
#undef MLA_REGS16
#undef MLA_REGS8
#undef MLA_ACC128
#undef MLA_ACC32
#undef MLA_ACC16
#undef MLA_ACC8
#undef MLA_ACC4
