// ScoreKeys from keys of 4 bits: an eighth of the bytes of K and V.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"
#include "common/attention_scratch.h"
#include "common/cache_reads.h"

namespace tidal {

// Whether the kernel first writes the shadow of each row's newest token.
enum class NewestShadow { kIsThere, kWrite };

void LaunchScoreShadow(const ScoreKeysArgs& args, NewestShadow newest,
                       const AttentionScratch& scratch, CacheReads reads, cudaStream_t stream);

}  // namespace tidal
