// What expert_linear.cu calls and cuda/inst/expert_streams.cu.in defines, one dtype and kind of
// weight a file. Defined in expert_streams.cuh.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"
#include "kernels/skinny_layout.h"

namespace tidal {

template <typename T>
struct ExpertParams;

struct ExpertRun {
  int num_sms;
  cudaStream_t stream;
};

// The product of `experts`, whose weight is `weight`; gated, with GateMul behind it.
template <typename T, WeightKind kKind>
void RunStreamedExperts(const ExpertParams<T>& experts, const Weight& weight, bool is_gated,
                        const ExpertRun& run);

}  // namespace tidal
