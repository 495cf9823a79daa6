// The arithmetic of single elements that a kernel of its own and the epilogue of a product share,
// so that both round alike.
#pragma once

#include <cuda_runtime.h>

namespace tidal {

// silu(gate) * up.
__device__ __forceinline__ float SiluTimes(float gate, float up) {
  return gate / (1.0f + expf(-gate)) * up;
}

// Rotates element i of a head and its partner, element i + D / 2 (rotate-half layout).
__device__ __forceinline__ void RotatePair(float& low, float& high, float cosine, float sine) {
  float first = low;
  low = first * cosine - high * sine;
  high = high * cosine + first * sine;
}

}  // namespace tidal
