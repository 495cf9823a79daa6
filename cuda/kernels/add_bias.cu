// Adds a 16-bit bias to the float32 output of a Linear: cuBLASLt's bias epilogue wants the bias in
// the dtype of the output (cublasLt.h, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE).
#include "kernels/add_bias.h"

#include "common/check.h"
#include "common/dispatch.h"
#include "common/vec.cuh"

namespace tidal {
namespace {

constexpr int kThreads = 256;

// grid (T); a block owns one row.
template <typename T>
__global__ void AddBiasKernel(const T* bias, float* out, int64_t num_columns) {
  float* row = out + blockIdx.x * num_columns;
  for (int64_t i = threadIdx.x; i < num_columns; i += kThreads) row[i] += ToFloat32(bias[i]);
}

}  // namespace

void LaunchAddBias(const TensorView& bias, const TensorView& out, cudaStream_t stream) {
  if (out.numel() == 0) return;
  DispatchHalf(bias.dtype, "linear", [&](auto tag) {
    using T = typename decltype(tag)::Type;
    AddBiasKernel<T><<<static_cast<unsigned>(out.dim(0)), kThreads, 0, stream>>>(
        static_cast<const T*>(bias.ptr), out.data<float>(), out.dim(1));
    TIDAL_LAUNCH_CHECK("add_bias");
  });
}

}  // namespace tidal
