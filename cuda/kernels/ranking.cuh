// Which positions of a set compete for its places, and with which weights (backend/op_args.h,
// SelectTopKArgs). Used by pool_scores.cu, select_top_k.cu and trim_to_mass.cu, which so rank alike
// bit for bit.
#pragma once

#include <cstdint>

#include "backend/op_args.h"
#include "common/softmax_state.cuh"

namespace tidal {

__device__ __forceinline__ float Log2Lse(float lse) {
  return __fmul_rn(lse, kLog2E);
}

// exp(score - lse), 0 if it is below 2^-126. log2_lse: lse in units of log 2.
__device__ __forceinline__ float Weight(float score, float log2_lse) {
  return FastExp2(__fmaf_rn(score, kLog2E, -log2_lse));
}

// The part of a set that is chosen by score: `count` of the more than `count` positions [begin,
// end); nothing if count is 0.
struct Contest {
  int begin;
  int end;
  int count;

  __device__ __forceinline__ bool Has(int position) const {
    return position >= begin && position < end;
  }
};

// How a set's places are given away.
struct SetPlaces {
  int token_budget;
  int sink_tokens;    // the first positions, which are always in
  int recent_tokens;  // the last ones, likewise

  explicit SetPlaces(const SelectTopKArgs& args)
      : token_budget(static_cast<int>(args.token_idx.dim(2))),
        sink_tokens(static_cast<int>(args.sink_tokens)),
        recent_tokens(static_cast<int>(args.recent_tokens)) {}

  __device__ __forceinline__ Contest ContestOf(int num_tokens) const {
    int count = token_budget - sink_tokens - recent_tokens;
    if (num_tokens <= token_budget || count == 0) return {0, 0, 0};
    return {sink_tokens, num_tokens - recent_tokens, count};
  }
};

}  // namespace tidal
