// AVX2 + FMA + F16C float vectors. Included by simd.h inside the namespace of the instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/float16.h"
#include "core/float8.h"

namespace tidal::TIDAL_CPU_ISA {

using Vec = __m256;
inline constexpr int kWidth = 8;

inline Vec Zero() {
  return _mm256_setzero_ps();
}
inline Vec Set1(float x) {
  return _mm256_set1_ps(x);
}
inline Vec Add(Vec a, Vec b) {
  return _mm256_add_ps(a, b);
}
inline Vec Sub(Vec a, Vec b) {
  return _mm256_sub_ps(a, b);
}
inline Vec Mul(Vec a, Vec b) {
  return _mm256_mul_ps(a, b);
}
inline Vec Div(Vec a, Vec b) {
  return _mm256_div_ps(a, b);
}
inline Vec Fma(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
// If either is NaN: b.
inline Vec Max(Vec a, Vec b) {
  return _mm256_max_ps(a, b);
}
inline Vec Min(Vec a, Vec b) {
  return _mm256_min_ps(a, b);
}
inline Vec Round(Vec a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a * 2^n, n whole in [-252, 254]; overflows to inf, underflows through subnormals. In two steps,
// each with a normal factor.
inline Vec ScaleByPowerOf2(Vec a, Vec n) {
  __m256i whole = _mm256_cvtps_epi32(n);
  __m256i half = _mm256_srai_epi32(whole, 1);
  __m256i rest = _mm256_sub_epi32(whole, half);
  const __m256i bias = _mm256_set1_epi32(127);
  __m256i f0 = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  __m256i f1 = _mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23);
  return Mul(Mul(a, _mm256_castsi256_ps(f0)), _mm256_castsi256_ps(f1));
}

inline Vec Load(const float* p) {
  return _mm256_loadu_ps(p);
}
inline Vec Load(const BFloat16* p) {
  __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline Vec Load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec Load(const int8_t* p) {
  __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
}
// kWidth float8 e4m3fn in the places of a float16's sign, exponent and mantissa: their values /
// 2^8, as its exponent has another bias. NaN becomes 480 / 2^8.
inline __m128i WidenFloat8(const void* codes) {
  __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(codes)));
  wide = _mm_slli_epi16(wide, 7);
  return _mm_and_si128(wide, _mm_set1_epi16(static_cast<int16_t>(0xbf80)));
}
inline Vec Load(const Float8* p) {
  const __m128i bits = WidenFloat8(p), largest = _mm_set1_epi16(0x3f80);
  const __m128i is_nan = _mm_cmpeq_epi16(_mm_and_si128(bits, largest), largest);
  return Mul(_mm256_cvtph_ps(_mm_or_si128(bits, is_nan)), Set1(256.0f));
}
inline void Store(float* p, Vec a) {
  _mm256_storeu_ps(p, a);
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
  return _mm256_cvtph_ps(WidenFloat8(codes));
}

// A number for each code of 4 bits.
struct CodeTable {
  Vec low;   // of codes below 8
  Vec high;  // of the others
};
// (code - zero) * scale
inline CodeTable Int4Table(Vec zero, Vec scale) {
  const Vec low = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
  const Vec high = _mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15);
  return {Mul(Sub(low, zero), scale), Mul(Sub(high, zero), scale)};
}
// values [16], each times scale.
inline CodeTable ScaledTable(const float* values, Vec scale) {
  return {Mul(Load(values), scale), Mul(Load(values + 8), scale)};
}
// The numbers of kWidth codes, the first of two in the lower bits.
inline Vec LookUp(const CodeTable& table, const uint8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, sizeof(word));
  const __m256i places = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  // Only the lowest 3 bits of an index count; the fourth chooses the table.
  const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(word), places);
  const Vec is_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index),
                          _mm256_permutevar8x32_ps(table.high, index), is_high);
}

// Lane i = the sum of v[i]'s lanes. Every v[i] is summed in the same order, that of ReduceAdd.
inline Vec ReduceAddEach(const Vec* v) {
  Vec quads[2];
#pragma GCC unroll 2
  for (int64_t i = 0; i < 2; ++i) {
    const Vec* a = v + 4 * i;
    Vec t0 = Add(_mm256_unpacklo_ps(a[0], a[1]), _mm256_unpackhi_ps(a[0], a[1]));
    Vec t1 = Add(_mm256_unpacklo_ps(a[2], a[3]), _mm256_unpackhi_ps(a[2], a[3]));
    __m256d d0 = _mm256_castps_pd(t0), d1 = _mm256_castps_pd(t1);
    quads[i] = Add(_mm256_castpd_ps(_mm256_unpacklo_pd(d0, d1)),
                   _mm256_castpd_ps(_mm256_unpackhi_pd(d0, d1)));
  }
  return Add(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
             _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
}

inline float ReduceAdd(Vec a) {
  a = Add(a, _mm256_permute_ps(a, 0x4e));
  a = Add(a, _mm256_permute_ps(a, 0xb1));
  a = Add(a, _mm256_permute2f128_ps(a, a, 0x01));
  return _mm256_cvtss_f32(a);
}

inline float ReduceMax(Vec a) {
  a = Max(a, _mm256_permute_ps(a, 0x4e));
  a = Max(a, _mm256_permute_ps(a, 0xb1));
  a = Max(a, _mm256_permute2f128_ps(a, a, 0x01));
  return _mm256_cvtss_f32(a);
}

}  // namespace tidal::TIDAL_CPU_ISA
