// Copies whole pages within a pool, in all layers: copy-on-write and compaction. No page is both read and written.
//
// Grid: x = copies times layers; y = shares of a page, whose threads stride over its 16-byte cells.
#include "params.cuh"
#include "types.cuh"

constexpr u32 kCopyThreads = MLA_COPY_THREADS;
constexpr i64 kCellElems = 8;

extern "C" __global__ void __launch_bounds__(kCopyThreads) cache_copy(const __grid_constant__ CopyParams params) {
  const i64 copy = blockIdx.x / u32(params.num_layers), layer = blockIdx.x % u32(params.num_layers);
  const i32 from = params.pages[2 * copy], to = params.pages[2 * copy + 1];
  if (from < 0 || from >= params.num_pages || to < 0 || to >= params.num_pages) return;
  u16* base = params.pool + layer * params.pool_stride_layer;
  const uint4* __restrict__ source = reinterpret_cast<const uint4*>(base + from * params.pool_stride_page);
  uint4* __restrict__ target = reinterpret_cast<uint4*>(base + to * params.pool_stride_page);
  const i64 num_cells = params.page_elems / kCellElems;
#pragma unroll 4
  for (i64 cell = i64(blockIdx.y) * kCopyThreads + threadIdx.x; cell < num_cells;
       cell += i64(gridDim.y) * kCopyThreads) {
    target[cell] = source[cell];
  }
}
