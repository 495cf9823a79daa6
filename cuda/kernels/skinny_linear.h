// Matrix products of a decode step: a few tokens times a weight that is read once, with what stands
// behind it in a layer. For more tokens there is cuda_linear.h.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// Whether the kernels take the product of these arguments, alone or with what follows it; with
// others they must not be launched.
bool FitsSkinnyLinear(const LinearArgs& args);
bool FitsLinearRopeAppend(const LinearArgs& linear, const RopeAppendKvArgs& append);
bool FitsLinearSiluMul(const LinearArgs& linear, const SiluMulArgs& silu_mul);

void LaunchSkinnyLinear(const LinearArgs& args, int num_sms, cudaStream_t stream);
void LaunchLinearRopeAppend(const LinearArgs& linear, const RopeAppendKvArgs& append, int num_sms,
                            cudaStream_t stream);
void LaunchLinearSiluMul(const LinearArgs& linear, const SiluMulArgs& silu_mul, int num_sms,
                         cudaStream_t stream);

}  // namespace tidal
