// GateRows: a token's row times sigmoid(x . weight), in float32, rounded once.
#include "kernels/gate_rows.h"

#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace tidal {
namespace {

constexpr int kThreads = 256;
constexpr int kVec = 8;

// grid (T); a block has a token.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    GateRowsKernel(const T* x, const T* weight, T* out, int64_t hidden_size, int64_t row_size) {
  __shared__ float warp_sums[kMaxWarps];
  WaitForPreviousKernel();
  LetNextKernelStart();
  const T* own = x + blockIdx.x * hidden_size;
  T* row = out + blockIdx.x * row_size;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x * kVec; i < hidden_size; i += kThreads * kVec) {
    float values[kVec], weights[kVec];
    LoadFloats<kVec>(own + i, values);
    LoadFloats<kVec>(weight + i, weights);
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum += values[j] * weights[j];
  }
  float gate = 1.0f / (1.0f + expf(-BlockSum(sum, warp_sums)));
  for (int64_t i = threadIdx.x * kVec; i < row_size; i += kThreads * kVec) {
    float values[kVec];
    LoadFloats<kVec>(row + i, values);
#pragma unroll
    for (int j = 0; j < kVec; ++j) values[j] *= gate;
    StoreFloats<kVec>(row + i, values);
  }
}

}  // namespace

void LaunchGateRows(const GateRowsArgs& args, cudaStream_t stream) {
  int64_t num_tokens = args.x.dim(0), hidden_size = args.x.dim(1), row_size = args.out.dim(1);
  if (num_tokens == 0) return;
  bool vectorize = IsVectorizable(args.x, hidden_size, kVec) &&
                   IsVectorizable(args.weight, hidden_size, kVec) &&
                   IsVectorizable(args.out, row_size, kVec);
  DispatchHalf(args.out.dtype, "gate_rows", [&](auto tag) {
    using T = typename decltype(tag)::Type;
    auto kernel = vectorize ? GateRowsKernel<T, kVec> : GateRowsKernel<T, 1>;
    LaunchOverlapped("gate_rows", kernel,
                     {.grid = static_cast<unsigned>(num_tokens), .block = kThreads}, stream,
                     static_cast<const T*>(args.x.ptr), static_cast<const T*>(args.weight.ptr),
                     static_cast<T*>(args.out.ptr), hidden_size, row_size);
  });
}

}  // namespace tidal
