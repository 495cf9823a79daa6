// AVX-512 (F, BW, VL, DQ) float vectors. Included by simd.h inside the namespace of the instruction
// set.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/float16.h"
#include "core/float8.h"

namespace tidal::TIDAL_CPU_ISA {

using Vec = __m512;
inline constexpr int kWidth = 16;

inline Vec Zero() {
  return _mm512_setzero_ps();
}
inline Vec Set1(float x) {
  return _mm512_set1_ps(x);
}
inline Vec Add(Vec a, Vec b) {
  return _mm512_add_ps(a, b);
}
inline Vec Sub(Vec a, Vec b) {
  return _mm512_sub_ps(a, b);
}
inline Vec Mul(Vec a, Vec b) {
  return _mm512_mul_ps(a, b);
}
inline Vec Div(Vec a, Vec b) {
  return _mm512_div_ps(a, b);
}
inline Vec Fma(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
// If either is NaN: b.
inline Vec Max(Vec a, Vec b) {
  return _mm512_max_ps(a, b);
}
inline Vec Min(Vec a, Vec b) {
  return _mm512_min_ps(a, b);
}
inline Vec Round(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a * 2^n, n whole; overflows to inf, underflows through subnormals.
inline Vec ScaleByPowerOf2(Vec a, Vec n) {
  return _mm512_scalef_ps(a, n);
}

inline Vec Load(const float* p) {
  return _mm512_loadu_ps(p);
}
inline Vec Load(const BFloat16* p) {
  __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline Vec Load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec Load(const int8_t* p) {
  __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
}
// kWidth float8 e4m3fn in the places of a float16's sign, exponent and mantissa: their values /
// 2^8, as its exponent has another bias. NaN becomes 480 / 2^8.
inline __m256i WidenFloat8(__m128i codes) {
  __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
  return _mm256_and_si256(wide, _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
}
inline Vec DecodeFloat8(__m128i codes) {
  const __m256i bits = WidenFloat8(codes), largest = _mm256_set1_epi16(0x3f80);
  const __m256i is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(bits, largest), largest);
  return Mul(_mm512_cvtph_ps(_mm256_or_si256(bits, is_nan)), Set1(256.0f));
}
inline Vec Load(const Float8* p) {
  return DecodeFloat8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void Store(float* p, Vec a) {
  _mm512_storeu_ps(p, a);
}

// The first `count` lanes, 0 < count < kWidth; the others are 0 and their memory is not touched.
inline Vec LoadPartial(const float* p, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
}
inline __m256i LoadPartial16(const void* p, int count) {
  return _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1u), p);
}
inline Vec LoadPartial(const BFloat16* p, int count) {
  __m512i wide = _mm512_cvtepu16_epi32(LoadPartial16(p, count));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec LoadPartial(const Float16* p, int count) {
  return _mm512_cvtph_ps(LoadPartial16(p, count));
}
inline Vec LoadPartial(const int8_t* p, int count) {
  __m128i raw = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1u), p);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
}
inline Vec LoadPartial(const Float8* p, int count) {
  return DecodeFloat8(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1u), p));
}
inline void StorePartial(float* p, Vec a, int count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), a);
}

// kWidth float8 e4m3fn that are numbers, / 2^8.
inline Vec LoadFloat8(const uint8_t* codes) {
  return _mm512_cvtph_ps(WidenFloat8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
}

// A number for each code of 4 bits.
struct CodeTable {
  Vec values;
};
// (code - zero) * scale
inline CodeTable Int4Table(Vec zero, Vec scale) {
  const Vec codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {Mul(Sub(codes, zero), scale)};
}
// values [16], each times scale.
inline CodeTable ScaledTable(const float* values, Vec scale) {
  return {Mul(Load(values), scale)};
}
// The numbers of kWidth codes, the first of two in the lower bits.
inline Vec LookUp(const CodeTable& table, const uint8_t* codes) {
  int64_t eight;
  std::memcpy(&eight, codes, sizeof(eight));
  // Each 128 bits have all 8 bytes: lane i takes byte i / 2, and of that the half i % 2.
  const __m512i bytes = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512i places = _mm512_set1_epi64(int64_t{4} << 32);
  const __m512i pairs = _mm512_shuffle_epi8(_mm512_set1_epi64(eight), bytes);
  // Only the lowest 4 bits of an index count.
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(pairs, places), table.values);
}

// Lane i = the sum of v[i]'s lanes. Every v[i] is summed in the same order, that of ReduceAdd.
inline Vec ReduceAddEach(const Vec* v) {
  Vec quads[4];
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i) {
    const Vec* a = v + 4 * i;
    Vec t0 = Add(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    Vec t1 = Add(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    __m512d d0 = _mm512_castps_pd(t0), d1 = _mm512_castps_pd(t1);
    quads[i] = Add(_mm512_castpd_ps(_mm512_unpacklo_pd(d0, d1)),
                   _mm512_castpd_ps(_mm512_unpackhi_pd(d0, d1)));
  }
  Vec w0 = Add(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88),
               _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
  Vec w1 = Add(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88),
               _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
  return Add(_mm512_shuffle_f32x4(w0, w1, 0x88), _mm512_shuffle_f32x4(w0, w1, 0xdd));
}

inline float ReduceAdd(Vec a) {
  a = Add(a, _mm512_permute_ps(a, 0x4e));
  a = Add(a, _mm512_permute_ps(a, 0xb1));
  a = Add(a, _mm512_shuffle_f32x4(a, a, 0xb1));
  a = Add(a, _mm512_shuffle_f32x4(a, a, 0x4e));
  return _mm512_cvtss_f32(a);
}

inline float ReduceMax(Vec a) {
  a = Max(a, _mm512_permute_ps(a, 0x4e));
  a = Max(a, _mm512_permute_ps(a, 0xb1));
  a = Max(a, _mm512_shuffle_f32x4(a, a, 0xb1));
  a = Max(a, _mm512_shuffle_f32x4(a, a, 0x4e));
  return _mm512_cvtss_f32(a);
}

}  // namespace tidal::TIDAL_CPU_ISA
