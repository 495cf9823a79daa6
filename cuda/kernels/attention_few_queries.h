// AttentionPrefill of rows that have few queries: the check of drafts, the end of a prompt.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"
#include "common/attention_scratch.h"

namespace tidal {

// Whether its rows have so few queries that LaunchAttentionFewQueries does it faster than
// LaunchAttentionPrefill: bound by reading K and V, not by arithmetic.
bool HasFewQueries(const AttentionPrefillArgs& args);

void LaunchAttentionFewQueries(const AttentionPrefillArgs& args, const AttentionScratch& scratch,
                               cudaStream_t stream);

}  // namespace tidal
