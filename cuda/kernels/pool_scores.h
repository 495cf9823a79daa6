// The keys that positions are ranked by, pooled by all processors before a cluster of blocks a set
// chooses among them (select_top_k.cu): of one set for all heads, and of scores of 16 bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/op_args.h"

namespace tidal {

// keys [B, num_sets, max_len]: order-preserving keys of the pooled scores, up to a row's last.
void LaunchPoolScores(const SelectTopKArgs& args, uint32_t* keys, cudaStream_t stream);

}  // namespace tidal
