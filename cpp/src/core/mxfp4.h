// Numbers in 4 bits, float4 e2m1: 1 sign, 2 exponent (bias 1) and 1 mantissa bit; 32 neighbours
// share a scale e8m0, a power of 2 in a byte. Source: OCP Microscaling Formats 1.0, 5.3.3 and 5.4.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace tidal {

inline constexpr int64_t kMxfp4Group = 32;

// The numbers that the codes of float4 e2m1 stand for.
inline constexpr std::array<float, 16> kFloat4Values = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,
                                                        4.0f,  6.0f,  -0.0f, -0.5f, -1.0f, -1.5f,
                                                        -2.0f, -3.0f, -4.0f, -6.0f};

// Returns 2^(scale - 127), of which the least is subnormal; 255 is a NaN.
inline float E8m0ToFloat(uint8_t scale) {
  if (scale == 0xff) return std::numeric_limits<float>::quiet_NaN();
  return std::bit_cast<float>(scale == 0 ? 0x00400000u : uint32_t{scale} << 23);
}

// Encodes a power of 2 from 2^-127 to 2^127.
inline uint8_t FloatToE8m0(float power) {
  return static_cast<uint8_t>(std::bit_cast<uint32_t>(power) >> 23);
}

// Finds the nearest float4, of two the even one; beyond the largest, 6, that.
inline uint8_t FloatToFloat4(float value) {
  // Below each a code and above it the next is the nearest; it goes to the even one of the two.
  constexpr std::array<float, 7> kMiddles = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
  const float size = std::abs(value);
  uint8_t code = 0;
  while (code < 7 && (code % 2 == 0 ? size > kMiddles[code] : size >= kMiddles[code])) ++code;
  return static_cast<uint8_t>(code | (std::signbit(value) ? 8 : 0));
}

}  // namespace tidal
