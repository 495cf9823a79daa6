// Adds a bias to the float32 outputs of Linear, where cuBLASLt takes no 16-bit bias.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// out [T, N] float32 += bias [N], 16-bit.
void LaunchAddBias(const TensorView& bias, const TensorView& out, cudaStream_t stream);

}  // namespace tidal
