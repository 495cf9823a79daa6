// Causal attention of prompt chunks over the paged cache.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"
#include "common/attention_scratch.h"

namespace tidal {

void LaunchAttentionPrefill(const AttentionPrefillArgs& args, const AttentionScratch& scratch,
                            cudaStream_t stream);

}  // namespace tidal
