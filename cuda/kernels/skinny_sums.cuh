// The sums of the skinny products, in the one order in which they are made (skinny_block.cuh).
#pragma once

#include <cstdint>

#include "common/mma.cuh"

namespace tidal {

__device__ __forceinline__ float4 AddFragments(const float4& a, const float4& b) {
  return make_float4(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z),
                     __fadd_rn(a.w, b.w));
}

// Adds neighbours first, then their sums; a power of two of them. Zeros at the end change nothing.
template <int kCount>
__device__ __forceinline__ float4 AddTree(float4 (&parts)[kCount]) {
#pragma unroll
  for (int distance = 1; distance < kCount; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2 * distance) {
      parts[i] = AddFragments(parts[i], parts[i + distance]);
    }
  }
  return parts[0];
}

// Two sums of each output of a tile of 16 rows by 8 tokens, over alternate inputs.
using TileSums = float[2][4];

// Adds 32 inputs: of the weight's first 8 rows, of its second 8, and of the tokens.
template <typename T>
__device__ __forceinline__ void MultiplyStep(const uint4& low, const uint4& high, const uint4& x,
                                             TileSums& sums) {
  MultiplyAdd<T>(sums[0], {low.x, high.x, low.y, high.y}, x.x, x.y);
  MultiplyAdd<T>(sums[1], {low.z, high.z, low.w, high.w}, x.z, x.w);
}

// Returns a part of a tile, whose sums start afresh.
__device__ __forceinline__ float4 TakePart(TileSums& sums) {
  float4 part = make_float4(sums[0][0] + sums[1][0], sums[0][1] + sums[1][1],
                            sums[0][2] + sums[1][2], sums[0][3] + sums[1][3]);
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[0][i] = sums[1][i] = 0.0f;
  return part;
}

// Makes what the Epilogue finishes: a tile's sums, each times the scale of its token.
__device__ __forceinline__ void ScaleSums(const float4& sums, const float (&scales)[2],
                                          float (&values)[4]) {
  values[0] = __fmul_rn(sums.x, scales[0]);
  values[1] = __fmul_rn(sums.y, scales[1]);
  values[2] = __fmul_rn(sums.z, scales[0]);
  values[3] = __fmul_rn(sums.w, scales[1]);
}

}  // namespace tidal
