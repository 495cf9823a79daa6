// The arithmetic of single elements that a kernel of its own and the epilogues of products share,
// so that all round alike.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"
#include "common/vec.cuh"

namespace tidal {

template <typename T>
__device__ __forceinline__ float BiasOf(const T* bias, int row) {
  return bias == nullptr ? 0.0f : ToFloat32(bias[row]);
}

// silu(gate) * up.
__device__ __forceinline__ float SiluTimes(float gate, float up) {
  return gate / (1.0f + expf(-gate)) * up;
}

// gelu(gate) * up, by tanh: x / 2 * (1 + tanh(y)) is x / (1 + exp(-2 y)).
__device__ __forceinline__ float GeluTanhTimes(float gate, float up) {
  constexpr float kTwice = 1.5957691216057308f;  // 2 * sqrt(2 / pi)
  float y = kTwice * (gate + 0.044715f * gate * gate * gate);
  return gate / (1.0f + expf(-y)) * up;
}

// What is made of a gate and of up: as GateMulArgs says it.
struct GateRule {
  Activation activation;
  float limit;
  float alpha;
};

inline GateRule RuleOf(const GateMulArgs& args) {
  return {args.activation, args.limit, args.alpha};
}

// (up + 1) * gate * sigmoid(alpha * gate), both clamped first. No comparison with a NaN is true, so
// one stays.
__device__ __forceinline__ float ClampedSwigluTimes(const GateRule& rule, float gate, float up) {
  gate = gate > rule.limit ? rule.limit : gate;
  up = up > rule.limit ? rule.limit : up;
  up = up < -rule.limit ? -rule.limit : up;
  return gate / (1.0f + expf(-rule.alpha * gate)) * (up + 1.0f);
}

__device__ __forceinline__ float ActivationTimes(const GateRule& rule, float gate, float up) {
  if (rule.activation == Activation::kClampedSwiglu) return ClampedSwigluTimes(rule, gate, up);
  return rule.activation == Activation::kSilu ? SiluTimes(gate, up) : GeluTanhTimes(gate, up);
}

// Rotates element i of a head and its partner, element i + D / 2 (rotate-half layout). Intrinsics
// keep the compiler from fusing the roundings in one kernel and not in another.
__device__ __forceinline__ void RotatePair(float& low, float& high, float cosine, float sine) {
  float first = low;
  low = __fmaf_rn(first, cosine, -__fmul_rn(high, sine));
  high = __fmaf_rn(high, cosine, __fmul_rn(first, sine));
}

}  // namespace tidal
