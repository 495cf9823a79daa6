// Kernels that start before the one in front of them has ended (programmatic dependent launch, CUDA
// programming guide; PTX ISA, griddepcontrol; compute capability 9.0 and later, plain launches
// before that).
//
// Rules of a kernel launched with LaunchOverlapped:
// 1. Every block calls WaitForPreviousKernel, and LetNextKernelStart only after it; but for blocks
//    that end at once, beside others. So when a kernel starts, all kernels in front of it but the
//    last have ended, and their results are visible.
//    One exception: RmsNorm in front of a product (rms_norm.h, LaunchNext::kAtOnce; folded_norm.h),
//    so what a product reads early may be nothing but weights.
// 2. Before WaitForPreviousKernel it writes no device memory, and reads only what the kernel right
//    in front of it does not write: weights, say, or the cache of earlier tokens.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/check.h"

namespace tidal {

// Returns when the kernel in front has ended and its writes are visible.
__device__ __forceinline__ void WaitForPreviousKernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// The next kernel may start as soon as all blocks of this one have called this or ended, and there
// is room for it.
__device__ __forceinline__ void LetNextKernelStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Whether the code of `kernel` that the current device runs was compiled for compute
// capability 9.0: only that has the instructions above, bulk copies and clusters. (A newer device
// may run older code.)
template <typename Kernel>
bool RunsHopperCode(Kernel* kernel) {
  cudaFuncAttributes compiled = {};
  TIDAL_CUDA_CHECK(cudaFuncGetAttributes(&compiled, kernel));
  return compiled.binaryVersion >= 90 && compiled.ptxVersion >= 90;
}

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;    // dynamic; above 48 KiB the caller has raised the kernel's limit
  unsigned cluster_size = 1;  // blocks along x that form a cluster
};

// Launches `kernel`, which keeps the rules above. `name` is for the error message.
template <typename... Params>
void LaunchOverlapped(const char* name, void (*kernel)(Params...), const LaunchShape& shape,
                      cudaStream_t stream, const std::type_identity_t<Params>&... args) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (RunsHopperCode(kernel)) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster_size > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {shape.cluster_size, 1, 1};
  }
  CheckCuda(cudaLaunchKernelEx(&config, kernel, args...), name, __FILE__, __LINE__);
}

}  // namespace tidal
