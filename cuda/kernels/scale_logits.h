// ScaleLogits on the GPU: the factor of models that have one.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

void LaunchScaleLogits(const ScaleLogitsArgs& args, cudaStream_t stream);

}  // namespace tidal
