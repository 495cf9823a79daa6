// Experts: which a token has, their products, and what they add. An expert's product is a Linear of
// the tokens that have chosen it, one expert after the other, so that each one's weights are read
// once.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "backend/cpu/linear.h"
#include "backend/cpu/ops.h"

namespace tidal {
namespace {

// Is added to a token's likelihoods before they are divided by their sum, as transformers does.
constexpr float kLeastSum = 1e-20f;

// How likely each of a token's experts is, not yet divided by what is returned; NaN for a token
// that has one.
float Likelihoods(RouterScore score, const float* logits, int64_t num_experts, float* likely) {
  float total = 0.0f;
  if (score == RouterScore::kSigmoid) {
    for (int64_t e = 0; e < num_experts; ++e) {
      total += likely[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    }
    return std::isnan(total) ? total : 1.0f;
  }
  const float top = *std::max_element(logits, logits + num_experts);
  for (int64_t e = 0; e < num_experts; ++e) total += likely[e] = std::exp(logits[e] - top);
  return total;
}

// `memory` [2 * num_experts]: scratch. NaN is chosen last.
void SelectOf(const SelectExpertsArgs& args, int64_t t, float* memory) {
  constexpr float kNone = std::numeric_limits<float>::quiet_NaN();
  const int64_t num_experts = args.logits.dim(1), chosen = args.expert_ids.dim(1);
  const float* logits = args.logits.data<float>() + t * num_experts;
  float *likely = memory, *choice = memory + num_experts;
  const float total = Likelihoods(args.score, logits, num_experts, likely);
  for (int64_t e = 0; e < num_experts; ++e) {
    const float corrected =
        args.correction ? likely[e] / total + args.correction.data<float>()[e] : likely[e];
    choice[e] = std::isnan(corrected) ? -std::numeric_limits<float>::infinity() : corrected;
  }
  int32_t* ids = args.expert_ids.data<int32_t>() + t * chosen;
  float* weights = args.weights.data<float>() + t * chosen;
  float sum = 0.0f;
  for (int64_t j = 0; j < chosen; ++j) {
    int64_t best = -1;
    for (int64_t e = 0; e < num_experts; ++e) {
      if (!std::isnan(choice[e]) && (best < 0 || choice[e] > choice[best])) best = e;
    }
    ids[j] = static_cast<int32_t>(best);
    sum += weights[j] = likely[best];
    choice[best] = kNone;
  }
  const float share = args.scale / (args.normalized ? sum + kLeastSum : total);
  for (int64_t j = 0; j < chosen; ++j) weights[j] *= std::isnan(total) ? kNone : share;
}

// Choices by expert: those of e are order[first[e]] to order[first[e + 1]], ascending.
struct Choices {
  int32_t* first;  // [num_experts + 1]
  int32_t* order;  // [choices]
};

Choices SortByExpert(CpuContext& context, const TensorView& expert_ids, int64_t num_experts) {
  const int64_t count = expert_ids.numel();
  int32_t* memory = context.scratch.Take<int32_t>(Scratch::kPlan, ChoiceInts(count, num_experts));
  const Choices choices = {memory, memory + num_experts + 1};
  std::fill_n(choices.first, num_experts + 1, 0);
  const int32_t* ids = expert_ids.data<int32_t>();
  for (int64_t i = 0; i < count; ++i) ++choices.first[ids[i] + 1];
  for (int64_t e = 0; e < num_experts; ++e) choices.first[e + 1] += choices.first[e];
  for (int64_t i = 0; i < count; ++i) {
    choices.order[choices.first[ids[i]]++] = static_cast<int32_t>(i);
  }
  std::copy_backward(choices.first, choices.first + num_experts, choices.first + num_experts + 1);
  choices.first[0] = 0;
  return choices;
}

void CopyRow(const TensorView& from, int64_t row, const TensorView& to, int64_t to_row) {
  const int64_t size = from.dim(1);
  std::memcpy(to.data<float>() + to_row * size, from.data<float>() + row * size,
              static_cast<size_t>(size) * sizeof(float));
}

}  // namespace

int64_t ChoiceInts(int64_t num_choices, int64_t num_experts) {
  return num_choices + num_experts + 1;
}

void CpuGateRows(CpuContext& context, const GateRowsArgs& args) {
  const int64_t num_tokens = args.x.dim(0), size = args.out.dim(1);
  float* gates = context.scratch.Take<float>(Scratch::kExperts, num_tokens);
  CpuLinear(context, {.x = args.x,
                      .weight = args.weight,
                      .bias = {},
                      .out = TensorView(gates, DType::kFloat32, {num_tokens, 1})});
  for (int64_t t = 0; t < num_tokens; ++t) {
    float* row = args.out.data<float>() + t * size;
    context.kernels->scale(row, 1.0f / (1.0f + std::exp(-gates[t])), size, row);
  }
}

void CpuSelectExperts(CpuContext& context, const SelectExpertsArgs& args) {
  const int64_t num_experts = args.logits.dim(1);
  float* memory = context.scratch.Take<float>(Scratch::kExperts, 2 * num_experts);
  for (int64_t t = 0; t < args.logits.dim(0); ++t) SelectOf(args, t, memory);
}

void CpuExpertLinear(CpuContext& context, const ExpertLinearArgs& args) {
  const int64_t num_choices = args.expert_ids.numel(), num_outputs = args.out.dim(1);
  const int64_t in_features = args.x.dim(1);
  const int64_t choices_of_row = num_choices / std::max<int64_t>(args.x.dim(0), 1);
  const int64_t num_experts = args.weight.num_outputs() / num_outputs;
  const Choices choices = SortByExpert(context, args.expert_ids, num_experts);
  float* memory =
      context.scratch.Take<float>(Scratch::kExperts, num_choices * (in_features + num_outputs));
  for (int64_t e = 0; e < num_experts; ++e) {
    const int32_t* own = choices.order + choices.first[e];
    const int64_t count = choices.first[e + 1] - choices.first[e];
    if (count == 0) continue;
    const TensorView x(memory, DType::kFloat32, {count, in_features});
    const TensorView out(memory + num_choices * in_features, DType::kFloat32, {count, num_outputs});
    for (int64_t i = 0; i < count; ++i) CopyRow(args.x, own[i] / choices_of_row, x, i);
    const int64_t first_row = e * num_outputs;
    CpuLinear(context, {.x = x,
                        .weight = args.weight.Rows(first_row, num_outputs),
                        .bias = args.bias ? args.bias.Rows(first_row, num_outputs) : TensorView(),
                        .out = out});
    for (int64_t i = 0; i < count; ++i) CopyRow(out, i, args.out, own[i]);
  }
}

void CpuAddExperts(CpuContext& context, const AddExpertsArgs& args) {
  const int64_t size = args.out.dim(1), chosen = args.weights.dim(1);
  const int threads = context.ThreadsFor(args.x.numel());
  context.ParallelRange(threads, args.out.dim(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * chosen; i < end * chosen; ++i) {
      const float weight = args.weights.data<float>()[i];
      const float* x = args.x.data<float>() + i * size;
      float* out = args.out.data<float>() + i / chosen * size;
      for (int64_t d = 0; d < size; ++d) out[d] += weight * x[d];
    }
  });
}

}  // namespace tidal
