// The first half of an RmsNorm that is folded into the product behind it (folded_norm.cuh).
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// Whether a norm may be folded into a skinny product, whatever the number of tokens.
bool FoldsNorm(const RmsNormArgs& norm);

// Writes x times weight to norm.out, rounded, and what the product's results are to be multiplied
// by to scales [T]. Lets the product start at once (LaunchNext::kAtOnce of rms_norm.h).
void LaunchFoldedNorm(const RmsNormArgs& norm, float* scales, cudaStream_t stream);

}  // namespace tidal
