/* Paged MLA decode from C11 with the CUDA driver alone: plans and attends on the first GPU, and checks the result
 * against a plain loop in double.
 *
 *   cc -std=c11 -O2 decode.c -o decode -l:libcuda.so.1 -lm      (cuda.h: -I, from the toolkit or a pip package)
 *   ./decode . [BATCH HEADS TOKENS [FILE]]                       (FILE: inputs and results, raw, for other checks)
 */
#include <cuda.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "mlacore.h"

enum { PAGE_SIZE = 64, ROW = MLACORE_HEAD_DIM_QK, WIDTH = MLACORE_HEAD_DIM_V };
static const double ERROR_LIMIT = 5e-3; /* relative L2; rounding the output to bfloat16 alone gives 1.7e-3 */

static void check(CUresult status, const char *what) {
  const char *name = "unknown";
  if (status == CUDA_SUCCESS) return;
  cuGetErrorName(status, &name);
  fprintf(stderr, "%s failed: %s\n", what, name);
  exit(1);
}
#define CHECK(call) check(call, #call)

static void *allocate(size_t count, size_t size) {
  void *memory = calloc(count, size);
  if (memory == NULL) {
    fprintf(stderr, "out of memory\n");
    exit(1);
  }
  return memory;
}

/* ---- bfloat16 and made-up values ----------------------------------------------------------------------------------- */

static uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* nearest even; value is finite */
}

static double from_bfloat16(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static double uniform(void) {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (double)(state >> 11) / 9007199254740992.0;
}

static void fill(uint16_t *values, size_t count) { /* nearly normal, deviation 1 */
  for (size_t i = 0; i < count; ++i) {
    double sum = -2;
    for (int term = 0; term < 4; ++term) sum += uniform();
    values[i] = to_bfloat16((float)(sum * sqrt(3.0)));
  }
}

/* ---- device -------------------------------------------------------------------------------------------------------- */

static CUdeviceptr on_device(const void *values, size_t bytes) { /* a copy of the values, or zeros */
  CUdeviceptr address;
  CHECK(cuMemAlloc(&address, bytes));
  if (values == NULL) {
    CHECK(cuMemsetD8(address, 0, bytes));
  } else {
    CHECK(cuMemcpyHtoD(address, values, bytes));
  }
  return address;
}

static CUfunction load(const char *folder, const MlacoreKernel *kernel) {
  char path[4096];
  CUmodule module;
  CUfunction function;
  if (kernel == NULL || snprintf(path, sizeof path, "%s/%s.cubin", folder, kernel->name) >= (int)sizeof path) {
    fprintf(stderr, "no such kernel, or too long a path\n");
    exit(1);
  }
  check(cuModuleLoad(&module, path), path);
  CHECK(cuModuleGetFunction(&function, module, kernel->function));
  if (kernel->shared_bytes > 0) {
    CHECK(cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel->shared_bytes));
  }
  return function;
}

static int resident_ctas(CUfunction function, const MlacoreKernel *kernel, int num_sms) {
  CUlaunchAttribute cluster = {.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION};
  cluster.value.clusterDim.x = (unsigned)kernel->cluster_ctas;
  cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1;
  const CUlaunchConfig config = {.gridDimX = (unsigned)kernel->cluster_ctas, .gridDimY = 1, .gridDimZ = (unsigned)num_sms,
                                 .blockDimX = (unsigned)kernel->threads, .blockDimY = 1, .blockDimZ = 1,
                                 .sharedMemBytes = (unsigned)kernel->shared_bytes, .attrs = &cluster, .numAttrs = 1};
  int clusters = 0;
  CHECK(cuOccupancyMaxActiveClusters(&clusters, function, &config));
  return clusters * kernel->cluster_ctas;
}

static CUtensorMap pool_map(CUdeviceptr pool, MlacoreShape shape, int num_pages) {
  enum { CHUNK = MLACORE_CHUNK_COLUMNS };
  const cuuint64_t dims[5] = {CHUNK, PAGE_SIZE, ROW / CHUNK, 1, (cuuint64_t)num_pages}; /* innermost first */
  const cuuint64_t strides_bytes[4] = {ROW * 2, CHUNK * 2, ROW * 2, (cuuint64_t)PAGE_SIZE * ROW * 2};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  cuuint32_t box[5];
  CUtensorMap map;
  mlacore_box(shape, PAGE_SIZE, box);
  CHECK(cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, (void *)(uintptr_t)pool, dims, strides_bytes,
                               box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

static void launch(CUfunction function, const MlacoreKernel *kernel, const int grid[3], void **arguments) {
  /* Programmatic stream serialization may be added as an attribute: the decode kernels wait for what they rely on. */
  const CUlaunchConfig config = {.gridDimX = (unsigned)grid[0], .gridDimY = (unsigned)grid[1],
                                 .gridDimZ = (unsigned)grid[2], .blockDimX = (unsigned)kernel->threads, .blockDimY = 1,
                                 .blockDimZ = 1, .sharedMemBytes = (unsigned)kernel->shared_bytes};
  CHECK(cuLaunchKernelEx(&config, function, arguments, NULL));
}

/* ---- the definition, in double ------------------------------------------------------------------------------------- */

static double attend(const uint16_t *q, const uint16_t *pool, const int32_t *pages, int length, double *out) {
  double *scores = allocate((size_t)length + 1, sizeof *scores), largest = -INFINITY, total = 0;
  for (int t = 0; t < length; ++t) {
    const uint16_t *row = pool + ((size_t)pages[t / PAGE_SIZE] * PAGE_SIZE + (size_t)(t % PAGE_SIZE)) * ROW;
    for (int i = 0; i < ROW; ++i) scores[t] += from_bfloat16(q[i]) * from_bfloat16(row[i]);
    scores[t] /= sqrt(ROW);
    if (scores[t] > largest) largest = scores[t];
  }
  for (int i = 0; i < WIDTH; ++i) out[i] = 0;
  for (int t = 0; t < length; ++t) {
    const uint16_t *row = pool + ((size_t)pages[t / PAGE_SIZE] * PAGE_SIZE + (size_t)(t % PAGE_SIZE)) * ROW;
    const double weight = exp(scores[t] - largest);
    total += weight;
    for (int i = 0; i < WIDTH; ++i) out[i] += weight * from_bfloat16(row[i]);
  }
  for (int i = 0; i < WIDTH && total > 0; ++i) out[i] /= total;
  free(scores);
  return largest + log(total);
}

/* ---- one decode call ----------------------------------------------------------------------------------------------- */

int main(int argc, char **argv) {
  const char *folder = argc > 1 ? argv[1] : ".";
  const int batch = argc > 4 ? atoi(argv[2]) : 4, heads = argc > 4 ? atoi(argv[3]) : 16;
  const int tokens = argc > 4 ? atoi(argv[4]) : 1000;
  if (argc > 6 || argc == 3 || argc == 4 || batch < 1 || heads < 1 || tokens < 1) {
    fprintf(stderr, "usage: %s [FOLDER [BATCH HEADS TOKENS [FILE]]], counts of at least 1\n", argv[0]);
    return 2;
  }

  /* Inputs: sequences of different lengths, their pages from the pool's end. */
  const int max_pages = (tokens + PAGE_SIZE - 1) / PAGE_SIZE;
  int32_t *lengths = allocate((size_t)batch, sizeof *lengths);
  int32_t *table = allocate((size_t)batch * (size_t)max_pages, sizeof *table);
  int num_pages = 0;
  for (int b = 0; b < batch; ++b) {
    lengths[b] = (int32_t)((int64_t)tokens * (b + 1) / batch);
    num_pages += (lengths[b] + PAGE_SIZE - 1) / PAGE_SIZE;
  }
  for (int b = 0, next = num_pages; b < batch; ++b) {
    for (int page = 0; page < max_pages; ++page) {
      table[b * max_pages + page] = page * PAGE_SIZE < lengths[b] ? --next : -1;
    }
  }
  const size_t rows = (size_t)batch * (size_t)heads, pool_elems = (size_t)num_pages * PAGE_SIZE * ROW;
  uint16_t *q = allocate(rows * ROW, sizeof *q), *pool = allocate(pool_elems, sizeof *pool);
  uint16_t *out = allocate(rows * WIDTH, sizeof *out);
  float *lse = allocate(rows, sizeof *lse);
  fill(q, rows * ROW);
  fill(pool, pool_elems);

  CUdevice device;
  CUcontext context;
  int num_sms;
  CHECK(cuInit(0));
  CHECK(cuDeviceGet(&device, 0));
  CHECK(cuDevicePrimaryCtxRetain(&context, device));
  CHECK(cuCtxSetCurrent(context));
  CHECK(cuDeviceGetAttribute(&num_sms, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device));

  /* The kernel for this many query rows, and workers that fill the GPU with it. */
  const MlacoreShape shape = mlacore_choose(heads, batch, tokens);
  char name[128];
  snprintf(name, sizeof name, "%s.bfloat16.rows%d.cluster%d",
           shape.tile_rows == MLACORE_TILE_ROWS ? "mla_decode_sm90" : "mla_decode_swapped_sm90", shape.tile_rows,
           shape.cluster_ctas);
  const MlacoreKernel *decode = mlacore_kernel(name), *plan = mlacore_kernel("mla_plan");
  CUfunction decode_function = load(folder, decode), plan_function = load(folder, plan);
  const int resident = resident_ctas(decode_function, decode, num_sms);
  const int num_workers = resident / shape.row_blocks > 1 ? resident / shape.row_blocks : 1;
  const MlacoreScratch scratch = mlacore_scratch(shape, batch, num_workers, 1);

  const MlacoreDecodeParams params = {
      .q = on_device(q, rows * ROW * sizeof *q),
      .kv = on_device(pool, pool_elems * sizeof *pool),
      .block_table = on_device(table, (size_t)batch * (size_t)max_pages * sizeof *table),
      .cache_seqlens = on_device(lengths, (size_t)batch * sizeof *lengths),
      .work = on_device(NULL, scratch.work),
      .splits = on_device(NULL, scratch.splits),
      .out = on_device(NULL, rows * WIDTH * sizeof *out),
      .lse = on_device(NULL, rows * sizeof *lse),
      .partial_out = on_device(NULL, scratch.partial_out),
      .partial_lse = on_device(NULL, scratch.partial_lse),
      .merge_counters = on_device(NULL, scratch.merge_counters),
      .merge_abandoned = on_device(NULL, scratch.merge_abandoned),
      .launches = on_device(NULL, scratch.launches),
      .q_stride_batch = (int64_t)heads * ROW,
      .q_stride_seq = (int64_t)heads * ROW,
      .q_stride_head = ROW,
      .block_table_stride = max_pages,
      .kv_stride_page = PAGE_SIZE * ROW,
      .num_pages = num_pages,
      .prefetches_next = mlacore_prefetches_next(shape, PAGE_SIZE, 1),
      .prefetches_first = mlacore_prefetches_first(shape, 1),
      .batch = batch,
      .max_pages = max_pages,
      .seq_len_q = 1,
      .num_heads = heads,
      .num_kv_heads = 1,
      .heads_per_kv = heads,
      .row_blocks = shape.row_blocks,
      .blocks_per_worker = shape.row_blocks,
      .page_size_log2 = 6,
      .causal = 0,
      .merge_patience_cycles = mlacore_merge_patience(shape, num_workers, 1, resident),
      .softmax_scale_log2 = (float)(1 / sqrt(ROW) * 1.4426950408889634),
  };
  const MlacorePlanParams plan_params = {
      .cache_seqlens = params.cache_seqlens,
      .work = params.work,
      .splits = params.splits,
      .batch = batch,
      .num_workers = num_workers,
      .max_splits = 0,
  };
  CUtensorMap map = pool_map(params.kv, shape, num_pages);

  /* A step: plan once, then decode in every layer with its own pool and tensor map. */
  launch(plan_function, plan, (int[3]){1, 1, 1}, (void *[]){(void *)&plan_params});
  launch(decode_function, decode, (int[3]){shape.row_blocks, 1, num_workers}, (void *[]){&map, (void *)&params});
  CHECK(cuCtxSynchronize());
  CHECK(cuMemcpyDtoH(out, params.out, rows * WIDTH * sizeof *out));
  CHECK(cuMemcpyDtoH(lse, params.lse, rows * sizeof *lse));

  double exact[WIDTH], error = 0, norm = 0, lse_error = 0;
  for (size_t row = 0; row < rows; ++row) {
    const size_t b = row / (size_t)heads;
    const double exact_lse = attend(q + row * ROW, pool, table + b * (size_t)max_pages, lengths[b], exact);
    if (lengths[b] > 0) lse_error = fmax(lse_error, isfinite(lse[row]) ? fabs(lse[row] - exact_lse) : INFINITY);
    for (int i = 0; i < WIDTH; ++i) {
      error += pow(from_bfloat16(out[row * WIDTH + (size_t)i]) - exact[i], 2);
      norm += exact[i] * exact[i];
    }
  }
  error = sqrt(error / norm);
  const int passes = error < ERROR_LIMIT && lse_error < 1e-4;
  printf("%s, %d workers, %d sequences of up to %d tokens, %d heads\n", name, num_workers, batch, tokens, heads);
  printf("relative L2 error %.2e, largest lse error %.1e against double: %s\n", error, lse_error,
         passes ? "passed" : "FAILED");

  if (argc > 5) {
    const struct { const void *values; size_t bytes; } parts[] = {
        {q, rows * ROW * sizeof *q}, {pool, pool_elems * sizeof *pool},
        {table, (size_t)batch * (size_t)max_pages * sizeof *table}, {lengths, (size_t)batch * sizeof *lengths},
        {out, rows * WIDTH * sizeof *out}, {lse, rows * sizeof *lse}};
    FILE *file = fopen(argv[5], "wb");
    for (size_t part = 0; file != NULL && part < sizeof parts / sizeof *parts; ++part) {
      if (fwrite(parts[part].values, 1, parts[part].bytes, file) != parts[part].bytes) break;
    }
    if (file == NULL || ferror(file) || fclose(file) != 0) {
      fprintf(stderr, "cannot write %s\n", argv[5]);
      return 1;
    }
  }
  return passes ? 0 : 1; /* the driver frees what this process held */
}
