// Numbers in 8 bits, float8 e4m3fn: 1 sign, 4 exponent (bias 7) and 3 mantissa bits; no infinities,
// NaN where all bits below the sign are set. What fp8 weights and an fp8 KV cache hold, under a
// scale. Source: OCP 8-bit floating point, 2023.
#pragma once

#include <cstdint>

#include "core/float16.h"
#include "core/host_device.h"

namespace tidal {

struct Float8 {
  uint8_t bits;
};

inline constexpr float kLargestFloat8 = 448.0f;

// The scale of numbers of at most that magnitude: the largest of their codes is the largest there
// is. 1 if all are 0.
TIDAL_HOST_DEVICE inline float Float8Scale(float largest) {
  const float scale = largest / kLargestFloat8;
  return scale > 0.0f ? scale : 1.0f;
}

float Float8ToFloat(uint8_t code);

// The nearest float8, of two the even one; beyond the largest, 448, that. NaN stays NaN.
uint8_t FloatToFloat8(float value);

inline float ToFloat(Float8 value) {
  return Float8ToFloat(value.bits);
}

template <>
inline Float8 FromFloat<Float8>(float value) {
  return {FloatToFloat8(value)};
}

// Writes the codes of x [count] / scale: what an fp8 KV cache holds of a token's head. If x holds a
// NaN or an infinity, all of the row becomes NaN.
void EncodeFloat8Row(const float* x, int64_t count, float scale, Float8* codes);

}  // namespace tidal
