// A row of numbers in 8 bits: code x scale, the scale of its own. What an int8 KV cache holds of a
// token's head. The error of a number is at most half a scale, 1/254 of the row's largest.
#pragma once

#include <cstdint>

namespace tidal {

inline constexpr float kInt8Levels = 127.0f;

// The largest magnitude of x [count]; NaN if one is a NaN or an infinity.
float LargestFinite(const float* x, int64_t count);

// The nearest (even) code of a value in units of `step`, within -levels to levels; 0 where there is
// no unit.
int CodeOf(float value, float step, float levels);

// Writes the codes [count] of x [count]. Returns their scale, the largest magnitude / 127; NaN if x
// holds a NaN or an infinity, so that all of the row becomes NaN.
float EncodeInt8Row(const float* x, int64_t count, int8_t* codes);

}  // namespace tidal
