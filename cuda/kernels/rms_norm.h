// RmsNorm on the GPU: from the float32 residual stream to the activation dtype.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

void LaunchRmsNorm(const RmsNormArgs& args, cudaStream_t stream);

}  // namespace tidal
