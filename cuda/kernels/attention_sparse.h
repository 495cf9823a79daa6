// Attention of one query per row to the chosen positions only: layers of kind s.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"
#include "common/attention_scratch.h"
#include "common/cache_reads.h"

namespace tidal {

void LaunchAttentionSparse(const AttentionSparseArgs& args, const AttentionScratch& scratch,
                           CacheReads reads, cudaStream_t stream);

}  // namespace tidal
