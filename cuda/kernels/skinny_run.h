// What skinny_linear.cu calls and cuda/inst/skinny_linear_*.cu define, one dtype a file. Defined in
// skinny_launch.cuh.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// As the functions of skinny_linear.h.
template <typename T>
void RunSkinnyLinear(const LinearArgs& args, const RmsNormArgs* norm, int num_sms,
                     cudaStream_t stream);

template <typename T>
void RunLinearRopeAppend(const LinearArgs& linear, const RmsNormArgs* norm,
                         const RopeAppendKvArgs& append, int num_sms, cudaStream_t stream);

template <typename T>
void RunLinearSiluMul(const LinearArgs& linear, const RmsNormArgs* norm,
                      const SiluMulArgs& silu_mul, int num_sms, cudaStream_t stream);

}  // namespace tidal
