// What the layers of a model do to scores besides scaling them (backend/op_args.h, AttentionRule):
// soft caps, sinks, and windows as the kernels see them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "backend/op_args.h"
#include "common/decode_split.cuh"
#include "common/launch_config.h"
#include "common/softmax_state.cuh"

namespace tidal {

// softcap * tanh(scale * x / softcap) of a number x. All of it is as exact as a few roundings of
// numbers of softcap's size, and no two of them may be fused in one kernel and not in another.
struct SoftCap {
  float softcap;    // 0: none
  float steepness;  // 2 log2(e) scale / softcap

  // Caps all numbers of an array, however nested, if there is a cap.
  template <typename T, int kCount>
  __device__ __forceinline__ void CapAll(T (&array)[kCount]) const {
    if (softcap != 0.0f) CapEach(array);
  }

 private:
  template <typename T, int kCount>
  __device__ __forceinline__ void CapEach(T (&array)[kCount]) const {
#pragma unroll
    for (T& element : array) {
      if constexpr (std::is_array_v<T>) {
        CapEach(element);
      } else {
        element = Capped(element);
      }
    }
  }
  __device__ __forceinline__ float Capped(float x) const {
    float exponential = FastExp2(__fmul_rn(x, steepness));
    return __fsub_rn(softcap,
                     __fdividef(__fadd_rn(softcap, softcap), __fadd_rn(exponential, 1.0f)));
  }
};

inline SoftCap MakeSoftCap(const AttentionRule& rule, float scale) {
  if (rule.softcap == 0.0f) return {};
  return {.softcap = rule.softcap, .steepness = 2.0f * kLog2E * scale / rule.softcap};
}

// Pointer to the sinks, or null.
inline const float* SinksOf(const AttentionRule& rule) {
  return static_cast<const float*>(rule.sinks.ptr);
}

// What one more score, of no value, makes of a softmax.
struct SumWithSink {
  float keep;  // what weights, which were exp(score - max), are now to be multiplied by
  float sum;   // of weights, that of the sink included

  __device__ __forceinline__ SumWithSink(float max, float sum_of_tokens, float sink) {
    float finite_max = FiniteMax(fmaxf(max, sink));
    keep = SoftmaxWeight(max, finite_max);
    sum = __fmaf_rn(sum_of_tokens, keep, SoftmaxWeight(sink, finite_max));
  }
};

// The window of a decode query: of the tokens up to its own, their number n, it sees the last
// `size`. They are read as spans of tokens that begin at a multiple of `unit`.
struct DecodeWindow {
  int size;  // kMaxAttendedTokens: no window
  int unit;  // a power of two

  // The first token that is seen.
  __device__ __forceinline__ int First(int n) const { return max(n - size, 0); }
  // Where the spans begin: tokens from there to the first that is seen are not read.
  __device__ __forceinline__ int Begin(int n) const { return First(n) & -unit; }
  // Tokens of all spans at most, for any n.
  __device__ __forceinline__ int Most() const { return size + (unit - 1); }
  __device__ __forceinline__ int SpanLengthFor(int n, const SplitRule& rule) const {
    return SpanLength(min(n, Most()), rule);
  }
};

// By row the unit is so large that neighbouring queries, of which few have another begin, have
// their tokens in the same spans.
inline DecodeWindow ChooseWindow(Splitting splitting, const AttentionRule& rule) {
  if (rule.window == 0) return {.size = kMaxAttendedTokens, .unit = 1};
  return {.size = static_cast<int>(std::min<int64_t>(rule.window, kMaxAttendedTokens)),
          .unit = splitting == Splitting::kByRow ? kRowSpan : 1};
}

// The window of a prompt's query, at no more than any position.
inline int PromptWindow(const AttentionRule& rule) {
  constexpr int64_t kAll = kMaxAttendedTokens;
  return static_cast<int>(rule.window == 0 ? kAll : std::min(rule.window, kAll));
}

// The rule of kernels that read prompts. Their scores are products q.k, or what a cap makes of
// them; weights are 2^(weight_scale * (score - max)).
struct PromptRule {
  float weight_scale;  // sm_scale x log2(e), > 0; with a cap log2(e)
  SoftCap cap;
  int window;          // a query sees so many last tokens, its own included
  const float* sinks;  // [Hq], or nullptr

  // What a row of the output is to be multiplied by, whose weights add up to `sum`; 0 if every
  // score was masked.
  __device__ __forceinline__ float OutputScale(int q_head, float max, float sum) const {
    if (sinks == nullptr) return sum == 0.0f ? 0.0f : 1.0f / sum;
    SumWithSink with_sink(max * weight_scale / kLog2E, sum, __ldg(sinks + q_head));
    return with_sink.keep / with_sink.sum;
  }
};

inline PromptRule MakePromptRule(const AttentionRule& rule, float k_scale) {
  float sm_scale = rule.sm_scale * k_scale;
  return {.weight_scale = rule.softcap == 0.0f ? sm_scale * kLog2E : kLog2E,
          .cap = MakeSoftCap(rule, sm_scale),
          .window = PromptWindow(rule),
          .sinks = SinksOf(rule)};
}

}  // namespace tidal
