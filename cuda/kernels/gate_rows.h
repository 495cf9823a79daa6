// GateRows on the GPU: rows weighted by a gate of their token.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

void LaunchGateRows(const GateRowsArgs& args, cudaStream_t stream);

}  // namespace tidal
