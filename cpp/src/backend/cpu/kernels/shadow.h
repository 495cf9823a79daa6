// Scores from keys of 4 bits and queries of 8: integer products (core/shadow_code.h), so every
// instruction set gives the same bits.
#pragma once

#if defined(TIDAL_CPU_ISA_AVX2) || defined(TIDAL_CPU_ISA_AVX512)
#include <immintrin.h>
#endif

#include "backend/cpu/kernels/attend.h"
#include "backend/cpu/kernels/kernels.h"
#include "backend/cpu/simd/simd.h"

namespace tidal::TIDAL_CPU_ISA {

inline constexpr int kShadowTokens = 8;  // scored together
inline constexpr int kShadowBias = 8;    // of a stored key code

// Some tokens' codes, a byte each, even dims in front; and their scales.
struct ShadowBlock {
  uint8_t codes[kShadowTokens * kShadowMaxDim];  // [kShadowTokens][kShadowMaxDim]
  float scales[kShadowTokens];
};

inline void UnpackShadow(const uint8_t* packed, int64_t head_dim, uint8_t* codes) {
  const int64_t half = head_dim / 2;
  int64_t i = 0;
#if defined(TIDAL_CPU_ISA_AVX2) || defined(TIDAL_CPU_ISA_AVX512)
  const __m256i low = _mm256_set1_epi8(0x0f);
  for (; i + 32 <= half; i += 32) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + i));
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), _mm256_and_si256(both, low));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + half + i), high);
  }
#endif
  for (; i < half; ++i) {
    codes[i] = packed[i] & 0x0f;
    codes[half + i] = packed[i] >> 4;
  }
}

// products[i] = sum of query[d] * codes[i][d], for kShadowTokens tokens.
inline void MultiplyShadow(const int8_t* query, const uint8_t* codes, int64_t head_dim,
                           int32_t* products) {
#if defined(TIDAL_CPU_ISA_AVX2) || defined(TIDAL_CPU_ISA_AVX512)
  if (head_dim % 32 == 0) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i acc[kShadowTokens];
#pragma GCC unroll 8
    for (int i = 0; i < kShadowTokens; ++i) acc[i] = _mm256_setzero_si256();
    for (int64_t d = 0; d < head_dim; d += 32) {
      const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + d));
#pragma GCC unroll 8
      for (int i = 0; i < kShadowTokens; ++i) {
        const __m256i k =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * kShadowMaxDim + d));
        // Two products of at most 15 * 127 fit in 16 bits.
        acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(_mm256_maddubs_epi16(k, q), ones));
      }
    }
    const __m256i s01 = _mm256_hadd_epi32(acc[0], acc[1]), s23 = _mm256_hadd_epi32(acc[2], acc[3]);
    const __m256i s45 = _mm256_hadd_epi32(acc[4], acc[5]), s67 = _mm256_hadd_epi32(acc[6], acc[7]);
    const __m256i s0123 = _mm256_hadd_epi32(s01, s23), s4567 = _mm256_hadd_epi32(s45, s67);
    const __m256i sums = _mm256_add_epi32(_mm256_permute2x128_si256(s0123, s4567, 0x20),
                                          _mm256_permute2x128_si256(s0123, s4567, 0x31));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(products), sums);
    return;
  }
#endif
  for (int i = 0; i < kShadowTokens; ++i) {
    int32_t sum = 0;
    for (int64_t d = 0; d < head_dim; ++d) sum += query[d] * codes[i * kShadowMaxDim + d];
    products[i] = sum;
  }
}

// Writes the maximum of a span's scores and the sum of their weights; a NaN reaches the sum.
inline void SumWeights(const float* scores, int64_t count, float* record) {
  Vec largest = Set1(kMinusInf);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) largest = Max(largest, Load(scores + i));
  float maximum = ReduceMax(largest);
  for (; i < count; ++i) maximum = scores[i] > maximum ? scores[i] : maximum;
  const float shift = maximum == kMinusInf ? 0.0f : maximum;
  Vec total = Zero();
  for (i = 0; i + kWidth <= count; i += kWidth) {
    total = Add(total, Exp(Sub(Load(scores + i), Set1(shift))));
  }
  float sum = ReduceAdd(total);
  for (; i < count; ++i) sum += ExpScalar(scores[i] - shift);
  record[0] = maximum;
  record[1] = sum;
}

inline void ScoreShadow(const ShadowSpan& span) {
  ShadowBlock block = {};
  int32_t products[kShadowTokens];
  const int64_t half = span.head_dim / 2;
  int64_t page = span.begin / span.page_size;
  int64_t slot = span.begin - page * span.page_size;
  const int64_t last_page = (span.end - 1) / span.page_size;
  for (int64_t first = span.begin; first < span.end; first += kShadowTokens) {
    const int count = static_cast<int>(Smaller<int64_t>(kShadowTokens, span.end - first));
    for (int i = 0; i < count; ++i) {
      const int64_t token = span.page_table[page] * span.page_stride + slot;
      // A page ahead, which is far enough for memory. A line holds the scales of many tokens.
      const int64_t ahead = span.page_table[Smaller(page + 1, last_page)] * span.page_stride + slot;
      __builtin_prefetch(span.codes + ahead * half);
      if (slot % 16 == 0) __builtin_prefetch(span.scales + ahead);
      UnpackShadow(span.codes + token * half, span.head_dim, block.codes + i * kShadowMaxDim);
      block.scales[i] = LoadScalar(reinterpret_cast<const Float16*>(span.scales + token));
      if (++slot == span.page_size) {
        slot = 0;
        ++page;
      }
    }
    for (int64_t m = 0; m < span.num_queries; ++m) {
      MultiplyShadow(span.queries + m * span.head_dim, block.codes, span.head_dim, products);
      float* scores = span.scores + m * span.scores_stride + first;
      for (int i = 0; i < count; ++i) {
        const int32_t product = products[i] - kShadowBias * span.sums[m];
        scores[i] = static_cast<float>(product) * (block.scales[i] * span.factors[m]);
      }
    }
  }
  for (int64_t m = 0; m < span.num_queries; ++m) {
    float* scores = span.scores + m * span.scores_stride + span.begin;
    CapInPlace(scores, span.softcap, span.end - span.begin);
    SumWeights(scores, span.end - span.begin, span.partial + m * PartialStride(0));
  }
}

}  // namespace tidal::TIDAL_CPU_ISA
