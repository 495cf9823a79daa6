// The inputs of a product as LinearArgs::quantizes_inputs has them, for products that read codes
// and for those that do not.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// Codes of inputs [T, K], and their scales [K / group_size, T] float32, device memory.
struct CodedInputs {
  void* codes;
  float* scales;
};

// Writes the codes of linear.x.
void LaunchEncodeInputs(const LinearArgs& linear, const CodedInputs& out, cudaStream_t stream);

// Writes what the codes of linear.x stand for to `out` [T, K] act, rounded once.
void LaunchRoundInputs(const LinearArgs& linear, const TensorView& out, cudaStream_t stream);

}  // namespace tidal
