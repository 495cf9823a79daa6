// The kernels that go over one row: merging spans, ranking keys, norms, rotation, activation,
// widening.
#pragma once

#include "backend/cpu/kernels/attend.h"
#include "backend/cpu/kernels/kernels.h"
#include "backend/cpu/simd/simd.h"

namespace tidal::TIDAL_CPU_ISA {

inline void Merge(const MergeSpans& merge) {
  const int64_t dim = merge.head_dim;
  float maximum = kMinusInf;
  for (int64_t s = 0; s < merge.num_spans; ++s) {
    float m = merge.partial[s * merge.stride + dim];
    maximum = m > maximum ? m : maximum;
  }
  const float shift = maximum == kMinusInf ? 0.0f : maximum;
  float sum = 0.0f;
  if (merge.out != nullptr) {
    for (int64_t d = 0; d < dim; ++d) merge.out[d] = 0.0f;
  }
  for (int64_t s = 0; s < merge.num_spans; ++s) {
    const float* record = merge.partial + s * merge.stride;
    const float weight = ExpScalar(record[dim] - shift);
    sum += weight * record[dim + 1];
    if (merge.out == nullptr) continue;
    Vec w = Set1(weight);
    ForVectors(
        dim,
        [&](int64_t d) { Store(merge.out + d, Fma(w, Load(record + d), Load(merge.out + d))); },
        [&](int64_t d, int rest) {
          Vec out = LoadPartial(merge.out + d, rest);
          StorePartial(merge.out + d, Fma(w, LoadPartial(record + d, rest), out), rest);
        });
  }
  // The sum is of tokens alone: beside a high sink nothing might be left of it.
  float total = sum, keep = 1.0f;
  if (merge.sink != nullptr) {
    const float top = *merge.sink > maximum ? *merge.sink : shift;
    keep = ExpScalar(maximum - top);
    total = sum * keep + ExpScalar(*merge.sink - top);
  }
  // No weight at all: no tokens, or all scores -inf.
  if (total != 0.0f && merge.out != nullptr) ScaleInPlace(merge.out, keep / total, dim);
  if (merge.lse != nullptr) {
    *merge.lse = sum == 0.0f ? kMinusInf : shift + __builtin_logf(sum);
  }
}

inline void Softmax(const SoftmaxRow& row) {
  CapInPlace(row.scores, row.softcap, row.width);
  SoftmaxStep(row.scores, {row.hidden, row.visible}, row.width, row.maximum, row.sum, row.acc,
              row.head_dim);
}

// Unsigned keys in the order of the floats; -0 equals +0, NaN is lowest.
inline uint32_t RankKey(float value) {
  float canonical = value + 0.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &canonical, sizeof(bits));
  uint32_t mask = 0u - (bits >> 31);
  uint32_t key = bits ^ (mask | 0x80000000u);
  return value == value ? key : 0u;
}

inline Vec PoolHeads(const RankKeys& rank, int64_t i, int rest) {
  auto load = [&](int64_t h) {
    const float* p = rank.scores + h * rank.scores_stride + i;
    return rest == kWidth ? Load(p) : LoadPartial(p, rest);
  };
  if (rank.lse == nullptr) return load(0);
  // For the maximum, NaN ranks below every score: the operand order of Max drops it.
  const Vec lowest = Set1(kMinusInf);
  Vec pooled = rank.pool_max ? lowest : Zero();
  for (int64_t h = 0; h < rank.num_heads; ++h) {
    Vec p = Exp(Sub(load(h), Set1(rank.lse[h])));
    pooled = rank.pool_max ? Max(Max(p, lowest), pooled) : Add(pooled, p);
  }
  return pooled;
}

inline void Rank(const RankKeys& rank) {
  float pooled[kRankBlock];
  for (int64_t first = 0; first < rank.count; first += kRankBlock) {
    const int64_t count = Smaller(kRankBlock, rank.count - first);
    ForVectors(
        count, [&](int64_t i) { Store(pooled + i, PoolHeads(rank, first + i, kWidth)); },
        [&](int64_t i, int rest) {
          StorePartial(pooled + i, PoolHeads(rank, first + i, rest), rest);
        });
    uint32_t* keys = rank.keys + first;
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      keys[i] = RankKey(pooled[i]);
      largest = keys[i] > largest ? keys[i] : largest;
    }
    rank.block_max[first / kRankBlock] = largest;
  }
}

template <typename T>
void Widen(const void* src, int64_t count, float* dst) {
  const T* from = static_cast<const T*>(src);
  ForVectors(
      count, [&](int64_t i) { Store(dst + i, Load(from + i)); },
      [&](int64_t i, int rest) { StorePartial(dst + i, LoadPartial(from + i, rest), rest); });
}

template <typename T>
void RmsNorm(const float* x, const void* weight, int64_t size, float eps, float* out) {
  const T* w = static_cast<const T*>(weight);
  Vec squares = Zero();
  ForVectors(
      size,
      [&](int64_t i) {
        Vec a = Load(x + i);
        squares = Fma(a, a, squares);
      },
      [&](int64_t i, int rest) {
        Vec a = LoadPartial(x + i, rest);
        squares = Fma(a, a, squares);
      });
  const float mean = ReduceAdd(squares) / static_cast<float>(size);
  const Vec inverse = Set1(1.0f / __builtin_sqrtf(mean + eps));
  ForVectors(
      size, [&](int64_t i) { Store(out + i, Mul(Load(w + i), Mul(Load(x + i), inverse))); },
      [&](int64_t i, int rest) {
        Vec normal = Mul(LoadPartial(x + i, rest), inverse);
        StorePartial(out + i, Mul(LoadPartial(w + i, rest), normal), rest);
      });
}

inline void RotateHalf(const float* x, const float* cos_sin, int64_t head_dim, float* out) {
  const int64_t half = head_dim / 2;
  auto rotate = [](Vec& a, Vec& b, Vec cos, Vec sin) {
    Vec low = Sub(Mul(a, cos), Mul(b, sin));
    b = Add(Mul(b, cos), Mul(a, sin));
    a = low;
  };
  ForVectors(
      half,
      [&](int64_t i) {
        Vec a = Load(x + i), b = Load(x + half + i);
        rotate(a, b, Load(cos_sin + i), Load(cos_sin + half + i));
        Store(out + i, a);
        Store(out + half + i, b);
      },
      [&](int64_t i, int rest) {
        Vec a = LoadPartial(x + i, rest), b = LoadPartial(x + half + i, rest);
        rotate(a, b, LoadPartial(cos_sin + i, rest), LoadPartial(cos_sin + half + i, rest));
        StorePartial(out + i, a, rest);
        StorePartial(out + half + i, b, rest);
      });
}

// out = fn(gate, up).
template <typename Fn>
void GateMul(const GateRow& row, Fn fn) {
  ForVectors(
      row.count, [&](int64_t i) { Store(row.out + i, fn(Load(row.gate + i), Load(row.up + i))); },
      [&](int64_t i, int rest) {
        const Vec gate = LoadPartial(row.gate + i, rest), up = LoadPartial(row.up + i, rest);
        StorePartial(row.out + i, fn(gate, up), rest);
      });
}

// x / (1 + exp(-y)).
inline Vec TimesSigmoid(Vec x, Vec y) {
  return Div(x, Add(Set1(1.0f), Exp(Sub(Zero(), y))));
}

inline void SiluMul(const GateRow& row) {
  GateMul(row, [](Vec gate, Vec up) { return Mul(TimesSigmoid(gate, gate), up); });
}

// x / 2 * (1 + tanh(y)) with y = sqrt(2 / pi) * (x + 0.044715 x^3), which is x / (1 + exp(-2 y)).
inline void GeluTanhMul(const GateRow& row) {
  GateMul(row, [](Vec x, Vec up) {
    constexpr float kTwice = 1.5957691216057308f;  // 2 * sqrt(2 / pi)
    const Vec cube = Mul(Mul(x, x), x);
    const Vec y = Mul(Set1(kTwice), Fma(Set1(0.044715f), cube, x));
    return Mul(TimesSigmoid(x, y), up);
  });
}

// Min and Max give their second operand where one is NaN, so a NaN stays.
inline void ClampedSwiglu(const GateRow& row) {
  const Vec limit = Set1(row.limit), lowest = Set1(-row.limit), alpha = Set1(row.alpha);
  GateMul(row, [&](Vec gate, Vec up) {
    gate = Min(limit, gate);
    up = Max(lowest, Min(limit, up));
    return Mul(Add(up, Set1(1.0f)), TimesSigmoid(gate, Mul(alpha, gate)));
  });
}

inline void Scale(const float* x, float factor, int64_t count, float* out) {
  Vec f = Set1(factor);
  ForVectors(
      count, [&](int64_t i) { Store(out + i, Mul(Load(x + i), f)); },
      [&](int64_t i, int rest) { StorePartial(out + i, Mul(LoadPartial(x + i, rest), f), rest); });
}

}  // namespace tidal::TIDAL_CPU_ISA
