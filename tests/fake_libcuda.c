/* The driver calls of mlacore/c/decode.c on the host: memory is the host's, and a launch computes its kernel's result in
 * a plain way from the parameters it is given. What was launched, with what, is written to the file FAKE_CUDA_LOG. */
#include <cuda.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "mlacore.h"

enum { MAP_MARK = 0x6d6170 };

static void record(const char *what, const void *bytes, size_t size) {
  FILE *file = fopen(getenv("FAKE_CUDA_LOG"), "a");
  fprintf(file, "%s ", what);
  for (size_t i = 0; i < size; ++i) fprintf(file, "%02x", ((const unsigned char *)bytes)[i]);
  fprintf(file, "\n");
  fclose(file);
}

CUresult cuInit(unsigned flags) { return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { (void)device; *context = NULL; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { (void)context; return CUDA_SUCCESS; }
CUresult cuCtxSynchronize(void) { return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  *value = 132;
  return attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGetErrorName(CUresult status, const char **name) {
  *name = status == CUDA_ERROR_FILE_NOT_FOUND ? "CUDA_ERROR_FILE_NOT_FOUND" : "CUDA_ERROR_INVALID_VALUE";
  return CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr *address, size_t bytes) {
  void *memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
  memset(memory, 0xff, bytes); /* NaN, or -1 */
  *address = (CUdeviceptr)(uintptr_t)memory;
  return bytes > 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes) {
  memcpy((void *)(uintptr_t)to, from, bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t bytes) {
  memcpy(to, (void *)(uintptr_t)from, bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemsetD8(CUdeviceptr to, unsigned char value, size_t bytes) {
  memset((void *)(uintptr_t)to, value, bytes);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoad(CUmodule *module, const char *path) {
  FILE *file = fopen(path, "rb");
  char magic[4] = "";
  if (file == NULL) return CUDA_ERROR_FILE_NOT_FOUND;
  const size_t got = fread(magic, 1, sizeof magic, file);
  fclose(file);
  *module = NULL;
  return got == 4 && memcmp(magic, "\177ELF", 4) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  (void)module;
  *function = (CUfunction)(void *)name; /* a string of the header's table, which stays */
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  (void)function, (void)value;
  return attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  (void)function;
  if (config->numAttrs != 1 || config->attrs->id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) return CUDA_ERROR_INVALID_VALUE;
  *clusters = 132 / (int)config->attrs->value.clusterDim.x;
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const int32_t layout[] = {(int32_t)type, (int32_t)rank, (int32_t)dims[0], (int32_t)dims[1], (int32_t)dims[2],
                            (int32_t)dims[3], (int32_t)dims[4], (int32_t)strides[0], (int32_t)strides[1],
                            (int32_t)strides[3], (int32_t)box[0], (int32_t)box[1], (int32_t)box[2], (int32_t)box[3],
                            (int32_t)box[4], (int32_t)steps[4], (int32_t)interleave, (int32_t)swizzle,
                            (int32_t)promotion, (int32_t)fill};
  record("tensor_map", layout, sizeof layout);
  memset(map, 0, sizeof *map);
  map->opaque[0] = (cuuint64_t)(uintptr_t)address;
  map->opaque[1] = MAP_MARK;
  return (uintptr_t)map % 64 == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static double as_double(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static void decode(const MlacoreDecodeParams *p, const uint16_t *kv) {
  const uint16_t *q = (const uint16_t *)(uintptr_t)p->q;
  const int32_t *table = (const int32_t *)(uintptr_t)p->block_table, *lengths = (const int32_t *)(uintptr_t)p->cache_seqlens;
  uint16_t *out = (uint16_t *)(uintptr_t)p->out;
  float *lse = (float *)(uintptr_t)p->lse;
  const int page_size = 1 << p->page_size_log2;
  for (int b = 0; b < p->batch; ++b) {
    for (int h = 0; h < p->num_heads; ++h) {
      const uint16_t *row_q = q + b * p->q_stride_batch + h * p->q_stride_head;
      double sum[512] = {0}, total = 0;
      for (int t = 0; t < lengths[b]; ++t) {
        const int32_t page = table[b * p->block_table_stride + t / page_size];
        const uint16_t *row = kv + page * p->kv_stride_page + t % page_size * 576;
        double score = 0;
        for (int i = 0; i < 576; ++i) score += as_double(row_q[i]) * as_double(row[i]);
        const double weight = exp2(score * p->softmax_scale_log2);
        total += weight;
        for (int i = 0; i < 512; ++i) sum[i] += weight * as_double(row[i]);
      }
      for (int i = 0; i < 512; ++i) {
        const float value = (float)(total > 0 ? sum[i] / total : 0);
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        out[((size_t)b * (size_t)p->num_heads + (size_t)h) * 512 + (size_t)i] = (uint16_t)((bits + 0x8000) >> 16);
      }
      lse[b * p->num_heads + h] = (float)log(total);
    }
  }
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  const char *name = (const char *)function;
  const uint32_t shape[] = {config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->sharedMemBytes};
  if (extra != NULL || config->numAttrs != 0) return CUDA_ERROR_INVALID_VALUE;
  record(name, shape, sizeof shape);
  if (strcmp(name, "mla_plan") == 0) {
    const MlacorePlanParams *params = arguments[0];
    record("PlanParams", params, sizeof *params);
    memset((void *)(uintptr_t)params->work, 1, ((size_t)params->num_workers + 1) * 8);
    return CUDA_SUCCESS;
  }
  const MlacoreDecodeParams *params = arguments[1];
  record("DecodeParams", params, sizeof *params);
  const CUtensorMap *map = arguments[0];
  const int is_planned = *(unsigned char *)(uintptr_t)params->work == 1;
  if (map->opaque[1] != MAP_MARK || !is_planned || *(uint32_t *)(uintptr_t)params->launches != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  decode(params, (const uint16_t *)(uintptr_t)map->opaque[0]);
  return CUDA_SUCCESS;
}
