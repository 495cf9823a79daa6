// Matrix products of a decode step: a few tokens times a weight that is read once, with what stands
// before and behind it in a layer. Each token's results are the same bit for bit whatever the
// number of tokens, but for a few tokens of int4 (SkinnyRun). For many tokens there is
// cuda_linear.h.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// Whether the current device has the shared memory of this code's blocks (kMaxSharedBytes): other
// chips of the kinds that run it have less.
bool HasSharedMemory();

// Whether the kernels take the product of these arguments, alone or with what follows it, of up to
// MaxStreamedTokens; with others they must not be launched.
bool StreamsWeight(const Weight& weight);
int64_t MaxStreamedTokens(const Weight& weight);
bool StreamsLinear(const LinearArgs& args);
bool StreamsLinearRopeAppend(const LinearArgs& linear, const RopeAppendKvArgs& append);
bool StreamsLinearGateMul(const LinearArgs& linear, const GateMulArgs& gate_mul);

// Whether a kernel also makes the norm that FoldsNorm (folded_norm.h), if the product is stored.
bool FitsNorm(const RmsNormArgs& norm, const Weight& weight);

// The norm in front of a product, if it is not done, and where the product runs.
struct SkinnyRun {
  const RmsNormArgs* norm = nullptr;  // makes linear.x, which is then neither read nor written
  const float* scales = nullptr;      // [T]: what LaunchFoldedNorm left to do
  bool in_one_order = false;          // sums do not depend on the number of tokens
  int num_sms = 0;
  cudaStream_t stream = nullptr;
};

void LaunchSkinnyLinear(const LinearArgs& args, const SkinnyRun& run);
void LaunchLinearRopeAppend(const LinearArgs& linear, const RopeAppendKvArgs& append,
                            const SkinnyRun& run);
void LaunchLinearGateMul(const LinearArgs& linear, const GateMulArgs& gate_mul,
                         const SkinnyRun& run);

}  // namespace tidal
