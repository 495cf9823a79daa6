// Logprobs on the GPU: log-probabilities of tokens and of the most likely ones.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

void LaunchLogprobs(const LogprobsArgs& args, cudaStream_t stream);

}  // namespace tidal
