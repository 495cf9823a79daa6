// AttentionFull that also writes its scores and their log-sum-exp: layers of kind S. The kernel is
// attention_full.cuh with the stores compiled in; `out` equals AttentionFull's bit for bit.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"
#include "common/attention_scratch.h"
#include "common/cache_reads.h"

namespace tidal {

void LaunchAttentionSelect(const AttentionSelectArgs& args, const AttentionScratch& scratch,
                           CacheReads reads, cudaStream_t stream);

}  // namespace tidal
