// What skinny_linear.cu calls and cuda/inst/skinny_linear.cu.in defines, one dtype, width and kind
// of weight a file. Defined in skinny_launch.cuh.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"
#include "kernels/skinny_layout.h"
#include "kernels/skinny_linear.h"

namespace tidal {

// As the functions of skinny_linear.h, for up to kTokens tokens.
template <typename T, int kTokens, WeightKind kKind>
void RunSkinnyLinear(const LinearArgs& args, const SkinnyRun& run);

template <typename T, int kTokens, WeightKind kKind>
void RunLinearRopeAppend(const LinearArgs& linear, const RopeAppendKvArgs& append,
                         const SkinnyRun& run);

template <typename T, int kTokens, WeightKind kKind>
void RunLinearGateMul(const LinearArgs& linear, const GateMulArgs& gate_mul, const SkinnyRun& run);

}  // namespace tidal
