#include "core/float8.h"

#include <algorithm>
#include <cmath>

#include "core/int8_row.h"

namespace tidal {

float Float8ToFloat(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const uint32_t exponent = (code >> 3) & 0xfu, mantissa = code & 0x7u;
  if ((code & 0x7fu) == 0x7fu) return BitsToFloat(sign | 0x7fc00000u);
  if (exponent != 0) return BitsToFloat(sign | ((exponent + 120) << 23) | (mantissa << 20));
  const float magnitude = static_cast<float>(mantissa) * 0.001953125f;  // subnormal: x 2^-9
  return sign ? -magnitude : magnitude;
}

uint8_t FloatToFloat8(float value) {
  constexpr float kLeastNormal = 0.015625f;
  const uint32_t bits = FloatToBits(value), sign = (bits >> 24) & 0x80u;
  if (std::isnan(value)) return static_cast<uint8_t>(sign | 0x7fu);
  const float size = std::min(std::abs(value), kLargestFloat8);
  if (size < kLeastNormal) {  // steps of 2^-9
    return static_cast<uint8_t>(sign | static_cast<uint32_t>(std::nearbyint(size * 512.0f)));
  }
  // 20 bits go, rounded to even; the exponent's bias falls from 127 to 7.
  const uint32_t magnitude = FloatToBits(size);
  const uint32_t rounded = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
  return static_cast<uint8_t>(sign | (rounded - (120u << 3)));
}

void EncodeFloat8Row(const float* x, int64_t count, float scale, Float8* codes) {
  const bool is_finite = !std::isnan(LargestFinite(x, count));
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = is_finite ? FromFloat<Float8>(x[i] / scale) : Float8{0x7f};
  }
}

}  // namespace tidal
