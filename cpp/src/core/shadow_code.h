// How a key is written in 4 bits and a query in 8, so that their product tells which keys matter.
//
// A key k of D dims becomes r = H(k / balance) and a query q becomes H(q * balance): H is a
// Walsh-Hadamard transform of signed dims, over the square root of its size, which is the largest
// power of two that divides D (the dims are transformed in blocks of that size). H keeps products,
// and so does balance, whose factors make rotated keys and queries alike in all dims: a channel in
// which a model's keys are large and its queries small costs no bits of the others (SmoothQuant,
// arXiv 2211.10438, for keys; the rotation as in QuaRot, arXiv 2404.00456).
//
// scale = the largest |r| / 7, rounded to float16; a code is r / scale, rounded to nearest (even),
// within -7 to 7, stored plus 8. Two codes share a byte, the even dim in the low half. Of a query
// factor = the largest |dim| / 127 in float32, and codes are within -127 to 127. A product of codes
// is an integer, so it does not depend on the order of the sum:
//   q.k ~ factor * scale * sum of query codes * (key codes - 8).
// A key or query with a NaN or infinity gives NaN.
#pragma once

#include <cstdint>

#include "core/float16.h"
#include "core/host_device.h"

namespace tidal {

inline constexpr float kShadowKeyLevels = 7.0f;
inline constexpr float kShadowQueryLevels = 127.0f;
inline constexpr int kShadowCodeBias = 8;

// The size of the blocks of dims that are transformed.
TIDAL_HOST_DEVICE inline int ShadowBlock(int head_dim) {
  return head_dim & -head_dim;
}

// -1 or 1, half of the dims each, without a pattern that a transform would see.
TIDAL_HOST_DEVICE inline float ShadowSign(int dim) {
  uint32_t hash = static_cast<uint32_t>(dim) * 0x9e3779b1u;
  hash = (hash ^ (hash >> 15)) * 0x85ebca77u;
  return ((hash >> 13) & 1u) != 0 ? 1.0f : -1.0f;
}

// H in place: x [head_dim]. Sums go by stages of distance 1, 2, 4, ..., then one product: another
// implementation with the same order has the same bits.
void RotateForShadow(float* x, int head_dim);

// Writes a key [head_dim] with its balance [head_dim] as codes [head_dim / 2] and a scale.
void EncodeShadowKey(const float* key, const float* balance, int head_dim, uint8_t* codes,
                     Float16* scale);

// A query in codes.
struct ShadowQuery {
  float factor;  // NaN if the query holds a NaN or an infinity
  int32_t sum;   // of the codes
};

// Writes a query's codes [head_dim]: those of the even dims, then those of the odd ones.
ShadowQuery EncodeShadowQuery(const float* query, const float* balance, int head_dim,
                              int8_t* codes);

}  // namespace tidal
