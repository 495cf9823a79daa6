// GateMul on the GPU: the gate of the feed-forward network.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

void LaunchGateMul(const GateMulArgs& args, cudaStream_t stream);

}  // namespace tidal
