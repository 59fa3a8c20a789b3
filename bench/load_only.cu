// load_only: the floor under any decode. Persistent CTAs of one working thread stream whole pages from global to
// shared memory, exactly the pages that a decode of the same batch reads, and do nothing with them.
//
//   grid     min(SMs, entries) CTAs, 32 threads (one issues)
//   entry    an index into the flattened block table; CTA c takes entries c, c + grid, c + 2·grid, ...
//   ring     kStages pages of 73,728 bytes, one mbarrier each; a stage is free again once its own copy has landed
//
// PTX ISA: cp.async.bulk, mbarrier.init / arrive.expect_tx / try_wait.

constexpr int kPageBytes = 64 * 576 * 2;
constexpr unsigned kStages = 3;

struct SharedPlan {
    alignas(128) unsigned char pages[kStages][kPageBytes];
    unsigned long long landed[kStages];
};
static_assert(sizeof(SharedPlan) <= 232448, "more than a Hopper SM's shared memory");

__device__ __forceinline__ unsigned shared_address(const void *pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void mbarrier_wait(unsigned barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra WAIT_%=;\n"
        "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void load_page(unsigned target, const unsigned char *source, unsigned barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(kPageBytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
                 "l"(source), "r"(kPageBytes), "r"(barrier)
                 : "memory");
}

// pool [pages, page_stride_bytes]; block_table int32, flattened; entries int32 [num_entries]
extern "C" __global__ void __launch_bounds__(32) load_only(const unsigned char *__restrict__ pool,
                                                            const int *__restrict__ block_table,
                                                            const int *__restrict__ entries, int num_entries,
                                                            long long page_stride_bytes) {
    extern __shared__ unsigned char shared_bytes[];
    SharedPlan &plan = *reinterpret_cast<SharedPlan *>(shared_bytes);
    if (threadIdx.x != 0) return;

    for (unsigned stage = 0; stage < kStages; ++stage)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&plan.landed[stage])) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // the copies' async proxy must see the init

    const auto wait_for = [&](unsigned nth) {  // until this CTA's nth page has landed
        mbarrier_wait(shared_address(&plan.landed[nth % kStages]), nth / kStages & 1);
    };
    unsigned nth = 0;
    for (int entry = blockIdx.x; entry < num_entries; entry += gridDim.x, ++nth) {
        const long long page = block_table[entries[entry]];
        if (nth >= kStages) wait_for(nth - kStages);
        load_page(shared_address(plan.pages[nth % kStages]), pool + page * page_stride_bytes,
                  shared_address(&plan.landed[nth % kStages]));
    }
    // A CTA must not exit with copies into its shared memory under way.
    for (unsigned left = nth < kStages ? nth : kStages; left > 0; --left) wait_for(nth - left);
}
