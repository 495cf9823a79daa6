// Linear of a weight in float8 whose inputs are rounded to float8 too
// (LinearArgs::quantizes_inputs). Only where Backend::ReadsCodes.
#include <gtest/gtest.h>

#include <cmath>

#include "coded_product_test.h"
#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

struct InputsShape {
  std::string name;
  CodesCase how;
  int64_t in_features = 0;
  int64_t out_features = 0;
  float input_scale = 0.0f;
};

constexpr int64_t kMostTokens = 131;

class OpQuantizedInputs : public CodedProductTest<InputsShape> {
 protected:
  OpQuantizedInputs() : CodedProductTest(23) { quantizes_inputs_ = true; }

  void SetUp() override {
    OpTest::SetUp();
    if (!IsSkipped()) OpenWith({});
  }

  void OpenWith(BackendOptions options) {
    StepLimits limits = Limits();
    limits.quantized_inputs = shape().in_features;
    Open(GetParam().on, limits, options);
    MakeMatrix();
    weight_ = PutMatrix();
    weight_.input_scale = shape().input_scale;
    if (!backend().ReadsCodes(weight_)) GTEST_SKIP() << "this device's products read no codes";
    x_ = random_.Normal(kMostTokens * shape().in_features, act());
    // Groups, and tokens, of very different sizes; one of zeros.
    for (size_t i = 0; i < x_.size(); ++i) {
      const auto place = static_cast<int64_t>(i);
      const int64_t token = place / shape().in_features;
      const int64_t group = place % shape().in_features / matrix_.group_size;
      x_[i] *= token == 2 ? 0.0 : std::ldexp(1.0, static_cast<int>((token + 3 * group) % 5) - 2);
    }
    rounded_ = reference::RoundedInputs(x_, shape().in_features,
                                        {matrix_.group_size, shape().input_scale});
    bias_ = random_.Normal(shape().out_features, dtype());
  }

  Values Product(const Values& x, int64_t tokens, const Values& bias) const {
    return reference::Linear(FirstInputs(tokens, x), matrix_.values, bias, shape().in_features);
  }

  // The sums are of codes, or of 16-bit numbers that they, and those of the weight, stand for.
  double Limit() const { return GetParam().on.is_cpu() ? 2e-6 : 4e-3; }

  Values rounded_;
};

TEST_P(OpQuantizedInputs, AreRoundedByTheRule) {
  for (int64_t tokens : {1, 3, 16, 17, 33, 64, 65, 130, 131}) {
    SCOPED_TRACE(tokens);
    LinearArgs args = Args(tokens, Output(DType::kFloat32, {tokens, shape().out_features}));
    args.bias = Put(bias_, dtype(), {shape().out_features});
    backend().Linear(args);
    EXPECT_LT(RelativeError(Get(args.out), Product(rounded_, tokens, bias_)), Limit());
    args.out = Output(act(), {tokens, shape().out_features});
    args.bias = {};
    backend().Linear(args);
    const Values want = Product(rounded_, tokens, {});
    EXPECT_LT(RelativeError(Get(args.out), want), Limit());
    // The rounding itself is what shows.
    EXPECT_GT(RelativeError(Product(x_, tokens, {}), want), 1.6e-2);
  }
}

TEST_P(OpQuantizedInputs, AccumulateIntoTheResidualStream) {
  for (int64_t tokens : {1, 33, 130}) {
    SCOPED_TRACE(tokens);
    const Values residual = random_.Normal(tokens * shape().out_features, DType::kFloat32);
    LinearArgs args = Args(tokens, Put(residual, DType::kFloat32, {tokens, shape().out_features}));
    args.output = LinearOutput::kAccumulate;
    backend().Linear(args);
    Values want = Product(rounded_, tokens, {});
    for (size_t i = 0; i < want.size(); ++i) want[i] += residual[i];
    EXPECT_LT(RelativeError(Get(args.out), want), Limit());
  }
}

// How a prompt is cut into chunks does not matter, but for rounding.
TEST_P(OpQuantizedInputs, ATokenIsTheSameInChunksOfAnyLength) {
  const TensorView all = Output(DType::kFloat32, {kMostTokens, shape().out_features});
  backend().Linear(Args(kMostTokens, all));
  const Values want = Get(all);
  for (int64_t tokens : {1, 8, 32, 63}) {
    SCOPED_TRACE(tokens);
    const TensorView out = Output(DType::kFloat32, {tokens, shape().out_features});
    backend().Linear(Args(tokens, out));
    const Values first(want.begin(), want.begin() + tokens * shape().out_features);
    EXPECT_LT(RelativeError(Get(out), first), Limit());
  }
}

TEST_P(OpQuantizedInputs, ANormInFrontAndGateMulBehindAreTheSame) {
  ExpectNormAndGateMulAreTheSame({1, 16, 70});
}

TEST_P(OpQuantizedInputs, ABatchInvariantTokenIsTheSameBits) {
  OpenWith({.device = {}, .batch_invariant = true});
  const int64_t most = GetParam().on.is_cpu() ? 64 : kMostTokens;  // as far as that is promised
  const TensorView all = Output(act(), {most, shape().out_features});
  backend().Linear(Args(most, all));
  const Bytes want = GetBytes(all);
  for (int64_t tokens : {int64_t{1}, int64_t{17}, int64_t{63}, most - 1}) {
    SCOPED_TRACE(tokens);
    const TensorView out = Output(act(), {tokens, shape().out_features});
    backend().Linear(Args(tokens, out));
    const Bytes got = GetBytes(out);
    EXPECT_TRUE(
        SameBits(got, Bytes(want.begin(), want.begin() + std::ssize(got)), DTypeBytes(act())));
  }
}

TEST_P(OpQuantizedInputs, OfAnotherWeightAreRefused) {
  LinearArgs args = Args(3, Output(act(), {3, shape().out_features}));
  args.weight.input_scale = -1.0f;
  EXPECT_TRUE(Throws<InvalidArgument>([&] { backend().Linear(args); },
                                      {"Linear: weight.input_scale: got -1"}));
  args.weight = Put(matrix_.values, dtype(), {shape().out_features, shape().in_features});
  EXPECT_TRUE(Throws<InvalidArgument>([&] { backend().Linear(args); },
                                      {"Linear: quantizes_inputs", "expected codes of float8"}));
}

const CodesCase kRow = {"row", WeightCodes::kFloat8, 0, DType::kFloat32};
const CodesCase kGroup128 = {"group128", WeightCodes::kFloat8, 128, DType::kFloat32};
const CodesCase kGroup32 = {"group32", WeightCodes::kFloat8, 32, DType::kFloat16};

InputsShape ShapeOf(const CodesCase& how, int64_t in, int64_t out, float scale = 0.0f) {
  const std::string fixed = scale > 0.0f ? "_fixed" : "";
  return {how.name + "_" + std::to_string(in) + "x" + std::to_string(out) + fixed, how, in, out,
          scale};
}

std::vector<OpCase<InputsShape>> AllCases() {
  // The largest input saturates at 448 x the fixed scale.
  const std::vector<InputsShape> shapes = {
      ShapeOf(kRow, 576, 192),         ShapeOf(kRow, 1024, 256),
      ShapeOf(kRow, 1024, 256, 0.01f), ShapeOf(kGroup128, 576, 192),
      ShapeOf(kGroup128, 1024, 256),   ShapeOf(kGroup128, 1024, 256, 0.01f),
      ShapeOf(kGroup32, 576, 192)};
  const std::vector<InputsShape> ragged = {ShapeOf(kRow, 328, 192), ShapeOf(kGroup32, 328, 192)};
  return Cases(AllBackends(), shapes, ragged);
}

INSTANTIATE_TEST_SUITE_P(Backends, OpQuantizedInputs, ::testing::ValuesIn(AllCases()),
                         CaseNameOf<OpCase<InputsShape>>);

}  // namespace
}  // namespace tidal::test
