// What skinny_linear.cu calls and cuda/inst/skinny_linear_*.cu define, one dtype a file. Defined in
// skinny_launch.cuh.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// With `norm`, the inputs are made from its arguments and args.x is not read.
template <typename T>
void RunSkinnyLinear(const LinearArgs& args, const RmsNormArgs* norm, int num_sms,
                     cudaStream_t stream);

template <typename T>
void RunQkvRopeAppend(const QkvRopeAppendArgs& args, int num_sms, cudaStream_t stream);

template <typename T>
void RunGateUpSiluMul(const GateUpSiluMulArgs& args, int num_sms, cudaStream_t stream);

}  // namespace tidal
