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

inline constexpr int kShadowBias = 8;  // of a stored key code

struct QueryCodes {
  const int8_t* codes;
  int64_t head_dim;
  int32_t bias;  // what the bias of the keys' codes adds to each product
  float factor;
};

// Some tokens' codes, a byte each and a token behind the other: even dims in front.
struct CodesInRows {
  static constexpr int kTokens = 8;

  void Unpack(const uint8_t* packed, int64_t head_dim);
  // products[i] = sum of query[d] * codes[i][d].
  void Multiply(const int8_t* query, int64_t head_dim, int32_t* products) const;
  // out[i] = the score of token i.
  void Score(const QueryCodes& query, const float* scales, float* out) const;

  uint8_t codes[kTokens * kShadowMaxDim];  // [kTokens][kShadowMaxDim]
};

inline void CodesInRows::Unpack(const uint8_t* packed, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int token = 0; token < kTokens; ++token, packed += half) {
    uint8_t* row = codes + token * kShadowMaxDim;
    int64_t i = 0;
#if defined(TIDAL_CPU_ISA_AVX2) || defined(TIDAL_CPU_ISA_AVX512)
    const __m256i low = _mm256_set1_epi8(0x0f);
    for (; i + 32 <= half; i += 32) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + i));
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i), _mm256_and_si256(both, low));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + half + i), high);
    }
#endif
    for (; i < half; ++i) {
      row[i] = packed[i] & 0x0f;
      row[half + i] = packed[i] >> 4;
    }
  }
}

inline void CodesInRows::Multiply(const int8_t* query, int64_t head_dim, int32_t* products) const {
#if defined(TIDAL_CPU_ISA_AVX2) || defined(TIDAL_CPU_ISA_AVX512)
  if (head_dim % 32 == 0) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i acc[kTokens];
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) acc[i] = _mm256_setzero_si256();
    for (int64_t d = 0; d < head_dim; d += 32) {
      const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + d));
#pragma GCC unroll 8
      for (int i = 0; i < kTokens; ++i) {
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
  for (int i = 0; i < kTokens; ++i) {
    int32_t sum = 0;
    for (int64_t d = 0; d < head_dim; ++d) sum += query[d] * codes[i * kShadowMaxDim + d];
    products[i] = sum;
  }
}

inline void CodesInRows::Score(const QueryCodes& query, const float* scales, float* out) const {
  int32_t products[kTokens];
  Multiply(query.codes, query.head_dim, products);
  for (int i = 0; i < kTokens; ++i) {
    out[i] = static_cast<float>(products[i] - query.bias) * (scales[i] * query.factor);
  }
}

#if defined(TIDAL_CPU_ISA_AVX512)
// The codes of 16 tokens, a lane for each, so that no sum goes across lanes. For a head_dim that is
// a multiple of 64.
struct CodesInLanes {
  static constexpr int kTokens = 16;

  void Unpack(const uint8_t* packed, int64_t head_dim);
  __m512i Multiply(const int8_t* query, int64_t head_dim) const;
  void Score(const QueryCodes& query, const float* scales, float* out) const;

  __m512i codes[kShadowMaxDim / 4];  // [d]: dims 4d to 4d + 3, in the order of a query's
};

// Adds a sum of four products to every lane.
inline __m512i AddProducts(__m512i sum, __m512i codes, __m512i query) {
#if defined(TIDAL_CPU_ISA_VNNI)
  return _mm512_dpbusd_epi32(sum, codes, query);
#else
  const __m512i pairs = _mm512_maddubs_epi16(codes, query);  // of at most 2 * 15 * 127
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

// 32 bytes of two tokens.
inline __m512i LoadTwo(const uint8_t* first, const uint8_t* second) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

inline void CodesInLanes::Unpack(const uint8_t* packed, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  const __m512i mask = _mm512_set1_epi8(0x0f);
  for (int64_t i = 0; i < half; i += 32, packed += 32) {
    // By transposition: words [token][8] become words [8][token].
    __m512i quads[2][4];  // [h][w]: words w and w + 4 of tokens 8h to 8h + 7
#pragma GCC unroll 2
    for (int64_t h = 0; h < 2; ++h) {
      const uint8_t* from = packed + 8 * h * half;
      const __m512i a = LoadTwo(from, from + 4 * half);
      const __m512i b = LoadTwo(from + half, from + 5 * half);
      const __m512i c = LoadTwo(from + 2 * half, from + 6 * half);
      const __m512i d = LoadTwo(from + 3 * half, from + 7 * half);
      const __m512i ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
      const __m512i cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
      quads[h][0] = _mm512_unpacklo_epi64(ab0, cd0);
      quads[h][1] = _mm512_unpackhi_epi64(ab0, cd0);
      quads[h][2] = _mm512_unpacklo_epi64(ab1, cd1);
      quads[h][3] = _mm512_unpackhi_epi64(ab1, cd1);
    }
#pragma GCC unroll 8
    for (int w = 0; w < 8; ++w) {
      const __m512i both = w < 4 ? _mm512_shuffle_i32x4(quads[0][w], quads[1][w], 0x88)
                                 : _mm512_shuffle_i32x4(quads[0][w - 4], quads[1][w - 4], 0xdd);
      codes[i / 4 + w] = _mm512_and_si512(both, mask);
      codes[(half + i) / 4 + w] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    }
  }
}

inline __m512i CodesInLanes::Multiply(const int8_t* query, int64_t head_dim) const {
  __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                     _mm512_setzero_si512()};
  for (int64_t i = 0; i < head_dim / 4; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      int32_t dims;
      __builtin_memcpy(&dims, query + 4 * (i + j), sizeof(dims));
      sums[j] = AddProducts(sums[j], codes[i + j], _mm512_set1_epi32(dims));
    }
  }
  return _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
}

inline void CodesInLanes::Score(const QueryCodes& query, const float* scales, float* out) const {
  const __m512i products =
      _mm512_sub_epi32(Multiply(query.codes, query.head_dim), _mm512_set1_epi32(query.bias));
  Store(out, Mul(_mm512_cvtepi32_ps(products), Mul(Load(scales), Set1(query.factor))));
}
#endif

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

// Where some tokens' codes and scales lie, one behind the other.
struct ShadowTokens {
  const uint8_t* codes;
  const uint16_t* scales;
};

// Walks through the tokens of a span, so many at a time.
template <int kTokens>
class ShadowReader {
 public:
  explicit ShadowReader(const ShadowSpan& span)
      : span_(span),
        page_(span.begin / span.page_size),
        slot_(span.begin - page_ * span.page_size),
        last_page_((span.end - 1) / span.page_size) {}

  // The next `count` tokens, and any values behind them.
  ShadowTokens Next(int count) {
    const int64_t half = span_.head_dim / 2;
    Prefetch();
    if (slot_ + kTokens <= span_.page_size) {
      const int64_t token = TokenAt(page_, slot_);
      Skip(kTokens);
      return {span_.codes + token * half, span_.scales + token};
    }
    for (int i = 0; i < count; ++i) {
      const int64_t token = TokenAt(page_, slot_);
      __builtin_memcpy(codes_ + i * half, span_.codes + token * half, static_cast<size_t>(half));
      scales_[i] = span_.scales[token];
      Skip(1);
    }
    return {codes_, scales_};
  }

 private:
  int64_t TokenAt(int64_t page, int64_t slot) const {
    return span_.page_table[page] * span_.page_stride + slot;
  }

  void Skip(int64_t count) {
    slot_ += count;
    if (slot_ < span_.page_size) return;
    slot_ -= span_.page_size;
    ++page_;
  }

  // A page ahead, which is far enough for memory.
  void Prefetch() const {
    const int64_t half = span_.head_dim / 2;
    const int64_t ahead = TokenAt(Smaller(page_ + 1, last_page_), slot_);
    const uint8_t* codes = span_.codes + ahead * half;
    for (int64_t byte = 0; byte < kTokens * half; byte += 64) __builtin_prefetch(codes + byte);
    __builtin_prefetch(span_.scales + ahead);
  }

  const ShadowSpan& span_;
  int64_t page_, slot_;
  const int64_t last_page_;
  uint8_t codes_[kTokens * kShadowMaxDim / 2];
  uint16_t scales_[kTokens] = {};
};

template <typename Codes>
inline void ScoreCodes(const ShadowSpan& span) {
  constexpr int kTokens = Codes::kTokens;
  ShadowReader<kTokens> reader(span);
  Codes codes;
  float scales[Larger(kTokens, kWidth)], last[kTokens];
  for (int64_t first = span.begin; first < span.end; first += kTokens) {
    const int count = static_cast<int>(Smaller<int64_t>(kTokens, span.end - first));
    const ShadowTokens tokens = reader.Next(count);
    codes.Unpack(tokens.codes, span.head_dim);
    for (int i = 0; i < kTokens; i += kWidth) {
      const auto* stored = reinterpret_cast<const Float16*>(tokens.scales) + i;
      Store(scales + i, kTokens < kWidth ? LoadPartial(stored, kTokens) : Load(stored));
    }
    for (int64_t m = 0; m < span.num_queries; ++m) {
      const QueryCodes query = {span.queries + m * span.head_dim, span.head_dim,
                                kShadowBias * span.sums[m], span.factors[m]};
      float* scores = span.scores + m * span.scores_stride + first;
      if (count == kTokens) {
        codes.Score(query, scales, scores);
        continue;
      }
      codes.Score(query, scales, last);
      for (int i = 0; i < count; ++i) scores[i] = last[i];
    }
  }
}

inline void ScoreShadow(const ShadowSpan& span) {
#if defined(TIDAL_CPU_ISA_AVX512)
  span.head_dim % 64 == 0 ? ScoreCodes<CodesInLanes>(span) : ScoreCodes<CodesInRows>(span);
#else
  ScoreCodes<CodesInRows>(span);
#endif
  for (int64_t m = 0; m < span.num_queries; ++m) {
    float* scores = span.scores + m * span.scores_stride + span.begin;
    CapInPlace(scores, span.softcap, span.end - span.begin);
    SumWeights(scores, span.end - span.begin, span.partial + m * PartialStride(0));
  }
}

}  // namespace tidal::TIDAL_CPU_ISA
