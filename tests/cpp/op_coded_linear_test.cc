// Linear, alone and with what stands beside it in a layer, of weights in codes: what the numbers
// that the codes stand for give. Only where Backend::ReadsCodes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "coded_product_test.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

struct CodedShape {
  std::string name;
  CodesCase how;
  int64_t in_features = 0;
  int64_t out_features = 0;
};

// More tokens than this may, on CUDA, be given the decoded weight, rounded to 16 bits.
constexpr int64_t kMostStreamed = 32;
constexpr int64_t kMostTokens = 130;
// For float32 results: numbers of codes have longer tails than those of other tests.
constexpr Tolerance kUnrounded = {1e-4, 1e-4};

class OpCodedLinear : public CodedProductTest<CodedShape> {
 protected:
  OpCodedLinear() : CodedProductTest(11) {}

  void SetUp() override {
    OpTest::SetUp();
    if (!IsSkipped()) OpenWith({});
  }

  void OpenWith(BackendOptions options) {
    Open(GetParam().on, Limits(), options);
    MakeMatrix();
    weight_ = PutMatrix();
    if (!backend().ReadsCodes(weight_)) {
      ASSERT_FALSE(ReadsRowsOfFloat8() && shape().how.codes != WeightCodes::kMxfp4)
          << "this device's products read other codes";
      GTEST_SKIP() << "this device's products read no codes";
    }
    x_ = random_.Normal(kMostTokens * shape().in_features, act());
    bias_ = random_.Normal(shape().out_features, dtype());
  }

  // Whether a matrix of this shape is read in the format that asks for least.
  bool ReadsRowsOfFloat8() {
    const int64_t in = shape().in_features, out = shape().out_features;
    Weight rows(TensorView(weight_.data.ptr, DType::kUInt8, {out, in}));
    rows.codes = WeightCodes::kFloat8;
    rows.group_size = in;
    rows.scales = TensorView(weight_.scales.ptr, DType::kFloat32, {1, out});
    return backend().ReadsCodes(rows);
  }

  Values Want(int64_t tokens, const Values& bias) const {
    const bool is_rounded = tokens > kMostStreamed && !GetParam().on.is_cpu();
    const Values weight = is_rounded ? Rounded(matrix_.values, dtype()) : matrix_.values;
    return reference::Linear(FirstInputs(tokens, x_), weight, bias, shape().in_features);
  }
};

TEST_P(OpCodedLinear, IsTheProductWithWhatTheCodesStandFor) {
  for (int64_t tokens : {1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 65, 130}) {
    SCOPED_TRACE(tokens);
    const TensorView out = Output(act(), {tokens, shape().out_features});
    LinearArgs args = Args(tokens, out);
    backend().Linear(args);
    EXPECT_TRUE(Close(Get(out), Want(tokens, {}), ToleranceFor(Op::kLinear, act())));
    args.bias = Put(bias_, dtype(), {shape().out_features});
    args.out = Output(DType::kFloat32, {tokens, shape().out_features});
    backend().Linear(args);
    EXPECT_TRUE(Close(Get(args.out), Want(tokens, bias_), kUnrounded));
  }
}

TEST_P(OpCodedLinear, AccumulatesIntoTheResidualStream) {
  for (int64_t tokens : {1, 2, 3, 8, 16, 33, 100}) {
    SCOPED_TRACE(tokens);
    const Values residual = random_.Normal(tokens * shape().out_features, DType::kFloat32);
    const TensorView out = Put(residual, DType::kFloat32, {tokens, shape().out_features});
    LinearArgs args = Args(tokens, out);
    args.output = LinearOutput::kAccumulate;
    backend().Linear(args);
    Values want = Want(tokens, {});
    for (size_t i = 0; i < want.size(); ++i) want[i] += residual[i];
    EXPECT_TRUE(Close(Get(out), want, kUnrounded));
  }
}

// Few tokens of int4 have sums of their own, but in batch-invariant steps.
TEST_P(OpCodedLinear, ATokenIsTheSameWhateverIsBesideIt) {
  OpenWith({.device = {}, .batch_invariant = shape().how.codes == WeightCodes::kInt4});
  const TensorView all = Output(act(), {kMostStreamed, shape().out_features});
  const LinearArgs args = Args(kMostStreamed, all);
  backend().RunStep(NewStep(), [&] { backend().Linear(args); });
  const Values want = Get(all);
  for (int64_t tokens : {1, 2, 4, 5, 7, 8, 9, 15, 16, 31}) {
    SCOPED_TRACE(tokens);
    const TensorView out = Output(act(), {tokens, shape().out_features});
    const LinearArgs fewer = Args(tokens, out);
    backend().RunStep(NewStep(), [&] { backend().Linear(fewer); });
    EXPECT_EQ(Get(out), FirstRows(want, tokens, shape().out_features));
  }
}

TEST_P(OpCodedLinear, NanStaysInItsToken) {
  const auto columns = static_cast<size_t>(shape().out_features);
  x_[static_cast<size_t>(shape().in_features) + 5] = std::nan("");
  for (int64_t tokens : {2, 3, 9}) {
    SCOPED_TRACE(tokens);
    const TensorView out = Output(DType::kFloat32, {tokens, shape().out_features});
    backend().Linear(Args(tokens, out));
    Values got = Get(out), want = Want(tokens, {});
    for (size_t i = columns; i < 2 * columns; ++i) {
      ASSERT_TRUE(std::isnan(got[i])) << i;
      got[i] = want[i] = 0.0;
    }
    EXPECT_TRUE(Close(got, want, kUnrounded));
  }
}

TEST_P(OpCodedLinear, ANormInFrontIsTheSame) {
  const int64_t in = shape().in_features, outputs = shape().out_features;
  for (int64_t tokens : {1, 2, 3, 4, 5, 16, 70}) {
    SCOPED_TRACE(tokens);
    RmsNormArgs norm = {
        .x = Put(random_.Normal(tokens * in, DType::kFloat32, 3.0), DType::kFloat32, {tokens, in}),
        .weight = Put(random_.Normal(in, dtype(), 0.3, 1.0), dtype(), {in}),
        .out = Output(act(), {tokens, in}),
        .eps = 1e-5f};
    LinearArgs linear = Args(tokens, Output(act(), {tokens, outputs}));
    linear.x = norm.out;
    backend().NormLinear({norm, linear});
    const Values fused = Get(linear.out);
    linear.out = Output(act(), {tokens, outputs});
    backend().RmsNorm(norm);
    backend().Linear(linear);
    EXPECT_TRUE(Close(fused, Get(linear.out), ToleranceFor(Op::kFused, act())));
  }
}

TEST_P(OpCodedLinear, GateMulBehindIsTheSame) {
  ExpectNormAndGateMulAreTheSame({1, 5, 12, 20, 70});
}

TEST_P(OpCodedLinear, RotationAndAppendBehindAreTheSame) {
  constexpr int64_t kDim = 64, kPage = 16;
  const int64_t in = shape().in_features, heads = shape().out_features / kDim - 2;
  for (int64_t tokens : {1, 3, 11, 16}) {
    SCOPED_TRACE(tokens);
    Ints positions, seq_idx, table;
    for (int32_t t = 0; t < tokens; ++t) {
      positions.push_back(t == 1 ? -1 : 3 * t % kPage);
      seq_idx.push_back(t);
      table.push_back(t);
    }
    RmsNormArgs norm = {
        .x = Put(random_.Normal(tokens * in, DType::kFloat32), DType::kFloat32, {tokens, in}),
        .weight = Put(random_.Normal(in, dtype(), 0.1, 0.3), dtype(), {in}),
        .out = Output(act(), {tokens, in}),
        .eps = 1e-5f};
    LinearArgs linear = Args(tokens, Output(act(), {tokens, (heads + 2) * kDim}));
    linear.x = norm.out;
    const Values angles = random_.Normal(tokens * kDim, DType::kFloat32);
    auto append = [&] {
      RopeAppendKvArgs args;
      args.qkv = linear.out;
      args.cos_sin = Put(angles, DType::kFloat32, {tokens, kDim});
      args.positions = PutInts(positions, {tokens});
      args.seq_idx = PutInts(seq_idx, {tokens});
      args.q = Output(act(), {tokens, heads, kDim});
      const Values empty(static_cast<size_t>(tokens * kPage * kDim));
      args.kv.k_pages = Put(empty, dtype(), {tokens, 1, kPage, kDim});
      args.kv.v_pages = Put(empty, dtype(), {tokens, 1, kPage, kDim});
      args.kv.page_table = PutInts(table, {tokens, 1});
      args.kv.seq_lens = PutInts(Ints(static_cast<size_t>(tokens), kPage), {tokens});
      return args;
    };
    const RopeAppendKvArgs fused = append();
    backend().QkvRopeAppend({norm, linear, fused});
    linear.out = Output(act(), {tokens, (heads + 2) * kDim});
    const RopeAppendKvArgs parts = append();
    backend().RmsNorm(norm);
    backend().Linear(linear);
    backend().RopeAppendKv(parts);
    const Tolerance tolerance = ToleranceFor(Op::kFused, act());
    EXPECT_TRUE(Close(Get(fused.kv.k_pages), Get(parts.kv.k_pages), tolerance));
    EXPECT_TRUE(Close(Get(fused.kv.v_pages), Get(parts.kv.v_pages), tolerance));
    const Values got = Get(fused.q), want = Get(parts.q);
    EXPECT_TRUE(
        Close(FirstRows(got, 1, heads * kDim), FirstRows(want, 1, heads * kDim), tolerance));
  }
}

const std::vector<CodesCase> kKinds = {
    {"float8", WeightCodes::kFloat8, 0, DType::kFloat32},
    {"float8_bf16", WeightCodes::kFloat8, 0, DType::kBFloat16},
    {"float8_group128", WeightCodes::kFloat8, 128, DType::kFloat32},
    {"float8_group32", WeightCodes::kFloat8, 32, DType::kFloat16},
    {"int4", WeightCodes::kInt4, 128, DType::kBFloat16},
    {"int4_zeros", WeightCodes::kInt4, 128, DType::kFloat16, true},
    {"int4_group32_zeros", WeightCodes::kInt4, 32, DType::kFloat32, true},
    {"int4_group64", WeightCodes::kInt4, 64, DType::kFloat16},
    {"int4_row", WeightCodes::kInt4, 0, DType::kBFloat16},
    {"int4_group256", WeightCodes::kInt4, 256, DType::kBFloat16},
    {"mxfp4", WeightCodes::kMxfp4, 32, DType::kUInt8},
};

CodedShape ShapeOf(const CodesCase& how, int64_t in, int64_t out) {
  return {how.name + "_" + std::to_string(in) + "x" + std::to_string(out), how, in, out};
}

std::vector<OpCase<CodedShape>> AllCases() {
  std::vector<CodedShape> small, ragged, large;
  for (const CodesCase& how : kKinds) {
    small.push_back(ShapeOf(how, 576, 192));
    ragged.push_back(ShapeOf(how, 328, 192));
    large.push_back(ShapeOf(how, 1056, 1280));
    if (how.group_size <= 96) large.push_back(ShapeOf(how, 96, 192));
    large.push_back(ShapeOf(how, 2048, 192));
    large.push_back(ShapeOf(how, 2080, 192));
  }
  for (size_t kind : {size_t{0}, size_t{2}, size_t{5}}) {
    large.push_back(ShapeOf(kKinds[kind], 4096, 6144));
    large.push_back(ShapeOf(kKinds[kind], 14336, 256));
    large.push_back(ShapeOf(kKinds[kind], 128, 20480));
  }
  // So many outputs that a block takes four tiles at a time, and three tokens' inputs become
  // digits; int4 in groups of whole chunks.
  for (size_t kind : {size_t{4}, size_t{8}, size_t{9}}) {
    large.push_back(ShapeOf(kKinds[kind], 352, 17408));
  }
  large.push_back(ShapeOf(kKinds[5], 2048, 17408));
  std::vector<OpCase<CodedShape>> cases = Cases(AllBackends(), small, ragged);
  std::vector<BackendCase> devices = AllBackends();
  std::erase_if(devices, [](const BackendCase& on) { return on.is_cpu(); });
  for (const OpCase<CodedShape>& added : Cases(devices, large)) cases.push_back(added);
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Backends, OpCodedLinear, ::testing::ValuesIn(AllCases()),
                         CaseNameOf<OpCase<CodedShape>>);

}  // namespace
}  // namespace tidal::test
