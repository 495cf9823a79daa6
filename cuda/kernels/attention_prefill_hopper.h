// Causal attention of prompt chunks over the paged cache, for compute capability 9.0.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// Whether this build and the current device have the kernel; else it must not be launched.
bool FitsAttentionPrefillHopper(const AttentionPrefillArgs& args);

void LaunchAttentionPrefillHopper(const AttentionPrefillArgs& args, cudaStream_t stream);

}  // namespace tidal
