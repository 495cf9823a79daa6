// FoldedNorm: hidden states times norm weights, and the scale of each token's results.
#include "kernels/folded_norm.h"

#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "kernels/folded_norm.cuh"
#include "kernels/skinny_layout.h"

namespace tidal {
namespace {

constexpr int kThreads = kMultiplyWarps * kWarpSize;
constexpr int kChunksAtOnce = kWarpSize / 4;  // of a warp

// grid (T); a warp takes every 8th chunk of a token's hidden states, four lanes a chunk.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    FoldedNormKernel(const float* x, const T* weight, T* out, float* scales, int hidden_size,
                     float eps) {
  __shared__ float parts[kMultiplyWarps];
  LetNextKernelStart();
  // Into the L2 cache while the kernel in front still runs.
  constexpr int kLine = 128 / sizeof(T);
  for (int i = threadIdx.x * kLine; i < hidden_size; i += kThreads * kLine) {
    asm volatile("prefetch.global.L2 [%0];\n" ::"l"(weight + i));
  }
  WaitForPreviousKernel();
  int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, of_chunk = lane % 4;
  int64_t row = int64_t{blockIdx.x} * hidden_size;
  int num_chunks = hidden_size / kChunk / kMultiplyWarps;  // of a warp
  float total = 0.0f;
  for (int first = 0; first < num_chunks; first += kChunksAtOnce) {
    int index = first + lane / 4;
    float squares = 0.0f;
    if (index < num_chunks) {
      int begin = (index * kMultiplyWarps + warp) * kChunk + of_chunk * 8;
#pragma unroll
      for (int step = 0; step < kChunk / kStepInputs; ++step) {
        int i = begin + step * kStepInputs;
        FoldNorm(x + row + i, weight + i, out + row + i, squares);
      }
    }
    for (int chunk = 0; chunk < min(num_chunks - first, kChunksAtOnce); ++chunk) {
      total = __fadd_rn(total, __shfl_sync(kFullWarp, squares, chunk * 4 + of_chunk));
    }
  }
  total = AddSquaresOfLanes(total);
  if (lane == 0) parts[warp] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  float sum = 0.0f;
#pragma unroll
  for (int part = 0; part < kMultiplyWarps; ++part) sum = __fadd_rn(sum, parts[part]);
  scales[blockIdx.x] = NormScale(sum, hidden_size, eps);
}

}  // namespace

bool FoldsNorm(const RmsNormArgs& norm) {
  constexpr int64_t kEqualShares = int64_t{kChunk} * kMultiplyWarps;
  const int64_t hidden_size = norm.x.dim(1);
  // The products with the norm's weights are rounded before they are scaled: float16 could
  // overflow.
  return hidden_size % kEqualShares == 0 && norm.out.dtype == DType::kBFloat16 && norm.weight &&
         norm.weight.dtype == norm.out.dtype && IsVectorizable(norm.x, hidden_size, 4) &&
         IsVectorizable(norm.weight, hidden_size, 8) && IsVectorizable(norm.out, hidden_size, 8);
}

void LaunchFoldedNorm(const RmsNormArgs& norm, float* scales, cudaStream_t stream) {
  if (norm.x.dim(0) == 0) return;
  using T = __nv_bfloat16;
  LaunchOverlapped("rms_norm", FoldedNormKernel<T>,
                   {.grid = static_cast<unsigned>(norm.x.dim(0)), .block = kThreads}, stream,
                   norm.x.data<float>(), static_cast<const T*>(norm.weight.ptr),
                   static_cast<T*>(norm.out.ptr), scales, static_cast<int>(norm.x.dim(1)),
                   norm.eps);
}

}  // namespace tidal
