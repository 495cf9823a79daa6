// Copies of boxes of a tensor from global to shared memory by the copy engine (PTX ISA,
// cp.async.bulk.tensor; CUDA driver API, tensor maps; compute capability 9.0 and later).
//
// What of a box lies outside the tensor becomes zeros, and counts as copied. Rows of a box are at
// most 128 bytes. Those of 128 are swizzled, eight rows alike: the 16 bytes of column c lie at
// column c ^ row (as a panel of common/warpgroup_mma.cuh).
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

// One lane of a warp whose lanes are all here. The compiler knows that it is one, and the engine's
// instructions take their operands from the warp.
__device__ __forceinline__ bool IsElected() {
  uint32_t is_elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(is_elected));
  return is_elected != 0;
}

// One arrival, and `bytes` of copies that have to come as well before the phase can end. Before
// these copies are started.
__device__ __forceinline__ void ArriveExpecting(SharedBarrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}

// One arrival, when this thread's asynchronous copies (common/async_copy.cuh) so far have landed.
__device__ __forceinline__ void ArriveWithCopies(SharedBarrier* barrier) {
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(SharedAddress(barrier))
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

// By one thread: starts the copy of the box at these coordinates, innermost first; of a matrix
// under an L2 policy.
__device__ __forceinline__ void CopyBox(void* shared, const CUtensorMap* map,
                                        SharedBarrier* barrier, int x, int y, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;\n" ::"r"(SharedAddress(shared)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(x), "r"(y), "l"(policy)
      : "memory");
}
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

inline constexpr size_t kSwizzledRowBytes = 128;  // of a box

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
  constexpr auto kType = std::is_same_v<T, uint8_t>         ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                         : std::is_same_v<T, __nv_bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  bool is_swizzled = box[0] * sizeof(T) == kSwizzledRowBytes;
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
      encode(&map, kType, kRank, const_cast<void*>(memory), dims.data(), strides.data(),
             boxes.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
             is_swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TIDAL_CHECK(status == CUDA_SUCCESS, BackendError, "CUDA: cuTensorMapEncodeTiled: error ",
              static_cast<int>(status), " for a tensor of ", shape[kRank - 1], " x ",
              shape[kRank - 2], kRank > 2 ? " x ..." : "");
  return map;
}

}  // namespace tidal
