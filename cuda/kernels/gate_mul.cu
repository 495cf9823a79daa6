// GateMul: the gate of the feed-forward network, in float32, rounded once.
#include "kernels/gate_mul.h"

#include <algorithm>

#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/elementwise.cuh"
#include "common/vec.cuh"

namespace tidal {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

// grid (ceil(I / (kThreads * kVec)), min(T, kMaxGridY)); a thread owns kVec columns of its rows.
template <typename T, int kVec>
__global__ void GateMulKernel(const T* gate_up, T* out, int64_t num_tokens,
                              int64_t intermediate_size, GateRule rule) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVec;
  if (column >= intermediate_size) return;
  for (int64_t row = blockIdx.y; row < num_tokens; row += gridDim.y) {
    float gate[kVec], up[kVec];
    LoadFloats<kVec>(gate_up + row * 2 * intermediate_size + column, gate);
    LoadFloats<kVec>(gate_up + (row * 2 + 1) * intermediate_size + column, up);
#pragma unroll
    for (int i = 0; i < kVec; ++i) gate[i] = ActivationTimes(rule, gate[i], up[i]);
    StoreFloats<kVec>(out + row * intermediate_size + column, gate);
  }
}

}  // namespace

void LaunchGateMul(const GateMulArgs& args, cudaStream_t stream) {
  int64_t num_tokens = args.out.dim(0), intermediate_size = args.out.dim(1);
  if (num_tokens == 0) return;
  bool vectorize = IsVectorizable(args.gate_up, intermediate_size, 8) &&
                   IsVectorizable(args.out, intermediate_size, 8);
  DispatchHalf(args.out.dtype, "gate_mul", [&](auto tag) {
    using T = typename decltype(tag)::Type;
    auto kernel = vectorize ? GateMulKernel<T, 8> : GateMulKernel<T, 1>;
    int64_t blocks = CeilDiv(intermediate_size, kThreads * (vectorize ? 8 : 1));
    dim3 grid(static_cast<unsigned>(blocks),
              static_cast<unsigned>(std::min(num_tokens, kMaxGridY)));
    LaunchOverlapped("gate_mul", kernel, {.grid = grid, .block = kThreads}, stream,
                     static_cast<const T*>(args.gate_up.ptr), static_cast<T*>(args.out.ptr),
                     num_tokens, intermediate_size, RuleOf(args));
  });
}

}  // namespace tidal
