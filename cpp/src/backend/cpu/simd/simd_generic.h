// Four-lane float vectors in the vector extension of GCC and Clang: SSE2, NEON or plain scalars, as
// the target has them. Included by simd.h inside the namespace of the instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/float16.h"
#include "core/float8.h"

namespace tidal::TIDAL_CPU_ISA {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
inline constexpr int kWidth = 4;

inline Vec Zero() {
  return Vec{0.0f, 0.0f, 0.0f, 0.0f};
}
inline Vec Set1(float x) {
  return Vec{x, x, x, x};
}
inline Vec Add(Vec a, Vec b) {
  return a + b;
}
inline Vec Sub(Vec a, Vec b) {
  return a - b;
}
inline Vec Mul(Vec a, Vec b) {
  return a * b;
}
inline Vec Div(Vec a, Vec b) {
  return a / b;
}
inline Vec Fma(Vec a, Vec b, Vec c) {
  return a * b + c;
}
// If either is NaN: b.
inline Vec Max(Vec a, Vec b) {
  return a > b ? a : b;
}
inline Vec Min(Vec a, Vec b) {
  return a < b ? a : b;
}
// To nearest even, |a| < 2^22: adding 1.5 x 2^23 leaves no bits for a fraction.
inline Vec Round(Vec a) {
  const Vec shift = Set1(12582912.0f);
  return (a + shift) - shift;
}
// a * 2^n, n whole in [-252, 254]; overflows to inf, underflows through subnormals. In two steps,
// each with a normal factor. A NaN n gives some finite factor: a is NaN then.
inline Vec ScaleByPowerOf2(Vec a, Vec n) {
  // n + 1.5 x 2^23 holds n in its low mantissa bits.
  IntVec whole = (IntVec)(n + Set1(12582912.0f)) - 0x4b400000;
  IntVec half = whole >> 1;
  IntVec rest = whole - half;
  Vec f0 = (Vec)(((half + 127) & 0xff) << 23);
  Vec f1 = (Vec)(((rest + 127) & 0xff) << 23);
  return a * f0 * f1;
}

inline Vec Load(const float* p) {
  Vec a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
inline Vec Load(const BFloat16* p) {
  IntVec wide = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  return (Vec)(wide << 16);
}
inline float Widen(Float16 value) {
  uint32_t magnitude = value.bits & 0x7fffu;
  uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  // 2^112 moves the exponent from float16's bias to float32's and makes subnormals right.
  uint32_t shifted = magnitude << 13;
  float result;
  std::memcpy(&result, &shifted, sizeof(result));
  result *= 5.192296858534828e33f;
  uint32_t bits;
  std::memcpy(&bits, &result, sizeof(bits));
  if (magnitude >= 0x7c00u) bits = 0x7f800000u | shifted;
  bits |= sign;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
inline Vec Load(const Float16* p) {
  return Vec{Widen(p[0]), Widen(p[1]), Widen(p[2]), Widen(p[3])};
}
inline Vec Load(const int8_t* p) {
  return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
             static_cast<float>(p[3])};
}
struct Float8Table {
  float values[256];
};
constexpr Float8Table MakeFloat8Table() {
  Float8Table table = {};
  for (int code = 0; code < 256; ++code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    float size = static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa) * 0x1p-9f;
    for (int i = 1; i < exponent; ++i) size *= 2.0f;
    if (exponent == 15 && mantissa == 7) size = __builtin_nanf("");
    table.values[code] = code < 128 ? size : -size;
  }
  return table;
}
inline constexpr Float8Table kFloat8Table = MakeFloat8Table();
inline Vec Load(const Float8* p) {
  const float* values = kFloat8Table.values;
  return Vec{values[p[0].bits], values[p[1].bits], values[p[2].bits], values[p[3].bits]};
}
inline void Store(float* p, Vec a) {
  std::memcpy(p, &a, sizeof(a));
}

// The first `count` lanes, 0 < count < kWidth; the others are 0 and their memory is not touched.
template <typename T>
inline Vec LoadPartial(const T* p, int count) {
  T lanes[kWidth] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return Load(lanes);
}
inline void StorePartial(float* p, Vec a, int count) {
  float lanes[kWidth];
  Store(lanes, a);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(float));
}

// kWidth float8 e4m3fn that are numbers, / 2^8.
inline Vec LoadFloat8(const uint8_t* codes) {
  return Mul(Load(reinterpret_cast<const Float8*>(codes)), Set1(0x1p-8f));
}

// A number for each code of 4 bits.
struct CodeTable {
  float values[16];
};
// (code - zero) * scale
inline CodeTable Int4Table(Vec zero, Vec scale) {
  CodeTable table;
  for (int code = 0; code < 16; ++code) {
    table.values[code] = (static_cast<float>(code) - zero[0]) * scale[0];
  }
  return table;
}
// values [16], each times scale.
inline CodeTable ScaledTable(const float* values, Vec scale) {
  CodeTable table;
  for (int code = 0; code < 16; ++code) table.values[code] = values[code] * scale[0];
  return table;
}
// The numbers of kWidth codes, the first of two in the lower bits.
inline Vec LookUp(const CodeTable& table, const uint8_t* codes) {
  const float* values = table.values;
  return Vec{values[codes[0] & 15], values[codes[0] >> 4], values[codes[1] & 15],
             values[codes[1] >> 4]};
}

inline float ReduceAdd(Vec a) {
  return (a[0] + a[2]) + (a[1] + a[3]);
}
inline float ReduceMax(Vec a) {
  Vec b = Max(a, Vec{a[2], a[3], a[0], a[1]});
  return Max(b, Vec{b[1], b[0], b[1], b[0]})[0];
}
// Lane i = the sum of v[i]'s lanes, in the order of ReduceAdd.
inline Vec ReduceAddEach(const Vec* v) {
  return Vec{ReduceAdd(v[0]), ReduceAdd(v[1]), ReduceAdd(v[2]), ReduceAdd(v[3])};
}

}  // namespace tidal::TIDAL_CPU_ISA
