// Brings block table, lengths and limits up to date for one step of short changes, and says where its new tokens go.
//
// The changes come by value, in the launch itself: a step costs the host one launch, with no copy to the device and no
// buffer that must outlive it. Their format is that of mlacore/block_tables.py, field by field:
//
//   seq | length | tokens | slots_at | num_pages | pages_at     (num_changes words each), then the new pages
//
// Grid: x = groups of kUpdateRows changes, one warp each, whose lanes stride over the change's pages and tokens.
#include "params.cuh"
#include "types.cuh"

constexpr u32 kUpdateRows = MLA_UPDATE_ROWS;
constexpr u32 kChangeWords = MLA_CHANGE_WORDS;
static_assert(4 * kChangeWords % alignof(UpdateParams) == 0);
static_assert(sizeof(UpdateParams) + 4 * kChangeWords <= 32764, "a launch takes no more parameters (since CUDA 12.1)");

enum Field : u32 { kSeq, kLength, kTokens, kSlotsAt, kNumPages, kPagesAt };

struct ChangeWords {
  i32 words[kChangeWords];
};

extern "C" __global__ void __launch_bounds__(kUpdateRows* kWarpThreads)
    cache_update(const __grid_constant__ ChangeWords changes, const __grid_constant__ UpdateParams params) {
  const i32 lane = i32(threadIdx.x % kWarpThreads);
  const u32 change = blockIdx.x * kUpdateRows + threadIdx.x / kWarpThreads;
  if (change >= u32(params.num_changes)) return;
  const auto field = [&](u32 index) { return changes.words[index * u32(params.num_changes) + change]; };

  const i32 seq = field(kSeq), length = field(kLength), tokens = field(kTokens);
  const i32 num_pages = field(kNumPages);
  const i32* pages = changes.words + field(kPagesAt);
  const i64 end = tokens < 0 ? i64(length) - tokens : length;  // how far the row's pages reach
  const i32 page_size = 1 << params.page_size_log2;
  const i32 first_column = i32((end + page_size - 1) >> params.page_size_log2) - num_pages;
  i32* row = params.block_table + seq * params.block_table_stride;

  if (lane == 0) {
    params.cache_seqlens[seq] = length;
    params.limits[seq] = tokens < 0 ? i32(end) : 0;
  }
  for (i32 nth = lane; nth < num_pages; nth += kWarpThreads) row[first_column + nth] = pages[nth];
  for (i32 nth = lane; nth < tokens; nth += kWarpThreads) {
    const i32 position = length - tokens + nth;
    const i32 column = position >> params.page_size_log2;
    // A new page is read from the change: its lane may not have put it into the table yet.
    const i32 page = column >= first_column ? pages[column - first_column] : row[column];
    const i64 at = i64(field(kSlotsAt)) + nth;
    params.where[at] = (i64(page) << params.page_size_log2) + (position & (page_size - 1));
    params.where[params.num_tokens + at] = position;
  }
}
