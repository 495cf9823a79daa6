// The keys that positions are ranked by, of sets that many query heads share: pooled by all
// processors, before a cluster of blocks a set chooses among them (select_top_k.cu).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/op_args.h"

namespace tidal {

// keys [B, num_sets, max_len]: order-preserving keys of the pooled scores, up to a row's last.
void LaunchPoolScores(const SelectTopKArgs& args, uint32_t* keys, cudaStream_t stream);

}  // namespace tidal
