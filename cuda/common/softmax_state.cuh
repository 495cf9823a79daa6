// The arithmetic of an online softmax: running maximum, running sum, rescaling (FlashAttention,
// arXiv 2205.14135). A masked score is -inf and weighs 0; where all scores are -inf the maximum
// stays -inf, the sum 0, and no difference of two infinities is formed.
#pragma once

namespace tidal {

inline constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float NegativeInfinity() {
  return __int_as_float(0xff800000);
}

// 2^x to 2 ulp; 2^-inf = 0.
__device__ __forceinline__ float FastExp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The number to subtract from scores whose maximum is `max`: itself, or 0 if there is none yet.
__device__ __forceinline__ float FiniteMax(float max) {
  return max == NegativeInfinity() ? 0.0f : max;
}

// exp(score - finite_max). The intrinsics keep the compiler from fusing the two roundings in one
// kernel and not in another: AttentionFull and AttentionSelect must agree bit for bit.
__device__ __forceinline__ float SoftmaxWeight(float score, float finite_max) {
  return FastExp2(__fmul_rn(__fsub_rn(score, finite_max), kLog2E));
}

}  // namespace tidal
