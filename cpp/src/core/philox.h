// Philox4x32-10 (Salmon et al., SC 2011) and the Gumbel noise of sampling, the same on host and
// device.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"

namespace tidal {

// First 32-bit word of the block with key `seed` and counter (c0, c1, 0, 0).
TIDAL_HOST_DEVICE inline uint32_t Philox(uint64_t seed, uint32_t c0, uint32_t c1) {
  uint32_t x0 = c0, x1 = c1, x2 = 0, x3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * x0;
    uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * x2;
    uint32_t y0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ k0;
    uint32_t y2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ k1;
    x1 = static_cast<uint32_t>(p1);
    x3 = static_cast<uint32_t>(p0);
    x0 = y0;
    x2 = y2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return x0;
}

// -log(-log(u)), u uniform in (0, 1): argmax of logit / temperature + noise is a softmax draw.
TIDAL_HOST_DEVICE inline float GumbelNoise(uint64_t seed, uint32_t position, uint32_t token_id) {
  // 23 bits and a half step: exact in float32, never 0 nor 1.
  float u =
      (static_cast<float>(Philox(seed, position, token_id) >> 9) + 0.5f) * (1.0f / 8388608.0f);
  return -logf(-logf(u));
}

}  // namespace tidal
