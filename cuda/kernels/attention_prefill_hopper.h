// Causal attention of prompt chunks over the paged cache, for compute capability 9.0.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"
#include "common/attention_scratch.h"

namespace tidal {

// Whether this build and the device have the kernel.
bool HasAttentionPrefillHopper(int device);

// Whether it takes this call, on the current device; else it must not be launched.
bool FitsAttentionPrefillHopper(const AttentionPrefillArgs& args);

void LaunchAttentionPrefillHopper(const AttentionPrefillArgs& args, const AttentionScratch& scratch,
                                  cudaStream_t stream);

}  // namespace tidal
