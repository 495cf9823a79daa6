// What skinny_linear.cu calls and cuda/inst/skinny_linear_*.cu define, one dtype a file. Defined in
// skinny_launch.cuh.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

template <typename T>
void RunSkinnyLinear(const LinearArgs& args, int num_sms, cudaStream_t stream);

template <typename T>
void RunLinearRopeAppend(const LinearArgs& linear, const RopeAppendKvArgs& append, int num_sms,
                         cudaStream_t stream);

template <typename T>
void RunLinearSiluMul(const LinearArgs& linear, const SiluMulArgs& silu_mul, int num_sms,
                      cudaStream_t stream);

}  // namespace tidal
