// Matrix products of a decode step: a few tokens times a weight that is read once, with what stands
// before and behind it in a layer. For more tokens there is cuda_linear.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/op_args.h"

namespace tidal {

// Whether the kernels below take this product on the current device. The pointers do not matter
// beyond their alignment.
bool FitsSkinnyLinear(const LinearArgs& args);

void LaunchSkinnyLinear(const LinearArgs& args, int num_sms, cudaStream_t stream);

// The fused ops, if their linear part fits and, for the first, no per-head norm is asked for.
bool FitsQkvRopeAppend(const QkvRopeAppendArgs& args);
void LaunchQkvRopeAppend(const QkvRopeAppendArgs& args, int num_sms, cudaStream_t stream);
bool FitsGateUpSiluMul(const GateUpSiluMulArgs& args);
void LaunchGateUpSiluMul(const GateUpSiluMulArgs& args, int num_sms, cudaStream_t stream);
bool FitsNormLinear(const NormLinearArgs& args);
void LaunchNormLinear(const NormLinearArgs& args, int num_sms, cudaStream_t stream);

}  // namespace tidal
