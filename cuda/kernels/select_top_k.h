// SelectTopK on the GPU: from the scores of a select layer to the sets of the sparse layers.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// Scratch for LaunchSelectTopK on the current device; 0 if the shared memory of a cluster of blocks
// holds the keys of a row. Grows with the arguments.
int64_t SelectTopKScratchBytes(int64_t batch_size, int64_t num_sets, int64_t max_len);

// `scratch`: SelectTopKScratchBytes bytes of device memory.
void LaunchSelectTopK(const SelectTopKArgs& args, void* scratch, cudaStream_t stream);

}  // namespace tidal
