// ScaleLogits: multiplies logits in place, and caps them.
#include "kernels/scale_logits.h"

#include <algorithm>

#include "common/check.h"

namespace tidal {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 4096;

// A grid of any size; neighbouring threads have neighbouring logits.
__global__ void ScaleLogitsKernel(float* logits, int64_t count, float scale, float softcap) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride) {
    float logit = logits[i] * scale;
    logits[i] = softcap > 0.0f ? softcap * tanhf(logit / softcap) : logit;
  }
}

}  // namespace

void LaunchScaleLogits(const ScaleLogitsArgs& args, cudaStream_t stream) {
  const int64_t count = args.logits.numel();
  if (count == 0) return;
  const int64_t blocks = std::min(kMostBlocks, (count + kThreads - 1) / kThreads);
  ScaleLogitsKernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      args.logits.data<float>(), count, args.scale, args.softcap);
  TIDAL_LAUNCH_CHECK("scale_logits");
}

}  // namespace tidal
