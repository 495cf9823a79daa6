// Decode attention over one span of tokens, the merge of spans, and the softmax of prefill scores.
//
// K and V rows are read once for the whole query group, kTokenBlock tokens at a time. The
// arithmetic of a query depends on the sequence of tokens alone: not on page_size, on the other
// queries or on threads.
#pragma once

#include <type_traits>

#include "backend/cpu/kernels/kernels.h"
#include "backend/cpu/simd/simd.h"

namespace tidal::TIDAL_CPU_ISA {

// Queries handled together: 4 x 4 accumulators (AVX-512), 4 x 2 (others) and their operands fit the
// registers.
inline constexpr int kQueryBlock = 4;
inline constexpr int kTokenStep = kWidth == 16 ? 4 : 2;
inline constexpr int kDimStep = kWidth == 16 ? 4 : 2;

inline constexpr float kMinusInf = -__builtin_inff();

// Whether each row has a scale of its own.
template <typename T>
inline constexpr bool kIsScaled = std::is_same_v<T, int8_t>;

template <typename T>
struct TokenRows {
  const T* k[kTokenBlock];
  const T* v[kTokenBlock];  // without values: k
  // For int8 rows, which are codes x scale.
  float k_scale[kTokenBlock];
  float v_scale[kTokenBlock];

  void Set(const AttendSpan& span, int i, int64_t row) {
    const void* values = span.v_pages != nullptr ? span.v_pages : span.k_pages;
    k[i] = static_cast<const T*>(span.k_pages) + row * span.head_dim;
    v[i] = static_cast<const T*>(values) + row * span.head_dim;
    if constexpr (kIsScaled<T>) {
      k_scale[i] = span.k_scales[row];
      v_scale[i] = span.v_scales[row];
    }
  }
};

// Rows of span elements [first, first + count); up to a full block the last row again, so that
// whole vectors of tokens can be scored and a full block before this one can prefetch from it.
template <typename T>
void FindRows(const AttendSpan& span, int64_t first, int count, TokenRows<T>& rows) {
  if (span.token_idx != nullptr) {
    const uint32_t page_size = static_cast<uint32_t>(span.page_size);
    for (int i = 0; i < count; ++i) {
      uint32_t position = static_cast<uint32_t>(span.token_idx[first + i]);
      uint32_t page = position / page_size;
      rows.Set(span, i, span.page_table[page] * span.page_rows + position % page_size);
    }
  } else {
    int64_t page = first / span.page_size;
    int64_t slot = first - page * span.page_size;
    int64_t row = span.page_table[page] * span.page_rows + slot;
    for (int i = 0; i < count; ++i) {
      rows.Set(span, i, row++);
      if (++slot == span.page_size && i + 1 < count) {
        slot = 0;
        row = span.page_table[++page] * span.page_rows;
      }
    }
  }
  for (int i = count; i < kTokenBlock; ++i) {
    rows.k[i] = rows.k[count - 1];
    rows.v[i] = rows.v[count - 1];
    if constexpr (kIsScaled<T>) {
      rows.k_scale[i] = rows.k_scale[count - 1];
      rows.v_scale[i] = rows.v_scale[count - 1];
    }
  }
}

// Whether dim d of a row is the first in a cache line, where rows begin with one.
template <typename T>
constexpr bool BeginsLine(int64_t d) {
  return d % (64 / static_cast<int64_t>(sizeof(T))) == 0;
}

// scores[m * kTokenBlock + i] = q[m] . k[i] for one vector of tokens. `ahead` are rows needed soon:
// memory is read all the time, while the arithmetic works on what has arrived.
template <typename T, int kQueries>
void ScoreTokens(const float* const* q, const T* const* k, const T* const* ahead, int64_t head_dim,
                 float sm_scale, float* scores) {
  Vec partial[kQueries][kWidth];
  for (int first = 0; first < kWidth; first += kTokenStep) {
    Vec acc[kQueries][kTokenStep];
#pragma GCC unroll 4
    for (int m = 0; m < kQueries; ++m) {
#pragma GCC unroll 4
      for (int i = 0; i < kTokenStep; ++i) acc[m][i] = Zero();
    }
    auto step = [&](auto load, int64_t d) {
      Vec row[kTokenStep];
#pragma GCC unroll 4
      for (int i = 0; i < kTokenStep; ++i) {
        row[i] = load(k[first + i] + d);
        if (BeginsLine<T>(d)) __builtin_prefetch(ahead[first + i] + d);
      }
#pragma GCC unroll 4
      for (int m = 0; m < kQueries; ++m) {
        Vec query = load(q[m] + d);
#pragma GCC unroll 4
        for (int i = 0; i < kTokenStep; ++i) acc[m][i] = Fma(query, row[i], acc[m][i]);
      }
    };
    int64_t d = 0;
    for (; d + kWidth <= head_dim; d += kWidth) {
      step([](const auto* p) { return Load(p); }, d);
    }
    if (d < head_dim) {
      const int rest = static_cast<int>(head_dim - d);
      step([rest](const auto* p) { return LoadPartial(p, rest); }, d);
    }
#pragma GCC unroll 4
    for (int m = 0; m < kQueries; ++m) {
#pragma GCC unroll 4
      for (int i = 0; i < kTokenStep; ++i) partial[m][first + i] = acc[m][i];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kQueries; ++m) {
    Store(scores + m * kTokenBlock, Mul(ReduceAddEach(partial[m]), Set1(sm_scale)));
  }
}

// acc[m][d .. d + kVecs * kWidth) += sum of weights[m][i] * v[i], i ascending; `load` and `store`
// access one vector or, with kVecs == 1, a part of one.
template <int kQueries, int kVecs, typename T, typename LoadFn, typename StoreFn>
void AddValueDims(const float* weights, const T* const* v, const T* const* ahead, int count,
                  int64_t d, float* const* acc, LoadFn load, StoreFn store) {
  Vec sum[kQueries][kVecs];
#pragma GCC unroll 4
  for (int m = 0; m < kQueries; ++m) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVecs; ++j) sum[m][j] = load(acc[m] + d + j * kWidth);
  }
  for (int i = 0; i < count; ++i) {
    Vec row[kVecs];
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVecs; ++j) {
      row[j] = load(v[i] + d + j * kWidth);
      if (BeginsLine<T>(d + j * kWidth)) __builtin_prefetch(ahead[i] + d + j * kWidth);
    }
#pragma GCC unroll 4
    for (int m = 0; m < kQueries; ++m) {
      Vec weight = Set1(weights[m * kTokenBlock + i]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sum[m][j] = Fma(weight, row[j], sum[m][j]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kQueries; ++m) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVecs; ++j) store(acc[m] + d + j * kWidth, sum[m][j]);
  }
}

template <typename T, int kQueries>
void AddValues(const float* weights, const T* const* v, const T* const* ahead, int count,
               int64_t head_dim, float* const* acc) {
  auto load = [](const auto* p) { return Load(p); };
  auto store = [](float* p, Vec a) { Store(p, a); };
  int64_t d = 0;
  for (; d + kDimStep * kWidth <= head_dim; d += kDimStep * kWidth) {
    AddValueDims<kQueries, kDimStep>(weights, v, ahead, count, d, acc, load, store);
  }
  for (; d + kWidth <= head_dim; d += kWidth) {
    AddValueDims<kQueries, 1>(weights, v, ahead, count, d, acc, load, store);
  }
  if (d < head_dim) {
    const int rest = static_cast<int>(head_dim - d);
    AddValueDims<kQueries, 1>(
        weights, v, ahead, count, d, acc, [rest](const auto* p) { return LoadPartial(p, rest); },
        [rest](float* p, Vec a) { StorePartial(p, a, rest); });
  }
}

inline void ScaleInPlace(float* x, float factor, int64_t count) {
  Vec f = Set1(factor);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) Store(x + i, Mul(Load(x + i), f));
  for (; i < count; ++i) x[i] *= factor;
}

// `count` is a multiple of kWidth.
inline void MulInPlace(float* x, const float* factors, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) Store(x + i, Mul(Load(x + i), Load(factors + i)));
}

// x = softcap * tanh(x / softcap); a softcap of 0 is none.
inline void CapInPlace(float* x, float softcap, int64_t count) {
  if (softcap == 0.0f) return;
  const Vec cap = Set1(softcap), steepness = Set1(2.0f / softcap), twice = Set1(2.0f * softcap);
  auto capped = [&](Vec a) {
    return Sub(cap, Div(twice, Add(Exp(Mul(a, steepness)), Set1(1.0f))));
  };
  ForVectors(
      count, [&](int64_t i) { Store(x + i, capped(Load(x + i))); },
      [&](int64_t i, int rest) { StorePartial(x + i, capped(LoadPartial(x + i, rest)), rest); });
}

// Which scores of a block count: [hidden, visible).
struct Seen {
  int64_t hidden;
  int64_t visible;
};

// Turns the seen of `width` scores (a multiple of kWidth) into exp(score - maximum) and the rest
// into 0, brings the running maximum and sum up to date and rescales acc. A maximum of -inf counts
// as 0, so that rows of nothing but -inf get weights 0 and not NaN.
inline void SoftmaxStep(float* scores, const Seen& seen, int64_t width, float* maximum, float* sum,
                        float* acc, int64_t head_dim) {
  for (int64_t i = 0; i < seen.hidden; ++i) scores[i] = kMinusInf;
  for (int64_t i = seen.visible; i < width; ++i) scores[i] = kMinusInf;
  Vec largest = Set1(kMinusInf);
  for (int64_t i = 0; i < width; i += kWidth) largest = Max(largest, Load(scores + i));
  float block_max = ReduceMax(largest);
  // A NaN here is no new maximum; it reaches the sum through its own exp.
  float new_max = block_max > *maximum ? block_max : *maximum;
  if (new_max != *maximum) {
    float factor = ExpScalar(*maximum - new_max);
    *sum *= factor;
    ScaleInPlace(acc, factor, head_dim);
    *maximum = new_max;
  }
  Vec shift = Set1(new_max == kMinusInf ? 0.0f : new_max);
  Vec total = Zero();
  for (int64_t i = 0; i < width; i += kWidth) {
    Vec p = Exp(Sub(Load(scores + i), shift));
    Store(scores + i, p);
    total = Add(total, p);
  }
  *sum += ReduceAdd(total);
}

template <typename T>
struct SpanState {
  TokenRows<T> rows[2];
  const TokenRows<T>* now = &rows[0];
  const TokenRows<T>* next = &rows[1];  // of the block after; at the end of the span `now` again
  float scores[kQueryBlock * kTokenBlock];
};

// What query m sees of span elements [first, first + count).
inline Seen SeenBy(const AttendSpan& span, int64_t m, int64_t first, int64_t count) {
  if (span.token_idx != nullptr) return {0, count};
  const int64_t length = span.causal_len + m / span.group_size;
  auto clamp = [&](int64_t i) { return i < 0 ? 0 : Smaller(i, count); };
  const int64_t hidden = span.window == 0 ? 0 : clamp(length - span.window - first);
  return {hidden, clamp(length - first)};
}

// One block of tokens for kQueries queries from query m0 on.
template <typename T, int kQueries>
void AttendBlock(const AttendSpan& span, int64_t m0, int64_t first, int count,
                 SpanState<T>& state) {
  const int64_t dim = span.head_dim;
  const int64_t stride = PartialStride(dim);
  const float* q[kQueries];
  float* acc[kQueries];
  for (int m = 0; m < kQueries; ++m) {
    int64_t query = m0 + m;
    int64_t row = query / span.group_size;
    q[m] = span.q + row * span.q_stride + (query - row * span.group_size) * dim;
    acc[m] = span.partial + query * stride;
  }
  const int width = (count + kWidth - 1) / kWidth * kWidth;
  const T* const* ahead = span.v_pages != nullptr ? state.now->v : state.next->k;
  for (int i = 0; i < width; i += kWidth) {
    ScoreTokens<T, kQueries>(q, state.now->k + i, ahead + i, dim, span.sm_scale, state.scores + i);
  }
  for (int m = 0; m < kQueries; ++m) {
    float* scores = state.scores + m * kTokenBlock;
    if constexpr (kIsScaled<T>) MulInPlace(scores, state.now->k_scale, width);
    CapInPlace(scores, span.softcap, width);
    if (span.scores != nullptr) {
      __builtin_memcpy(span.scores + (m0 + m) * span.scores_stride + first, scores,
                       static_cast<size_t>(count) * sizeof(float));
    }
    const Seen seen = SeenBy(span, m0 + m, first, count);
    SoftmaxStep(scores, seen, width, acc[m] + dim, acc[m] + dim + 1, acc[m], dim);
    if constexpr (kIsScaled<T>) MulInPlace(scores, state.now->v_scale, width);
  }
  if (span.v_pages == nullptr) return;
  AddValues<T, kQueries>(state.scores, state.now->v, state.next->k, count, dim, acc);
}

template <typename T>
void AttendQueries(const AttendSpan& span, int64_t first, int count, SpanState<T>& state) {
  int64_t m = 0;
  for (; m + 4 <= span.num_queries; m += 4) AttendBlock<T, 4>(span, m, first, count, state);
  switch (span.num_queries - m) {
    case 3:
      AttendBlock<T, 3>(span, m, first, count, state);
      break;
    case 2:
      AttendBlock<T, 2>(span, m, first, count, state);
      break;
    case 1:
      AttendBlock<T, 1>(span, m, first, count, state);
      break;
    default:
      break;
  }
}

template <typename T>
void Attend(const AttendSpan& span) {
  const int64_t stride = PartialStride(span.head_dim);
  for (int64_t m = 0; m < span.num_queries; ++m) {
    float* record = span.partial + m * stride;
    for (int64_t d = 0; d < span.head_dim; ++d) record[d] = 0.0f;
    record[span.head_dim] = kMinusInf;
    record[span.head_dim + 1] = 0.0f;
  }
  SpanState<T> state;
  auto count_from = [&](int64_t first) {
    return static_cast<int>(Smaller<int64_t>(kTokenBlock, span.end - first));
  };
  FindRows(span, span.begin, count_from(span.begin), state.rows[0]);
  int current = 0;
  for (int64_t first = span.begin; first < span.end; first += kTokenBlock, current ^= 1) {
    const int64_t after = first + kTokenBlock;
    if (after < span.end) FindRows(span, after, count_from(after), state.rows[current ^ 1]);
    state.now = &state.rows[current];
    state.next = &state.rows[after < span.end ? current ^ 1 : current];
    AttendQueries(span, first, count_from(first), state);
  }
}

}  // namespace tidal::TIDAL_CPU_ISA
