// Experts: SelectExperts, ExpertLinear, AddExperts; and the gate of one that all tokens have.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "coded_weight.h"
#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

struct ExpertShape {
  std::string name;
  int64_t num_experts = 0;
  int64_t chosen = 0;
  int64_t in_features = 0;
  int64_t out_features = 0;
};

class OpExperts : public OpTest<ExpertShape> {
 protected:
  void SetUp() override {
    OpTest::SetUp();
    if (IsSkipped()) return;
    StepLimits limits = SmallLimits(dtype());
    limits.model.num_experts = shape().num_experts;
    limits.model.experts_per_token = shape().chosen;
    limits.model.expert_intermediate_size = std::max(shape().in_features, shape().out_features);
    limits.model.layers.resize(static_cast<size_t>(limits.model.num_layers), {.has_experts = true});
    Open(GetParam().on, limits);
  }

  // Different experts for each token, some of which nobody has.
  Ints RandomChoices(int64_t tokens) {
    Ints ids;
    for (int64_t t = 0; t < tokens; ++t) {
      const Ints order = random_.Permutation(shape().num_experts);
      ids.insert(ids.end(), order.begin(), order.begin() + shape().chosen);
    }
    return ids;
  }

  // `bias`: of all experts, or none.
  Values Want(const Values& x, int64_t choices_of_row, const Values& weight, const Values& bias,
              const Ints& ids) {
    const auto [name, num_experts, chosen, in, out] = shape();
    Values want;
    for (size_t i = 0; i < ids.size(); ++i) {
      const double* row = x.data() + static_cast<int64_t>(i) / choices_of_row * in;
      for (int64_t output = ids[i] * out; output < (ids[i] + 1) * out; ++output) {
        const double start = bias.empty() ? 0.0 : bias[static_cast<size_t>(output)];
        want.push_back(std::inner_product(row, row + in, weight.data() + output * in, start));
      }
    }
    return want;
  }

  // With one row a token, and with a row for each choice.
  void ExpectProducts(const Weight& weight, const Values& numbers, const Values& bias = {}) {
    const auto [name, num_experts, chosen, in, out] = shape();
    for (int64_t tokens : {1, 3, 40, 200}) {
      for (int64_t rows : {tokens, tokens * chosen}) {
        SCOPED_TRACE(Concat(tokens, " tokens, ", rows, " rows"));
        const Ints ids = RandomChoices(tokens);
        const Values x = random_.Normal(rows * in, act());
        const ExpertLinearArgs args = {
            .x = Put(x, act(), {rows, in}),
            .weight = weight,
            .bias = bias.empty() ? TensorView() : Put(bias, dtype(), {num_experts * out}),
            .expert_ids = PutInts(ids, {tokens, chosen}),
            .out = Output(act(), {tokens * chosen, out})};
        backend().ExpertLinear(args);
        EXPECT_TRUE(Close(Get(args.out), Want(x, tokens * chosen / rows, numbers, bias, ids),
                          ToleranceFor(Op::kLinear, act())));
      }
    }
  }

  // What `args` ask for of tokens with these logits.
  void ExpectSelection(SelectExpertsArgs args, const Values& logits, const Values& correction);

  Random random_{31};
};

// How likely each expert is for a token with these logits.
Values Likelihoods(RouterScore score, const Values& logits) {
  Values likely;
  double total = 0.0;
  for (double logit : logits) total += std::exp(logit);
  for (double logit : logits) {
    likely.push_back(score == RouterScore::kSigmoid ? 1.0 / (1.0 + std::exp(-logit))
                                                    : std::exp(logit) / total);
  }
  return likely;
}

void OpExperts::ExpectSelection(SelectExpertsArgs args, const Values& logits,
                                const Values& correction) {
  const int64_t num_experts = shape().num_experts, chosen = shape().chosen;
  const int64_t tokens = static_cast<int64_t>(logits.size()) / num_experts;
  args.logits = Put(logits, DType::kFloat32, {tokens, num_experts});
  if (!correction.empty()) args.correction = Put(correction, DType::kFloat32, {num_experts});
  args.expert_ids = Output(DType::kInt32, {tokens, chosen});
  args.weights = Output(DType::kFloat32, {tokens, chosen});
  backend().SelectExperts(args);
  Ints want_ids;
  Values want_weights;
  for (int64_t t = 0; t < tokens; ++t) {
    const auto own = logits.begin() + t * num_experts;
    const Values likely = Likelihoods(args.score, Values(own, own + num_experts));
    Values choice = likely;
    for (size_t e = 0; e < correction.size(); ++e) choice[e] += correction[e];
    Ints order(static_cast<size_t>(num_experts));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return choice[a] > choice[b]; });
    order.resize(static_cast<size_t>(chosen));
    double some = 0.0;
    for (int32_t e : order) some += likely[e];
    want_ids.insert(want_ids.end(), order.begin(), order.end());
    for (int32_t e : order) {
      want_weights.push_back(args.scale * likely[e] / (args.normalized ? some : 1.0));
    }
  }
  EXPECT_EQ(GetInts(args.expert_ids), want_ids);
  EXPECT_TRUE(Close(Get(args.weights), want_weights, {1e-6, 1e-5}));
}

TEST_P(OpExperts, TheMostLikelyAreSelected) {
  const int64_t num_experts = shape().num_experts;
  const Values logits = random_.Normal(50 * num_experts, DType::kFloat32, 3.0);
  // Likelihoods with it are negative too.
  const Values correction = random_.Normal(num_experts, DType::kFloat32, 0.7);
  for (RouterScore score : {RouterScore::kSoftmax, RouterScore::kSigmoid}) {
    for (bool normalized : {true, false}) {
      for (bool is_corrected : {true, false}) {
        SCOPED_TRACE(Concat(static_cast<int>(score), ", normalized ", normalized, ", corrected ",
                            is_corrected));
        SelectExpertsArgs args;
        args.score = score;
        args.normalized = normalized;
        ExpectSelection(args, logits, is_corrected ? correction : Values());
        args.scale = 2.5f;
        ExpectSelection(args, logits, is_corrected ? correction : Values());
      }
    }
  }
}

TEST_P(OpExperts, EqualLogitsSelectTheLowerIds) {
  const int64_t num_experts = shape().num_experts, chosen = shape().chosen;
  const SelectExpertsArgs args = {
      .logits = Put(Values(num_experts, 0.5), DType::kFloat32, {1, num_experts}),
      .expert_ids = Output(DType::kInt32, {1, chosen}),
      .weights = Output(DType::kFloat32, {1, chosen})};
  backend().SelectExperts(args);
  Ints want(chosen);
  std::iota(want.begin(), want.end(), 0);
  EXPECT_EQ(GetInts(args.expert_ids), want);
}

// A token of NaN has experts that there are, and weights of NaN; the others are not touched by it.
TEST_P(OpExperts, NanStaysInItsToken) {
  const int64_t num_experts = shape().num_experts, chosen = shape().chosen;
  Values logits = random_.Normal(3 * num_experts, DType::kFloat32);
  for (RouterScore score : {RouterScore::kSoftmax, RouterScore::kSigmoid}) {
    for (int64_t num_nan : {num_experts, int64_t{1}}) {
      Values some = logits;
      std::fill_n(some.begin() + num_experts, num_nan, std::nan(""));
      const SelectExpertsArgs args = {.logits = Put(some, DType::kFloat32, {3, num_experts}),
                                      .expert_ids = Output(DType::kInt32, {3, chosen}),
                                      .weights = Output(DType::kFloat32, {3, chosen}),
                                      .score = score};
      backend().SelectExperts(args);
      const Values weights = Get(args.weights);
      const Ints ids = GetInts(args.expert_ids);
      for (int64_t t = 0; t < 3; ++t) {
        const auto own = ids.begin() + t * chosen;
        const std::set<int32_t> different(own, own + chosen);
        EXPECT_EQ(different.size(), static_cast<size_t>(chosen));
        EXPECT_TRUE(*different.begin() >= 0 && *different.rbegin() < num_experts);
      }
      for (int64_t i = 0; i < 3 * chosen; ++i) {
        ASSERT_EQ(std::isnan(weights[i]), i / chosen == 1) << i;
      }
    }
  }
}

TEST_P(OpExperts, AGateOfEachTokenWeighsItsRow) {
  const int64_t hidden = shape().in_features, size = shape().out_features;
  for (int64_t tokens : {1, 7, 100}) {
    const Values x = random_.Normal(tokens * hidden, act());
    const Values weight = random_.Normal(hidden, dtype(), 0.1);
    Values want = random_.Normal(tokens * size, act());
    const TensorView out = Put(want, act(), {tokens, size});
    backend().GateRows({.x = Put(x, act(), {tokens, hidden}),
                        .weight = Put(weight, dtype(), {1, hidden}),
                        .out = out});
    const Values logits = reference::Linear(x, weight, {}, hidden);
    for (int64_t i = 0; i < tokens * size; ++i) want[i] /= 1.0 + std::exp(-logits[i / size]);
    EXPECT_TRUE(Close(Get(out), want, ToleranceFor(Op::kLinear, act())));
  }
}

TEST_P(OpExperts, ProductsMatchReference) {
  const auto [name, num_experts, chosen, in, out] = shape();
  const double size = 1.0 / std::sqrt(static_cast<double>(in));
  const Values numbers = random_.Normal(num_experts * out * in, dtype(), size);
  ExpectProducts(Put(numbers, dtype(), {num_experts * out, in}), numbers);
}

TEST_P(OpExperts, EachExpertHasItsBias) {
  const auto [name, num_experts, chosen, in, out] = shape();
  const Values numbers = random_.Normal(num_experts * out * in, dtype(), 0.1);
  const Values bias = random_.Normal(num_experts * out, dtype());
  ExpectProducts(Put(numbers, dtype(), {num_experts * out, in}), numbers, bias);
}

TEST_P(OpExperts, ProductsOfCodesMatchReference) {
  const auto [name, num_experts, chosen, in, out] = shape();
  const double size = 1.0 / std::sqrt(static_cast<double>(in));
  for (const CodesCase& how : {CodesCase{"fp8", WeightCodes::kFloat8},
                               CodesCase{"int4", WeightCodes::kInt4, 32, DType::kBFloat16, true},
                               CodesCase{"mxfp4", WeightCodes::kMxfp4, 32, DType::kUInt8}}) {
    SCOPED_TRACE(how.name);
    const int64_t outputs = num_experts * out;
    const CodedMatrix matrix = CodedMatrix::Make(random_, how, {outputs, in}, size);
    const int64_t groups = (in + matrix.group_size - 1) / matrix.group_size;
    Weight weight(PutBytes(matrix.codes, DType::kUInt8, {outputs, in * CodeBits(how.codes) / 8}));
    weight.codes = how.codes;
    weight.group_size = matrix.group_size;
    weight.scales =
        PutBytes(matrix.ScaleBytes(how.scale_dtype), how.scale_dtype, {groups, outputs});
    if (how.has_zeros) weight.zeros = PutBytes(matrix.zeros, DType::kUInt8, {groups, outputs});
    if (!backend().ReadsCodesOfExperts(weight)) continue;
    ExpectProducts(weight, matrix.values);
    ExpectProducts(weight, matrix.values, random_.Normal(outputs, dtype()));
  }
}

// Other products on CUDA do not read what only experts' do.
TEST_P(OpExperts, AnMxfp4WeightIsOfExperts) {
  if (shape().in_features % 32 != 0) GTEST_SKIP() << "groups of 32";
  if (GetParam().on.is_cpu()) GTEST_SKIP() << "all products read it here";
  const int64_t in = shape().in_features;
  Weight weight(Output(DType::kUInt8, {8, in / 2}));
  weight.codes = WeightCodes::kMxfp4;
  weight.group_size = 32;
  weight.scales = Output(DType::kUInt8, {in / 32, 8});
  EXPECT_FALSE(backend().ReadsCodes(weight));
  EXPECT_TRUE(backend().ReadsCodesOfExperts(weight));
  const LinearArgs args = {
      .x = Output(act(), {1, in}), .weight = weight, .bias = {}, .out = Output(act(), {1, 8})};
  EXPECT_TRUE(
      Throws<UnsupportedError>([&] { backend().Linear(args); }, {"MXFP4", "product with experts"}));
}

// Up to 64 tokens a token's products do not depend on the others.
TEST_P(OpExperts, ATokenIsTheSameBitwiseBesideOthers) {
  if (!GetParam().on.is_cpu()) GTEST_SKIP() << "elsewhere where it is asked for";
  const auto [name, num_experts, chosen, in, out] = shape();
  constexpr int64_t kTokens = 40;
  const Weight weight(
      Put(random_.Normal(num_experts * out * in, dtype(), 0.1), dtype(), {num_experts * out, in}));
  const TensorView x = Put(random_.Normal(kTokens * in, act()), act(), {kTokens, in});
  const TensorView ids = PutInts(RandomChoices(kTokens), {kTokens, chosen});
  const TensorView together = Output(act(), {kTokens * chosen, out});
  backend().ExpertLinear({.x = x, .weight = weight, .expert_ids = ids, .out = together});
  for (int64_t t = 0; t < kTokens; ++t) {
    const TensorView alone = Output(act(), {chosen, out});
    backend().ExpertLinear(
        {.x = x.Rows(t, 1), .weight = weight, .expert_ids = ids.Rows(t, 1), .out = alone});
    ASSERT_TRUE(
        SameBits(GetBytes(together.Rows(t * chosen, chosen)), GetBytes(alone), DTypeBytes(act())));
  }
}

TEST_P(OpExperts, WhatTheyGiveIsAddedWeighted) {
  const int64_t chosen = shape().chosen, hidden = shape().out_features;
  for (int64_t tokens : {1, 7, 100}) {
    const Values x = random_.Normal(tokens * chosen * hidden, act());
    const Values weights = random_.Normal(tokens * chosen, DType::kFloat32);
    Values want = random_.Normal(tokens * hidden, DType::kFloat32);
    const TensorView out = Put(want, DType::kFloat32, {tokens, hidden});
    backend().AddExperts({.x = Put(x, act(), {tokens * chosen, hidden}),
                          .weights = Put(weights, DType::kFloat32, {tokens, chosen}),
                          .out = out});
    for (int64_t i = 0; i < tokens * chosen * hidden; ++i) {
      want[i / (chosen * hidden) * hidden + i % hidden] += weights[i / hidden] * x[i];
    }
    EXPECT_TRUE(Close(Get(out), want, ToleranceFor(Op::kLinear, DType::kFloat32)));
  }
}

// What the parts give in turn, choices and weights included, for few tokens and for many, without
// biases and, as gpt-oss has it, with them.
class OpExpertMlp : public OpExperts {
 protected:
  static constexpr int64_t kInner = 32;

  void ExpectItsParts(Activation activation, const TensorView& gate_up_bias,
                      const TensorView& down_bias, RouterScore score = RouterScore::kSoftmax);
};

void OpExpertMlp::ExpectItsParts(Activation activation, const TensorView& gate_up_bias,
                                 const TensorView& down_bias, RouterScore score) {
  const auto [name, num_experts, chosen, hidden, out] = shape();
  const double size = 1.0 / std::sqrt(static_cast<double>(hidden));
  const Weight gate_up(Put(random_.Normal(num_experts * 2 * kInner * hidden, dtype(), size),
                           dtype(), {num_experts * 2 * kInner, hidden}));
  const Weight down(Put(random_.Normal(num_experts * hidden * kInner, dtype(), 0.05), dtype(),
                        {num_experts * hidden, kInner}));
  for (int64_t tokens : {1, 3, 150}) {
    SCOPED_TRACE(tokens);
    const int64_t choices = tokens * chosen;
    const Values logits = random_.Normal(tokens * num_experts, DType::kFloat32, 3.0);
    const Values x = random_.Normal(tokens * hidden, act());
    const Values residual = random_.Normal(tokens * hidden, DType::kFloat32);
    auto make = [&] {
      ExpertMlpArgs args;
      args.select = {.logits = Put(logits, DType::kFloat32, {tokens, num_experts}),
                     .expert_ids = Output(DType::kInt32, {tokens, chosen}),
                     .weights = Output(DType::kFloat32, {tokens, chosen}),
                     .score = score,
                     .scale = 1.5f};
      args.gate_up = {.x = Put(x, act(), {tokens, hidden}),
                      .weight = gate_up,
                      .bias = gate_up_bias,
                      .expert_ids = args.select.expert_ids,
                      .out = Output(act(), {choices, 2 * kInner})};
      args.gate_mul = {.gate_up = args.gate_up.out,
                       .out = Output(act(), {choices, kInner}),
                       .activation = activation,
                       .limit = 1.0f,
                       .alpha = 1.7f};
      args.down = {.x = args.gate_mul.out,
                   .weight = down,
                   .bias = down_bias,
                   .expert_ids = args.select.expert_ids,
                   .out = Output(act(), {choices, hidden})};
      args.add = {.x = args.down.out,
                  .weights = args.select.weights,
                  .out = Put(residual, DType::kFloat32, {tokens, hidden})};
      return args;
    };
    const ExpertMlpArgs want = make(), got = make();
    backend().SelectExperts(want.select);
    backend().ExpertLinear(want.gate_up);
    backend().GateMul(want.gate_mul);
    backend().ExpertLinear(want.down);
    backend().AddExperts(want.add);
    backend().ExpertMlp(got);
    EXPECT_EQ(GetInts(got.select.expert_ids), GetInts(want.select.expert_ids));
    EXPECT_EQ(Get(got.select.weights), Get(want.select.weights));
    EXPECT_TRUE(Close(Get(got.add.out), Get(want.add.out), ToleranceFor(Op::kFused, act())));
  }
}

TEST_P(OpExpertMlp, IsItsParts) {
  ExpectItsParts(Activation::kGeluTanh, {}, {});
}

TEST_P(OpExpertMlp, IsItsPartsWithBiasesAndAClamp) {
  const auto [name, num_experts, chosen, hidden, out] = shape();
  auto bias = [&](int64_t outputs) {
    return Put(random_.Normal(num_experts * outputs, dtype()), dtype(), {num_experts * outputs});
  };
  ExpectItsParts(Activation::kClampedSwiglu, bias(2 * kInner), bias(hidden));
}

TEST_P(OpExpertMlp, IsItsPartsBySigmoids) {
  ExpectItsParts(Activation::kSilu, {}, {}, RouterScore::kSigmoid);
}

TEST_P(OpExperts, AnMlpIsOfTensorsThatBelongTogether) {
  ExpertMlpArgs args;
  const auto [name, num_experts, chosen, hidden, out] = shape();
  const Weight weight(Output(dtype(), {num_experts * hidden, hidden}));
  args.select = {.logits = Output(DType::kFloat32, {2, num_experts}),
                 .expert_ids = Output(DType::kInt32, {2, chosen}),
                 .weights = Output(DType::kFloat32, {2, chosen})};
  args.gate_up = {.x = Output(act(), {2, hidden}),
                  .weight = weight,
                  .expert_ids = Output(DType::kInt32, {2, chosen}),
                  .out = Output(act(), {2 * chosen, hidden})};
  args.gate_mul = {.gate_up = args.gate_up.out, .out = Output(act(), {2 * chosen, hidden / 2})};
  args.down = {.x = args.gate_mul.out,
               .weight = Weight(Output(dtype(), {num_experts * hidden, hidden / 2})),
               .expert_ids = args.select.expert_ids,
               .out = Output(act(), {2 * chosen, hidden})};
  args.add = {.x = args.down.out,
              .weights = args.select.weights,
              .out = Output(DType::kFloat32, {2, hidden})};
  try {
    backend().ExpertMlp(args);
    FAIL() << "experts of another selection were taken";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("gate_up.expert_ids"), std::string::npos)
        << error.what();
  }
}

std::vector<OpCase<ExpertShape>> AllCases() {
  auto cases = Cases<ExpertShape>(
      AllBackends(), {{"8_of_2", 8, 2, 256, 512}, {"128_of_8", 128, 8, 64, 96}},
      {{"5_of_5", 5, 5, 64, 37}, {"256_of_8", 256, 8, 64, 16}, {"600_of_40", 600, 40, 32, 16}});
  // Rows that the copy engine brings, and more units than there are warps.
  for (const BackendCase& on : AllBackends()) {
    if (!on.is_cpu()) cases.push_back({on, {"48_of_3_long_rows", 48, 3, 1032, 520}});
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Backends, OpExperts, ::testing::ValuesIn(AllCases()),
                         CaseNameOf<OpCase<ExpertShape>>);
INSTANTIATE_TEST_SUITE_P(Backends, OpExpertMlp, ::testing::ValuesIn(AllCases()),
                         CaseNameOf<OpCase<ExpertShape>>);

}  // namespace
}  // namespace tidal::test
