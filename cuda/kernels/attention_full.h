// Dense attention of one query per row over the paged cache: layers of kind F.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"
#include "common/attention_scratch.h"
#include "common/cache_reads.h"

namespace tidal {

void LaunchAttentionFull(const AttentionArgs& args, const AttentionScratch& scratch,
                         CacheReads reads, cudaStream_t stream);

}  // namespace tidal
