// GatherRows on the GPU: the rows whose logits are wanted.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

void LaunchGatherRows(const GatherRowsArgs& args, cudaStream_t stream);

}  // namespace tidal
