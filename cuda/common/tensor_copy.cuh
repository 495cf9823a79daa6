// Copies of boxes of a tensor from global to shared memory by the copy engine (PTX ISA,
// cp.async.bulk.tensor; CUDA driver API, tensor maps; compute capability 9.0 and later).
//
// A box is a panel of common/warpgroup_mma.cuh: rows of 64 elements, swizzled. What of it lies
// outside the tensor becomes zeros, and counts as copied.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>

#include "common/check.h"
#include "common/shared_barrier.cuh"
#include "tidal/error.h"

namespace tidal {

// One arrival, and `bytes` of copies that have to come as well before the phase can end. Before
// these copies are started.
__device__ __forceinline__ void ArriveExpecting(SharedBarrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}

// Makes barriers that this thread has initialised known to the copy engine.
__device__ __forceinline__ void PublishBarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// Orders this thread's ordinary accesses to shared memory before those of the copy engine and of
// the tensor cores that follow a barrier.
__device__ __forceinline__ void PublishSharedWrites() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// By one thread: starts the copy of the box at these coordinates, innermost first.
__device__ __forceinline__ void CopyBox(void* shared, const CUtensorMap* map,
                                        SharedBarrier* barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];\n" ::"r"(SharedAddress(shared)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ __forceinline__ void CopyBox(void* shared, const CUtensorMap* map,
                                        SharedBarrier* barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(SharedAddress(shared)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// The driver's function, found at run time: nothing of ours links the driver.
inline decltype(&cuTensorMapEncodeTiled) FindTensorMapEncode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = {};
  constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  constexpr unsigned kFirstVersion = 12000;
  TIDAL_CUDA_CHECK(cudaGetDriverEntryPointByVersion(kName, &function, kFirstVersion,
                                                    cudaEnableDefault, &result));
#else
  TIDAL_CUDA_CHECK(cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &result));
#endif
  TIDAL_CHECK(result == cudaDriverEntryPointSuccess && function != nullptr, BackendError,
              "CUDA: the driver has no ", kName, "; update it (12.0 or newer)");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// The map of a dense row-major tensor of T, for boxes of `box` elements; dimensions innermost
// first. `memory` is a multiple of 16; rows are multiples of 16 bytes.
template <typename T, size_t kRank>
CUtensorMap MakeTensorMap(decltype(&cuTensorMapEncodeTiled) encode, const void* memory,
                          const std::array<uint64_t, kRank>& shape,
                          const std::array<uint32_t, kRank>& box) {
  constexpr bool kIsBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  std::array<cuuint64_t, kRank> dims = {}, strides = {};  // strides: all but the innermost
  std::array<cuuint32_t, kRank> boxes = {}, steps = {};
  uint64_t bytes = sizeof(T);
  for (size_t i = 0; i < kRank; ++i) {
    dims[i] = shape[i];
    bytes *= shape[i];
    strides[i] = bytes;
    boxes[i] = box[i];
    steps[i] = 1;
  }
  CUtensorMap map;
  CUresult status =
      encode(&map, kIsBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             kRank, const_cast<void*>(memory), dims.data(), strides.data(), boxes.data(),
             steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TIDAL_CHECK(status == CUDA_SUCCESS, BackendError, "CUDA: cuTensorMapEncodeTiled: error ",
              static_cast<int>(status), " for a tensor of ", shape[kRank - 1], " x ",
              shape[kRank - 2], " x ...");
  return map;
}

}  // namespace tidal
