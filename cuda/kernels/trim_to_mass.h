// The adaptive budget of SelectTopK (SelectTopKArgs::top_p_mass): from each set's best positions to
// as few as hold enough of the softmax.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"
#include "kernels/pool_scores.h"

namespace tidal {

// After the best token_budget positions of each set were written to args.token_idx.
void LaunchTrimToMass(const SelectTopKArgs& args, const RankedKeys& ranked, cudaStream_t stream);

}  // namespace tidal
