// SelectTopK on the GPU: from the scores of a layer that chooses to sets of positions.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// What LaunchSelectTopK works on, in device memory.
struct SelectTopKScratch {
  void* keys;
  void* first_digits;  // zeros before and afterwards
};

struct SelectTopKBytes {
  int64_t keys = 0;
  int64_t first_digits = 0;
};

// Grows with the numbers.
SelectTopKBytes SelectTopKScratchBytes(int64_t num_sets_in_all, int64_t max_len);

void LaunchSelectTopK(const SelectTopKArgs& args, const SelectTopKScratch& scratch,
                      cudaStream_t stream);

}  // namespace tidal
