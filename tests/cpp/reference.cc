// Naive double-precision ops (reference.h).
#include "reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>

namespace tidal::test::reference {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

int64_t Size(const Values& values) {
  return static_cast<int64_t>(values.size());
}

Values CopyRows(const Values& table, const Ints& rows, int64_t row_size) {
  Values out;
  for (int32_t row : rows) {
    auto begin = table.begin() + row * row_size;
    out.insert(out.end(), begin, begin + row_size);
  }
  return out;
}

}  // namespace

Values Embed(const Ints& token_ids, const Values& table, int64_t hidden_size) {
  return CopyRows(table, token_ids, hidden_size);
}

Values GatherRows(const Values& x, const Ints& rows, int64_t row_size) {
  return CopyRows(x, rows, row_size);
}

Values RmsNorm(const Values& x, const Values& weight, double eps) {
  const int64_t width = Size(weight);
  Values out(x.size());
  for (int64_t row = 0; row < Size(x) / width; ++row) {
    double squares = 0.0;
    for (int64_t i = 0; i < width; ++i) squares += x[row * width + i] * x[row * width + i];
    const double scale = 1.0 / std::sqrt(squares / static_cast<double>(width) + eps);
    for (int64_t i = 0; i < width; ++i)
      out[row * width + i] = x[row * width + i] * scale * weight[i];
  }
  return out;
}

// The nearest float8 e4m3, of two the one with the even code; beyond 448, that.
static double NearestFloat8(double value) {
  double best = 0.0;
  for (int code = 0; code < 127; ++code) {
    const int exponent = code >> 3, mantissa = code & 7;
    const double candidate =
        exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    const double gain = std::abs(best - std::abs(value)) - std::abs(candidate - std::abs(value));
    if (gain > 0.0 || (gain == 0.0 && code % 2 == 0)) best = candidate;
  }
  return std::copysign(best, value);
}

Values RoundedInputs(const Values& x, int64_t in_features, const InputGroups& groups) {
  Values out(x.size());
  for (int64_t row = 0; row < Size(x); row += in_features) {
    for (int64_t begin = 0; begin < in_features; begin += groups.size) {
      const int64_t count = std::min(groups.size, in_features - begin);
      double largest = 0.0;
      for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(x[row + begin + i]));
      // Scales, and inputs over them, are float32 by the definition.
      float scale = static_cast<float>(largest) / 448.0f;
      if (groups.fixed_scale > 0.0f) scale = groups.fixed_scale;
      if (scale == 0.0f) scale = 1.0f;
      for (int64_t i = row + begin; i < row + begin + count; ++i) {
        out[i] = NearestFloat8(static_cast<float>(x[i]) / scale) * double{scale};
      }
    }
  }
  return out;
}

Values Linear(const Values& x, const Values& weight, const Values& bias, int64_t in_features) {
  const int64_t num_rows = Size(x) / in_features;
  const int64_t out_features = Size(weight) / in_features;
  Values out;
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t n = 0; n < out_features; ++n) {
      double sum = bias.empty() ? 0.0 : bias[n];
      for (int64_t k = 0; k < in_features; ++k) {
        sum += x[row * in_features + k] * weight[n * in_features + k];
      }
      out.push_back(sum);
    }
  }
  return out;
}

Values RopeTable(const Ints& positions, const Ints& seq_idx, const Values& inv_freq,
                 int64_t head_dim, double attention_scaling) {
  const int64_t half = head_dim / 2;
  Values out(positions.size() * head_dim, 0.0);
  for (size_t row = 0; row < positions.size(); ++row) {
    if (positions[row] < 0) continue;
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(positions[row] * inv_freq[seq_idx[row] * half + i]);
      out[row * head_dim + i] = attention_scaling * std::cos(double{angle});
      out[row * head_dim + half + i] = attention_scaling * std::sin(double{angle});
    }
  }
  return out;
}

Values Rotate(const Values& heads, const Values& cos_sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  const int64_t num_rows = Size(cos_sin) / head_dim;
  const int64_t row_size = Size(heads) / num_rows;
  Values out(heads.size());
  for (int64_t begin = 0; begin < Size(heads); begin += head_dim) {
    const double* cosine = &cos_sin[begin / row_size * head_dim];
    const double* sine = cosine + half;
    for (int64_t i = 0; i < half; ++i) {
      const double a = heads[begin + i], b = heads[begin + half + i];
      out[begin + i] = a * cosine[i] - b * sine[i];
      out[begin + half + i] = b * cosine[i] + a * sine[i];
    }
  }
  return out;
}

Values GateMul(const Values& gate_up, int64_t intermediate_size, Activation activation) {
  auto act = [&](double x) {
    if (activation == Activation::kSilu) return x / (1.0 + std::exp(-x));
    const double inner = std::sqrt(2.0 / std::numbers::pi) * (x + 0.044715 * x * x * x);
    return 0.5 * x * (1.0 + std::tanh(inner));
  };
  Values out;
  for (int64_t row = 0; row < Size(gate_up); row += 2 * intermediate_size) {
    for (int64_t i = 0; i < intermediate_size; ++i) {
      const double gate = gate_up[row + i], up = gate_up[row + intermediate_size + i];
      out.push_back(act(gate) * up);
    }
  }
  return out;
}

Values ClampedSwiglu(const Values& gate_up, int64_t intermediate_size, double limit, double alpha) {
  Values out;
  for (int64_t row = 0; row < Size(gate_up); row += 2 * intermediate_size) {
    for (int64_t i = 0; i < intermediate_size; ++i) {
      double gate = gate_up[row + i], up = gate_up[row + intermediate_size + i];
      if (gate > limit) gate = limit;
      if (std::abs(up) > limit) up = std::copysign(limit, up);
      out.push_back((up + 1.0) * gate / (1.0 + std::exp(-alpha * gate)));
    }
  }
  return out;
}

HeadAttention AttendHead(const double* q, const Sequence& sequence, int64_t kv_head,
                         const Ints& positions, const AttendRule& rule,
                         std::optional<double> sink) {
  const int64_t dim = sequence.head_dim;
  HeadAttention result{Values(dim, 0.0), {}, -kInf};
  if (positions.empty()) return result;
  auto offset = [&](int32_t t) { return (t * sequence.num_kv_heads + kv_head) * dim; };
  for (int32_t t : positions) {
    const double* k = &sequence.k[offset(t)];
    const double score = rule.sm_scale * std::inner_product(q, q + dim, k, 0.0);
    result.scores.push_back(rule.softcap > 0.0 ? rule.softcap * std::tanh(score / rule.softcap)
                                               : score);
  }
  const double top = *std::max_element(result.scores.begin(), result.scores.end());
  double sum = 0.0;
  for (double score : result.scores) sum += std::exp(score - top);
  result.lse = top + std::log(sum);
  const double of_tokens = sink ? 1.0 / (1.0 + std::exp(*sink - result.lse)) : 1.0;
  for (size_t i = 0; i < positions.size(); ++i) {
    const double probability = of_tokens * std::exp(result.scores[i] - result.lse);
    const double* v = &sequence.v[offset(positions[i])];
    for (int64_t d = 0; d < dim; ++d) result.out[d] += probability * v[d];
  }
  return result;
}

Values AttendRange(const double* q, int64_t num_q_heads, const Sequence& sequence, int64_t end,
                   const AttendRule& rule) {
  const int64_t begin = rule.window == 0 ? 0 : std::max<int64_t>(end - rule.window, 0);
  Ints positions(end - begin);
  std::iota(positions.begin(), positions.end(), begin);
  Values out;
  const int64_t group_size = num_q_heads / sequence.num_kv_heads;
  for (int64_t head = 0; head < num_q_heads; ++head) {
    const double* q_head = q + head * sequence.head_dim;
    const auto sink = rule.sinks.empty() ? std::nullopt : std::optional(rule.sinks[head]);
    const Values one = AttendHead(q_head, sequence, head / group_size, positions, rule, sink).out;
    out.insert(out.end(), one.begin(), one.end());
  }
  return out;
}

namespace {

// The pooled score of position t for the query heads [first, last), in float32 as op_args.h says.
float PooledScore(const SelectProblem& problem, int64_t first, int64_t last, int64_t t) {
  if (problem.granularity == Granularity::kHead) return problem.scores[first * problem.max_len + t];
  float pooled = 0.0f;
  for (int64_t head = first; head < last; ++head) {
    const float weight = std::exp(problem.scores[head * problem.max_len + t] - problem.lse[head]);
    if (head == first) {
      pooled = weight;
    } else {
      pooled = problem.pooling == Pooling::kSum ? pooled + weight : std::max(pooled, weight);
    }
  }
  return pooled;
}

// Higher score first, NaN after everything, then the lower position.
bool Better(float a, int32_t a_idx, float b, int32_t b_idx) {
  if (std::isnan(a) != std::isnan(b)) return std::isnan(b);
  if (!std::isnan(a) && a != b) return a > b;
  return a_idx < b_idx;
}

// The softmax of the query heads [first, last) at position t, added up.
double MassAt(const SelectProblem& problem, int64_t first, int64_t last, int64_t t) {
  double mass = 0.0;
  for (int64_t head = first; head < last; ++head) {
    const double weight =
        std::exp(double{problem.scores[head * problem.max_len + t]} - double{problem.lse[head]});
    if (!std::isnan(weight)) mass += weight;
  }
  return mass;
}

// How many of `others`, best first, a set takes besides `forced`; at most `most`.
int64_t NumForMass(const SelectProblem& problem, int64_t first, int64_t last, const Ints& forced,
                   const Ints& others, int64_t most, double* margin) {
  const double target = double{problem.top_p_mass} * static_cast<double>(last - first);
  double mass = 0.0;
  for (int32_t t : forced) mass += MassAt(problem, first, last, t);
  const int64_t least =
      std::min(problem.min_tokens, problem.seq_len) - static_cast<int64_t>(forced.size());
  int64_t count = 0;
  auto note_margin = [&] {
    if (margin != nullptr) *margin = std::min(*margin, std::abs(mass - target) / target);
  };
  if (least <= 0) note_margin();
  while (count < most && (count < least || mass < target)) {
    mass += MassAt(problem, first, last, others[count++]);
    if (count >= least) note_margin();
  }
  return count;
}

Ints SelectOneSet(const SelectProblem& problem, int64_t first, int64_t last, double* margin) {
  const int64_t n = problem.seq_len;
  const int64_t size = std::min(problem.token_budget, n);
  Ints chosen, others;
  std::vector<float> scores(n);
  for (int32_t t = 0; t < n; ++t) {
    scores[t] = PooledScore(problem, first, last, t);
    const bool all = n <= (problem.top_p_mass < 1.0f ? problem.min_tokens : problem.token_budget);
    const bool always = t < problem.sink_tokens || t >= n - problem.recent_tokens || all;
    (always ? chosen : others).push_back(t);
  }
  std::sort(others.begin(), others.end(),
            [&](int32_t a, int32_t b) { return Better(scores[a], a, scores[b], b); });
  int64_t free_places = size - static_cast<int64_t>(chosen.size());
  if (problem.top_p_mass < 1.0f) {
    free_places = NumForMass(problem, first, last, chosen, others, free_places, margin);
  }
  chosen.insert(chosen.end(), others.begin(), others.begin() + free_places);
  if (margin != nullptr && free_places > 0 && free_places < static_cast<int64_t>(others.size())) {
    const double in = scores[others[free_places - 1]], out = scores[others[free_places]];
    *margin = std::min(*margin, (in - out) / std::max(std::abs(in), 1e-30));
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

}  // namespace

std::vector<Ints> SelectTopK(const SelectProblem& problem, double* margin) {
  if (margin != nullptr) *margin = kInf;
  int64_t num_sets = 1;
  if (problem.granularity == Granularity::kKvHead) num_sets = problem.num_kv_heads;
  if (problem.granularity == Granularity::kHead) num_sets = problem.num_q_heads;
  const int64_t heads_per_set = problem.num_q_heads / num_sets;
  std::vector<Ints> sets;
  for (int64_t set = 0; set < num_sets; ++set) {
    sets.push_back(SelectOneSet(problem, set * heads_per_set, (set + 1) * heads_per_set, margin));
  }
  return sets;
}

Values FilterLogits(const SampleProblem& problem) {
  const size_t vocab = problem.logits.size();
  Values logits(problem.logits.begin(), problem.logits.end());
  for (size_t i = 0; i < vocab; ++i) {
    if (!problem.biases.empty()) logits[i] += problem.biases[i];
    const int32_t marks = problem.history.empty() ? 0 : problem.history[i];
    if (marks != 0) {
      logits[i] = logits[i] > 0 ? logits[i] / problem.repetition_penalty
                                : logits[i] * problem.repetition_penalty;
    }
    const int32_t times = marks / 2;
    logits[i] -= problem.frequency_penalty * times + (times > 0 ? problem.presence_penalty : 0.0);
  }
  for (int32_t id : problem.banned) logits[id] = -kInf;
  for (double& logit : logits) logit /= problem.temperature > 0 ? problem.temperature : 1.0;
  if (problem.temperature == 0) return logits;
  Ints order(vocab);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  if (problem.top_k > 0 && problem.top_k < static_cast<int64_t>(vocab)) {
    order.resize(problem.top_k);
  }
  const double top = logits[order[0]];
  double total = 0.0;
  for (int32_t id : order) total += std::exp(logits[id] - top);
  double cumulative = 0.0;
  Values kept(vocab, -kInf);
  for (int32_t id : order) {  // a token stays while those before it have not reached top_p
    if (cumulative >= problem.top_p * total) break;
    const double weight = std::exp(logits[id] - top);
    cumulative += weight;
    if (weight >= problem.min_p) kept[id] = logits[id];
  }
  return kept;
}

uint32_t Philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t counter[4] = {c0, c1, c2, c3};
  uint32_t key[2] = {static_cast<uint32_t>(seed & 0xffffffffu), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = counter[0] * uint64_t{0xD2511F53}, b = counter[2] * uint64_t{0xCD9E8D57};
    const uint32_t next[4] = {
        static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
        static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    std::copy(next, next + 4, counter);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter[0];
}

Values DrawScores(const SampleProblem& problem) {
  Values values = FilterLogits(problem);
  for (size_t id = 0; id < values.size() && problem.temperature > 0; ++id) {
    const uint32_t word = Philox(problem.seed, problem.position, static_cast<uint32_t>(id), 0, 0);
    const double uniform = ((word >> 9) + 0.5) / 8388608.0;
    values[id] += -std::log(-std::log(uniform));
  }
  return values;
}

Draw Sample(const SampleProblem& problem) {
  Values values = DrawScores(problem);
  const auto best = std::max_element(values.begin(), values.end());
  Draw draw{static_cast<int32_t>(best - values.begin()), 0.0};
  const double top = *best;
  *best = -kInf;
  draw.margin = top - *std::max_element(values.begin(), values.end());
  return draw;
}

Values LogSoftmax(const std::vector<float>& logits) {
  double sum = 0.0;
  const double top = *std::max_element(logits.begin(), logits.end());
  for (float logit : logits) sum += std::exp(logit - top);
  Values result;
  for (float logit : logits) result.push_back(logit - top - std::log(sum));
  return result;
}

}  // namespace tidal::test::reference
