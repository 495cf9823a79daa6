// NormLinear, QkvRopeAppend, GateUpMul: several ops in one give what the parts give in turn.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "backend_test.h"
#include "core/float8.h"
#include "layer_sizes.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

constexpr float kEps = 1e-5f;

// A layer's projections: few tokens are a decode step's, more a prompt's.
struct LayerShape {
  std::string name;
  int64_t num_tokens = 0;
  int64_t hidden_size = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t intermediate_size = 0;
};

// The larger of gate and up in size, at least 1, for each product of the two; gate_up: [tokens, 2 *
// size].
Values FactorSizes(const Values& gate_up, int64_t size) {
  Values sizes;
  for (size_t i = 0; i < gate_up.size(); ++i) {
    const auto column = static_cast<int64_t>(i) % (2 * size);
    if (column >= size) continue;
    const double gate = std::abs(gate_up[i]);
    const double up = std::abs(gate_up[i + static_cast<size_t>(size)]);
    sizes.push_back(std::max({1.0, gate, up}));
  }
  return sizes;
}

Values Divided(Values values, const Values& by) {
  for (size_t i = 0; i < values.size(); ++i) values[i] /= by[i];
  return values;
}

class OpFused : public OpTest<LayerShape> {
 protected:
  void SetUp() override {
    OpTest::SetUp();
    if (IsSkipped()) return;
    StepLimits limits = SmallLimits(dtype());
    SetLayerSizes(shape(), limits.model);
    limits.model.qk_norm = true;
    limits.max_batch_size = 16;
    limits.page_size = kPageSize;
    Open(GetParam().on, limits);
    int64_t tokens = shape().num_tokens, hidden = shape().hidden_size;
    hidden_ = random_.Normal(tokens * hidden, DType::kFloat32, 3.0);
    norm_weight_ = random_.Normal(hidden, dtype(), 0.3, 1.0);
  }

  RmsNormArgs Norm() {
    int64_t tokens = shape().num_tokens, hidden = shape().hidden_size;
    return {.x = Put(hidden_, DType::kFloat32, {tokens, hidden}),
            .weight = Put(norm_weight_, dtype(), {hidden}),
            .out = Output(act(), {tokens, hidden}),
            .eps = kEps};
  }

  // Outputs of size about 1.
  LinearArgs Projection(const RmsNormArgs& norm, int64_t num_outputs, DType out, bool with_bias) {
    int64_t hidden = shape().hidden_size;
    double stddev = 1.0 / std::sqrt(static_cast<double>(hidden));
    LinearArgs args;
    args.x = norm.out;
    args.weight =
        Put(random_.Normal(num_outputs * hidden, dtype(), stddev), dtype(), {num_outputs, hidden});
    if (with_bias) args.bias = Put(random_.Normal(num_outputs, dtype()), dtype(), {num_outputs});
    args.out = Output(out, {shape().num_tokens, num_outputs});
    return args;
  }

  // Each token is the next of a sequence of its own; the second row is idle.
  RopeAppendKvArgs Append(const TensorView& qkv, bool with_norms) {
    const int64_t tokens = shape().num_tokens, dim = shape().head_dim;
    Ints positions, seq_idx, table;
    for (int32_t t = 0; t < tokens; ++t) {
      positions.push_back(t == 1 ? -1 : 5 * t % (kMaxPages * kPageSize));
      seq_idx.push_back(t);
      for (int32_t page = 0; page < kMaxPages; ++page) table.push_back(kMaxPages * t + page);
    }
    RopeAppendKvArgs append;
    append.qkv = qkv;
    append.cos_sin =
        Put(random_.Normal(tokens * dim, DType::kFloat32, 0.7), DType::kFloat32, {tokens, dim});
    if (with_norms) {
      append.q_norm = Put(random_.Normal(dim, dtype(), 0.3, 1.0), dtype(), {dim});
      append.k_norm = Put(random_.Normal(dim, dtype(), 0.3, 1.0), dtype(), {dim});
    }
    append.norm_eps = kEps;
    append.positions = PutInts(positions, {tokens});
    append.seq_idx = PutInts(seq_idx, {tokens});
    append.kv.page_table = PutInts(table, {tokens, kMaxPages});
    append.kv.seq_lens = PutInts(Ints(static_cast<size_t>(tokens), 1), {tokens});
    return append;
  }

  // NaN wherever nothing will be appended.
  void FreshOutputs(RopeAppendKvArgs& append, DType kv_dtype) {
    const Shape pages = {kNumPages, shape().num_kv_heads, kPageSize, shape().head_dim};
    append.q = Output(act(), {shape().num_tokens, shape().num_q_heads, shape().head_dim});
    append.kv.k_pages = Output(kv_dtype, pages);
    append.kv.v_pages = Output(kv_dtype, pages);
  }

  LinearArgs Qkv(const RmsNormArgs& norm, bool with_bias) {
    const int64_t heads = shape().num_q_heads + 2 * shape().num_kv_heads;
    return Projection(norm, heads * shape().head_dim, act(), with_bias);
  }

  void Parts(const RmsNormArgs& norm, const LinearArgs& linear) {
    backend().RmsNorm(norm);
    backend().Linear(linear);
  }

  static constexpr int64_t kPageSize = 16, kNumPages = 40, kMaxPages = 2;
  Random random_{7};
  Values hidden_, norm_weight_;
};

TEST_P(OpFused, NormLinear) {
  for (DType out : {act(), DType::kFloat32}) {
    for (bool with_bias : {false, true}) {
      RmsNormArgs norm = Norm();
      LinearArgs linear = Projection(norm, shape().intermediate_size, out, with_bias);
      backend().NormLinear({norm, linear});
      Values fused = Get(linear.out);
      linear.out = Output(out, {shape().num_tokens, shape().intermediate_size});
      Parts(norm, linear);
      EXPECT_TRUE(Close(fused, Get(linear.out), ToleranceFor(Op::kFused, act())));
    }
  }
}

TEST_P(OpFused, GateUpMul) {
  for (const auto& [activation, with_bias] :
       {std::pair(Activation::kSilu, false), std::pair(Activation::kSilu, true),
        std::pair(Activation::kGeluTanh, false), std::pair(Activation::kClampedSwiglu, true)}) {
    int64_t size = shape().intermediate_size;
    RmsNormArgs norm = Norm();
    LinearArgs linear = Projection(norm, 2 * size, act(), with_bias);
    GateMulArgs gate_mul = {.gate_up = linear.out,
                            .out = Output(act(), {shape().num_tokens, size}),
                            .activation = activation,
                            .limit = 1.0f,
                            .alpha = 1.7f};
    backend().GateUpMul({norm, linear, gate_mul});
    Values fused = Get(gate_mul.out);
    gate_mul.out = Output(act(), {shape().num_tokens, size});
    Parts(norm, linear);
    backend().GateMul(gate_mul);
    // A rounding of one factor counts as often as the other is large.
    const Values sizes = FactorSizes(Get(linear.out), size);
    EXPECT_TRUE(Close(Divided(fused, sizes), Divided(Get(gate_mul.out), sizes),
                      ToleranceFor(Op::kFused, act())));
  }
}

TEST_P(OpFused, GateUpMulOfInputsThatAreNormed) {
  const int64_t size = shape().intermediate_size;
  const RmsNormArgs norm = Norm();
  backend().RmsNorm(norm);
  LinearArgs linear = Projection(norm, 2 * size, act(), /*with_bias=*/false);
  GateMulArgs gate_mul = {.gate_up = linear.out, .out = Output(act(), {shape().num_tokens, size})};
  backend().GateUpMul({{}, linear, gate_mul});
  const Values fused = Get(gate_mul.out);
  gate_mul.out = Output(act(), {shape().num_tokens, size});
  backend().Linear(linear);
  backend().GateMul(gate_mul);
  const Values sizes = FactorSizes(Get(linear.out), size);
  EXPECT_TRUE(Close(Divided(fused, sizes), Divided(Get(gate_mul.out), sizes),
                    ToleranceFor(Op::kFused, act())));
}

TEST_P(OpFused, QkvRopeAppend) {
  for (bool with_norms : {false, true}) {
    RmsNormArgs norm = Norm();
    LinearArgs linear = Qkv(norm, /*with_bias=*/!with_norms);
    RopeAppendKvArgs append = Append(linear.out, with_norms);
    FreshOutputs(append, dtype());
    backend().QkvRopeAppend({norm, linear, append});
    Values q = Get(append.q), k = Get(append.kv.k_pages), v = Get(append.kv.v_pages);
    FreshOutputs(append, dtype());
    Parts(norm, linear);
    backend().RopeAppendKv(append);
    EXPECT_TRUE(Close(q, Get(append.q), ToleranceFor(Op::kFused, act())));
    EXPECT_TRUE(Close(k, Get(append.kv.k_pages), ToleranceFor(Op::kFused, act())));
    EXPECT_TRUE(Close(v, Get(append.kv.v_pages), ToleranceFor(Op::kFused, act())));
  }
}

// A number within rounding of the middle of two codes may become either.
// On the way there numbers may have been rounded, or not.
void ExpectCloseCodes(const Bytes& got, const Bytes& want, double scale, Tolerance rounding) {
  ASSERT_EQ(got.size(), want.size());
  int64_t num_written = 0, num_others = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const float a = Float8ToFloat(got[i]), b = Float8ToFloat(want[i]);
    ASSERT_EQ(std::isnan(a), std::isnan(b)) << i;
    if (std::isnan(a)) continue;
    const double step = (0.126 + rounding.rel) * std::max(std::fabs(a), std::fabs(b));
    ASSERT_LE(std::fabs(a - b), step + rounding.abs / scale + 0x1p-9) << i;
    ++num_written;
    num_others += a != b;
  }
  EXPECT_GT(num_written, 0);
  EXPECT_LE(num_others, num_written / 5 + 1);
}

TEST_P(OpFused, QkvRopeAppendToAnFp8Cache) {
  for (bool with_norms : {false, true}) {
    RmsNormArgs norm = Norm();
    LinearArgs linear = Qkv(norm, /*with_bias=*/!with_norms);
    RopeAppendKvArgs append = Append(linear.out, with_norms);
    append.kv.k_scale = 0.04f;
    append.kv.v_scale = 1.5f;
    FreshOutputs(append, DType::kFloat8);
    backend().QkvRopeAppend({norm, linear, append});
    const Values q = Get(append.q);
    const Bytes k = GetBytes(append.kv.k_pages), v = GetBytes(append.kv.v_pages);
    FreshOutputs(append, DType::kFloat8);
    Parts(norm, linear);
    backend().RopeAppendKv(append);
    EXPECT_TRUE(Close(q, Get(append.q), ToleranceFor(Op::kFused, act())));
    const Tolerance rounding = ToleranceFor(Op::kFused, act());
    ExpectCloseCodes(k, GetBytes(append.kv.k_pages), append.kv.k_scale, rounding);
    ExpectCloseCodes(v, GetBytes(append.kv.v_pages), append.kv.v_scale, rounding);
  }
}

TEST_P(OpFused, TensorsThatDoNotFitTogetherAreRefused) {
  RmsNormArgs norm = Norm();
  LinearArgs linear = Projection(norm, 8, act(), false);
  linear.x = Put(hidden_, act(), {shape().num_tokens, shape().hidden_size});
  EXPECT_THROW(backend().NormLinear({norm, linear}), InvalidArgument);
}

std::vector<LayerShape> EverywhereShapes() {
  return {
      {"tokens1", 1, 1056, 8, 2, 64, 488},        {"tokens1_long", 1, 4096, 4, 1, 128, 488},
      {"tokens2", 2, 512, 4, 4, 64, 2400},        {"tokens3", 3, 544, 6, 2, 128, 320},
      {"tokens1_tiles", 1, 1024, 4, 2, 64, 4800}, {"tokens2_long", 2, 1024, 4, 2, 64, 4800},
      {"tokens3_long", 3, 1024, 4, 2, 64, 4800},  {"tokens4_long", 4, 3072, 4, 2, 128, 2560},
      {"tokens5", 5, 64, 5, 1, 64, 128},          {"tokens8", 8, 2048, 8, 2, 128, 1000},
      {"tokens16", 16, 256, 8, 2, 64, 344},       {"tokens13_long", 13, 1024, 4, 2, 64, 4800},
  };
}

std::vector<OpCase<LayerShape>> AllCases() {
  std::vector<OpCase<LayerShape>> cases =
      Cases<LayerShape>(AllBackends(), EverywhereShapes(), {{"odd", 3, 131, 2, 1, 6, 77}});
  for (const BackendCase& on : AllBackends()) {
    if (!on.has_all_head_dims()) continue;
    cases.push_back({on, {"tokens3_d80", 3, 480, 4, 2, 80, 640}});
    cases.push_back({on, {"tokens2_d96", 2, 480, 4, 2, 96, 640}});
    cases.push_back({on, {"tokens4_d256", 4, 640, 4, 1, 256, 1000}});
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Backends, OpFused, ::testing::ValuesIn(AllCases()),
                         CaseNameOf<OpCase<LayerShape>>);

}  // namespace
}  // namespace tidal::test
