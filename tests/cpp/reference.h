// The bottom of the oracle chain: every op of the Backend seam once more, naive and in double
// precision, written from op_args.h alone. Shares no code with any backend, so that no mistake is
// made twice.
//
// Tensors are row-major vectors of double in the shapes of op_args.h; a cache is not paged here.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "tidal/config.h"

namespace tidal::test {

using Values = std::vector<double>;
using Ints = std::vector<int32_t>;

}  // namespace tidal::test

namespace tidal::test::reference {

Values Embed(const Ints& token_ids, const Values& table, int64_t hidden_size);

// Rows of weight.size() elements.
Values RmsNorm(const Values& x, const Values& weight, double eps);

// bias may be empty.
Values Linear(const Values& x, const Values& weight, const Values& bias, int64_t in_features);

// x [T, in_features] as LinearArgs::quantizes_inputs has it: each group of so many inputs of a
// token in float8, under the fixed scale or, if that is 0, one of its own.
struct InputGroups {
  int64_t size = 0;
  float fixed_scale = 0.0f;
};
Values RoundedInputs(const Values& x, int64_t in_features, const InputGroups& groups);

// [T, D]: D/2 cosines, then D/2 sines. Idle rows (position -1) give 0. The angle is rounded to
// float32: models are trained and published with that, and at position 100000 it is off by up to
// 4e-3.
Values RopeTable(const Ints& positions, const Ints& seq_idx, const Values& inv_freq,
                 int64_t head_dim, double attention_scaling);

// Rotates heads [T, num_heads, D] in the rotate-half layout.
Values Rotate(const Values& heads, const Values& cos_sin, int64_t head_dim);

Values GateMul(const Values& gate_up, int64_t intermediate_size,
               Activation activation = Activation::kSilu);
Values ClampedSwiglu(const Values& gate_up, int64_t intermediate_size, double limit, double alpha);
Values GatherRows(const Values& x, const Ints& rows, int64_t row_size);

// What one sequence has in the cache: K and V, [seq_len, num_kv_heads, head_dim].
struct Sequence {
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  Values k;
  Values v;

  int64_t seq_len() const { return static_cast<int64_t>(k.size()) / (num_kv_heads * head_dim); }
};

struct HeadAttention {
  Values out;     // [head_dim]; 0 without positions
  Values scores;  // [positions]
  double lse;     // -inf without positions
};

// AttentionRule (backend/op_args.h) in double.
struct AttendRule {
  double sm_scale = 0.0;
  double softcap = 0.0;
  int64_t window = 0;
  Values sinks = {};  // [num_q_heads], or empty

  AttendRule(double scale) : sm_scale(scale) {}  // NOLINT: of most layers it is all
};

// One query head, `q` [head_dim], on the given positions, with a sink or none.
HeadAttention AttendHead(const double* q, const Sequence& sequence, int64_t kv_head,
                         const Ints& positions, const AttendRule& rule,
                         std::optional<double> sink = std::nullopt);

// All query heads of one query, `q` [num_q_heads, head_dim], on the positions below `end` that the
// query at end - 1 sees.
Values AttendRange(const double* q, int64_t num_q_heads, const Sequence& sequence, int64_t end,
                   const AttendRule& rule);

struct SelectProblem {
  const float* scores = nullptr;  // [num_q_heads, max_len] of one row
  const float* lse = nullptr;     // [num_q_heads]
  int64_t max_len = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t seq_len = 0;
  int64_t token_budget = 0;
  int64_t sink_tokens = 0;
  int64_t recent_tokens = 1;
  float top_p_mass = 1.0f;
  int64_t min_tokens = 0;
  Granularity granularity = Granularity::kKvHead;
  Pooling pooling = Pooling::kSum;
};

// The chosen positions of every set, each ascending, without padding. `margin`, if given, receives
// the smallest relative distance between the last score chosen and the first one left, over all
// sets (infinite if a set leaves nothing), or, if that is smaller, between the mass that decided
// how many are chosen and top_p_mass: below about 1e-5 another exp() may choose differently.
std::vector<Ints> SelectTopK(const SelectProblem& problem, double* margin = nullptr);

struct SampleProblem {
  std::vector<float> logits;
  Ints history;     // [V] marks as in op_args.h; empty: none
  Values biases{};  // [V]; empty: none
  Ints banned{};    // ids
  double temperature = 0.0;
  int64_t top_k = 0;
  double top_p = 1.0;
  double min_p = 0.0;
  double repetition_penalty = 1.0;
  double frequency_penalty = 0.0;
  double presence_penalty = 0.0;
  uint64_t seed = 0;
  uint32_t position = 0;
};

// Log-probability-like values after biases, penalties, bans and temperature, -inf where top-k,
// top-p or min-p cut.
Values FilterLogits(const SampleProblem& problem);

// First word of Philox4x32-10 (Salmon et al., SC 2011) for key `seed`, counter (c0, c1, c2, c3).
uint32_t Philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3);

// FilterLogits plus Gumbel noise, FilterLogits itself if temperature is 0: the highest is drawn.
Values DrawScores(const SampleProblem& problem);

struct Draw {
  int32_t token_id = 0;
  double margin =
      0.0;  // how far ahead of the runner-up; a tiny one may go the other way in float32
};

// The highest of DrawScores.
Draw Sample(const SampleProblem& problem);

Values LogSoftmax(const std::vector<float>& logits);

}  // namespace tidal::test::reference
