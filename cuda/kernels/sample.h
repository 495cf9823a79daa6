// Sample on the GPU: from a row of logits to the next token.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

void LaunchSample(const SampleArgs& args, cudaStream_t stream);

}  // namespace tidal
