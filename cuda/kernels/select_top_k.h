// SelectTopK on the GPU: from the scores of a select layer to the sets of the sparse layers.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// Whether the keys that positions are ranked by are made before, in scratch: of one set for all
// heads, and of scores of 16 bits.
bool PoolsFirst(Granularity granularity, DType score_dtype);

// Scratch for LaunchSelectTopK on the current device: the keys, if they are made before, and those
// of rows that are too long for the shared memory of a cluster of blocks. Grows with the numbers.
int64_t SelectTopKScratchBytes(bool pools_first, int64_t batch_size, int64_t num_sets,
                               int64_t max_len);

// `scratch`: SelectTopKScratchBytes bytes of device memory.
void LaunchSelectTopK(const SelectTopKArgs& args, void* scratch, cudaStream_t stream);

}  // namespace tidal
