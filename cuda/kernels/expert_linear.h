// Products of tokens with the experts that they have chosen, each expert's weights read once for a
// tile of choices.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"
#include "kernels/expert_choices.h"

namespace tidal {

inline constexpr int64_t kStreamedChoices = 8;  // of a tile of the kernel for few tokens
inline constexpr int64_t kTiledChoices = 64;    // of the one for many

// Whether the kernels take the weight, of experts with num_outputs each; with others they must not
// be launched.
bool TakesExperts(const Weight& weight, int64_t num_outputs);
// Whether the kernel for many tokens runs here, with this weight.
bool TilesExperts(const Weight& weight);

// The product of choices in `order`, whose tile_choices say by which kernel. With a gate_mul what
// it makes of the product is stored in its `out`, and args.out is not written. A choice's results
// do not depend on the others.
void LaunchExpertLinear(const ExpertLinearArgs& args, const GateMulArgs* gate_mul,
                        const ExpertOrder& order, int num_sms, cudaStream_t stream);

}  // namespace tidal
