// The adaptive budget of SelectTopK (SelectTopKArgs::top_p_mass): from each set's best positions to
// as few as hold enough of the softmax.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// After the best token_budget positions of each set were written to args.token_idx. `pooled`
// [B, num_sets, max_len]: the keys, if they were made before (PoolsFirst), or null.
void LaunchTrimToMass(const SelectTopKArgs& args, const uint32_t* pooled, cudaStream_t stream);

}  // namespace tidal
