// RopeTable on the GPU: cosines and sines of a pass, once for all layers.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

void LaunchRopeTable(const RopeTableArgs& args, cudaStream_t stream);

}  // namespace tidal
