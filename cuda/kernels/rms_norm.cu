// RmsNorm: x / sqrt(mean(x^2) + eps) * weight, or x without a weight, in float32, rounded once or
// added to float32.
#include "kernels/rms_norm.h"

#include <type_traits>

#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace tidal {
namespace {

constexpr int kThreads = 512;

// grid (T); a block normalises one row. The row is read twice, the second time from the L1 cache.
// With Out float what comes out is added to it.
template <typename W, typename Out, int kVec>
__global__ void __launch_bounds__(kThreads)
    RmsNormKernel(const float* x, const W* weight, Out* out, int64_t hidden_size, float eps,
                  LaunchNext launch_next) {
  __shared__ float warp_sums[kMaxWarps];
  if (launch_next == LaunchNext::kAtOnce) LetNextKernelStart();
  // Into the L2 cache while the kernel in front still runs.
  constexpr int kLine = 128 / sizeof(W);
  for (int64_t i = threadIdx.x * kLine; weight && i < hidden_size; i += kThreads * kLine) {
    asm volatile("prefetch.global.L2 [%0];\n" ::"l"(weight + i));
  }
  WaitForPreviousKernel();
  if (launch_next == LaunchNext::kAfterWait) LetNextKernelStart();
  const float* row = x + blockIdx.x * hidden_size;
  Out* out_row = out + blockIdx.x * hidden_size;

  float sum = 0.0f;
#pragma unroll 4
  for (int64_t i = threadIdx.x * kVec; i < hidden_size; i += kThreads * kVec) {
    float values[kVec];
    LoadFloats<kVec>(row + i, values);
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum += values[j] * values[j];
  }
  sum = BlockSum(sum, warp_sums);
  float scale = 1.0f / sqrtf(sum / static_cast<float>(hidden_size) + eps);

#pragma unroll 4
  for (int64_t i = threadIdx.x * kVec; i < hidden_size; i += kThreads * kVec) {
    float values[kVec], weights[kVec];
    LoadFloats<kVec>(row + i, values);
    if (weight) {
      LoadFloats<kVec>(weight + i, weights);
#pragma unroll
      for (int j = 0; j < kVec; ++j) values[j] *= scale * weights[j];
    }
    if constexpr (std::is_same_v<Out, float>) {
      float sums[kVec];
      LoadFloats<kVec>(out_row + i, sums);
#pragma unroll
      for (int j = 0; j < kVec; ++j) values[j] += sums[j];
    }
    StoreFloats<kVec>(out_row + i, values);
  }
}

}  // namespace

void LaunchRmsNorm(const RmsNormArgs& args, LaunchNext launch_next, cudaStream_t stream) {
  int64_t num_tokens = args.x.dim(0), hidden_size = args.x.dim(1);
  if (num_tokens == 0) return;
  bool vectorize = IsVectorizable(args.x, hidden_size, 4) &&
                   IsVectorizable(args.weight, hidden_size, 4) &&
                   IsVectorizable(args.out, hidden_size, 4);
  auto launch = [&](auto* weight, auto* out) {
    using W = std::remove_const_t<std::remove_pointer_t<decltype(weight)>>;
    using Out = std::remove_pointer_t<decltype(out)>;
    auto kernel = vectorize ? RmsNormKernel<W, Out, 4> : RmsNormKernel<W, Out, 1>;
    LaunchOverlapped("rms_norm", kernel,
                     {.grid = static_cast<unsigned>(num_tokens), .block = kThreads}, stream,
                     args.x.data<float>(), weight, out, hidden_size, args.eps, launch_next);
  };
  auto launch_for = [&](auto* out) {
    if (!args.weight || args.weight.dtype == DType::kFloat32) {
      launch(static_cast<const float*>(args.weight.ptr), out);
      return;
    }
    DispatchHalf(args.weight.dtype, "rms_norm", [&](auto tag) {
      launch(static_cast<const typename decltype(tag)::Type*>(args.weight.ptr), out);
    });
  };
  if (args.adds) {
    launch_for(args.out.data<float>());
    return;
  }
  DispatchHalf(args.out.dtype, "rms_norm", [&](auto tag) {
    launch_for(static_cast<typename decltype(tag)::Type*>(args.out.ptr));
  });
}

}  // namespace tidal
