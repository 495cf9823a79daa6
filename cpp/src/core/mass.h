// Softmax weights as integers: their sums are the same in every order, on host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"

namespace tidal {

// Units of a weight of 1. The weights of 2^16 heads still add up below 2^63, and what is lost of a
// position's weight is far below what float32 scores are good for.
inline constexpr float kMassUnits = 1099511627776.0f;  // 2^40

// Counts a weight in units: >= 0, and below 2^16 by the heads of a set; NaN counts as 0.
TIDAL_HOST_DEVICE inline uint64_t ToMass(float weight) {
  if (!(weight > 0.0f)) return 0;
  return static_cast<uint64_t>((weight < 65536.0f ? weight : 65536.0f) * kMassUnits);
}

// What the weights of `num_heads` heads, each a softmax over all positions, must reach.
inline uint64_t TargetMass(float top_p_mass, int64_t num_heads) {
  return static_cast<uint64_t>(std::ceil(static_cast<double>(top_p_mass) *
                                         static_cast<double>(num_heads) * double{kMassUnits}));
}

}  // namespace tidal
