// Matrix products of a decode step: a few tokens times a weight that is read once, with what stands
// before and behind it in a layer. For more tokens there is cuda_linear.h.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"

namespace tidal {

// Whether the kernels take the product of these arguments, alone or with what follows it; with
// others they must not be launched.
bool FitsSkinnyLinear(const LinearArgs& args);
bool FitsLinearRopeAppend(const LinearArgs& linear, const RopeAppendKvArgs& append);
bool FitsLinearSiluMul(const LinearArgs& linear, const SiluMulArgs& silu_mul);

// Whether they also take the RmsNorm that makes the product's inputs, if they take the product and
// it is stored.
bool FitsNorm(const RmsNormArgs& norm);

// `norm`: makes linear.x, which is then neither read nor written; null: linear.x is there.
void LaunchSkinnyLinear(const LinearArgs& args, const RmsNormArgs* norm, int num_sms,
                        cudaStream_t stream);
void LaunchLinearRopeAppend(const LinearArgs& linear, const RmsNormArgs* norm,
                            const RopeAppendKvArgs& append, int num_sms, cudaStream_t stream);
void LaunchLinearSiluMul(const LinearArgs& linear, const RmsNormArgs* norm,
                         const SiluMulArgs& silu_mul, int num_sms, cudaStream_t stream);

}  // namespace tidal
