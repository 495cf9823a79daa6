// What a skinny product is given (skinny_linear.cuh).
#pragma once

#include <cstdint>

#include "kernels/skinny_layout.h"
#include "kernels/weight_codes.cuh"

namespace tidal {

template <typename T>
struct SkinnyParams {
  const unsigned char* weight;  // [N, K], as the kernel's WeightKind says
  WeightScales weight_scales;   // unless kHalf
  int num_outputs;              // N
  int num_inputs;               // K
  int num_tokens;               // 1 to the kernel's kTokens
  int num_tiles;                // of all blocks together
  const T* x;                   // [T, K]; with kNormed: RmsNorm of the next three
  const float* hidden;          // [T, K]
  const T* norm_weight;         // [K]
  float norm_eps;
  const float* scales;  // [T]: of the tokens' results; null: 1
  SkinnyLayout layout;
};

// The weight rows of a tile: 8 from `first` on and 8 from `second` on.
struct TileRows {
  int first;
  int second;
};

// Returns the scale that another kernel left for a token, or 1.
template <typename T>
__device__ __forceinline__ float GivenScale(const SkinnyParams<T>& params, int token) {
  return params.scales == nullptr || token >= params.num_tokens ? 1.0f : params.scales[token];
}

}  // namespace tidal
