// An RmsNorm folded into the product behind it: the inputs of the product are hidden states times
// the norm's weights, and its results are multiplied by 1 / sqrt(mean of squares + eps), which is
// the same for all of a token. The skinny products do this on their way through the first tile
// (skinny_block.cuh), or take what the kernel of folded_norm.cu made; with weights of 16 bits both
// give the same bits, since both add up a token's squares in this order: of every 8 neighbours; of
// a chunk's, 4 lanes each; of every eighth chunk; of the lanes; of the 8 parts.
#pragma once

#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace tidal {

// Takes eight neighbours, and adds their squares.
template <typename T>
__device__ __forceinline__ void FoldNorm(const float* hidden, const T* norm_weight, T* out,
                                         float& squares) {
  float low[4], high[4], weights[8];
  LoadFloats<4>(hidden, low);
  LoadFloats<4>(hidden + 4, high);
  LoadFloats<8>(norm_weight, weights);
  float products[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    squares = __fmaf_rn(low[i], low[i], __fmaf_rn(high[i], high[i], squares));
    products[i] = low[i] * weights[i];
    products[i + 4] = high[i] * weights[i + 4];
  }
  StoreFloats<8>(out, products);
}

// Adds up what the four lanes 4 g to 4 g + 3 have, for each of them.
__device__ __forceinline__ float AddSquaresOfLanes(float squares) {
  squares = __fadd_rn(squares, __shfl_xor_sync(kFullWarp, squares, 1));
  return __fadd_rn(squares, __shfl_xor_sync(kFullWarp, squares, 2));
}

__device__ __forceinline__ float NormScale(float sum_of_squares, int num_inputs, float eps) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(num_inputs) + eps);
}

}  // namespace tidal
