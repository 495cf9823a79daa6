// GatherRows: copies the rows of the residual stream whose logits are wanted.
#include "kernels/gather_rows.h"

#include "common/check.h"
#include "common/dispatch.h"
#include "common/vec.cuh"

namespace tidal {
namespace {

constexpr int kThreads = 256;

// grid (R); a block copies one row.
template <int kVec>
__global__ void GatherRowsKernel(const float* x, const int32_t* rows, float* out,
                                 int64_t hidden_size) {
  const float* source = x + rows[blockIdx.x] * hidden_size;
  float* destination = out + blockIdx.x * hidden_size;
  for (int64_t i = threadIdx.x * kVec; i < hidden_size; i += kThreads * kVec) {
    float values[kVec];
    LoadFloats<kVec>(source + i, values);
    StoreFloats<kVec>(destination + i, values);
  }
}

}  // namespace

void LaunchGatherRows(const GatherRowsArgs& args, cudaStream_t stream) {
  int64_t num_rows = args.out.dim(0), hidden_size = args.out.dim(1);
  if (num_rows == 0) return;
  bool vectorize =
      IsVectorizable(args.x, hidden_size, 4) && IsVectorizable(args.out, hidden_size, 4);
  auto kernel = vectorize ? GatherRowsKernel<4> : GatherRowsKernel<1>;
  kernel<<<static_cast<unsigned>(num_rows), kThreads, 0, stream>>>(
      args.x.data<float>(), args.rows.data<int32_t>(), args.out.data<float>(), hidden_size);
  TIDAL_LAUNCH_CHECK("gather_rows");
}

}  // namespace tidal
