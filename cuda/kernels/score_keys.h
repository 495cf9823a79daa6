// The scores of AttentionSelect without its attention: layers of kind P. All keys are read, and no
// value.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"
#include "common/attention_scratch.h"
#include "common/cache_reads.h"

namespace tidal {

void LaunchScoreKeys(const ScoreKeysArgs& args, const AttentionScratch& scratch, CacheReads reads,
                     cudaStream_t stream);

}  // namespace tidal
