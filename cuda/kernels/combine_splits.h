// The second half of decode attention: merges the partial results of a row's splits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/decode_split.cuh"
#include "tidal/dtype.h"

namespace tidal {

struct CombineSplitsArgs {
  PartialResults partials;
  AttendedTokens attended;
  int num_splits = 0;
  int64_t batch_size = 0;
  int64_t num_q_heads = 0;
  int64_t head_dim = 0;            // 64 or 128
  DType dtype = DType::kBFloat16;  // of out
  void* out = nullptr;             // [B, Hq, D]; 0 where a row attends to nothing
  float* lse = nullptr;  // [B, Hq], or nullptr: log of the sum of exp(score), -inf for nothing
};

void LaunchCombineSplits(const CombineSplitsArgs& args, cudaStream_t stream);

}  // namespace tidal
