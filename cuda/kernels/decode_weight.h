// A weight in codes as numbers, for products that cannot read codes.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// Writes the numbers of a weight in codes to `out` [N, K], 16-bit: each code's value times its
// scale, rounded once, as model/weight_format.h has it.
void LaunchDecodeWeight(const Weight& weight, const TensorView& out, cudaStream_t stream);

}  // namespace tidal
