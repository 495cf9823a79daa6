#include "core/int8_row.h"

#include <algorithm>
#include <cmath>

namespace tidal {

float LargestFinite(const float* x, int64_t count) {
  float largest = 0.0f;
  float poison = 0.0f;  // stays 0 while all are finite
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::fabs(x[i]));
    poison += x[i] * 0.0f;
  }
  return largest + poison;
}

int CodeOf(float value, float step, float levels) {
  if (!(step > 0.0f)) return 0;
  const float code = std::nearbyint(value / step);
  return static_cast<int>(std::min(std::max(code, -levels), levels));
}

float EncodeInt8Row(const float* x, int64_t count, int8_t* codes) {
  const float scale = LargestFinite(x, count) / kInt8Levels;
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = static_cast<int8_t>(CodeOf(x[i], scale, kInt8Levels));
  }
  return scale;
}

}  // namespace tidal
