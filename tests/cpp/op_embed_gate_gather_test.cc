// The small ops around the big ones: Embed, GateMul, ScaleLogits, GatherRows.
#include <gtest/gtest.h>

#include "backend_test.h"

namespace tidal::test {
namespace {

class OpRows : public BackendTest {
 protected:
  void SetUp() override {
    BackendTest::SetUp();
    if (!IsSkipped()) Open(GetParam(), SmallLimits(GetParam().dtype));
  }
};

TEST_P(OpRows, EmbedWidensExactly) {
  constexpr int64_t kVocab = 1000, kHidden = 256;
  Random random(1);
  for (int64_t num_tokens : {1, 2, 7, 256}) {
    SCOPED_TRACE(num_tokens);
    const Values table = random.Normal(kVocab * kHidden, on().dtype);
    Ints ids = random.Below(num_tokens, kVocab);
    ids.front() = 0;
    ids.back() = kVocab - 1;
    const TensorView out = Output(DType::kFloat32, {num_tokens, kHidden});
    backend().Embed({.token_ids = PutInts(ids, {num_tokens}),
                     .table = Put(table, on().dtype, {kVocab, kHidden}),
                     .out = out});
    EXPECT_EQ(Get(out), reference::Embed(ids, table, kHidden));
  }
}

TEST_P(OpRows, EmbedKeepsNanInItsRow) {
  constexpr int64_t kVocab = 16, kHidden = 64;
  Values table = Random(2).Normal(kVocab * kHidden, on().dtype);
  table[5 * kHidden + 3] = NAN;
  const Ints ids = {4, 5, 6, 5};
  const TensorView out = Output(DType::kFloat32, {4, kHidden});
  backend().Embed({.token_ids = PutInts(ids, {4}),
                   .table = Put(table, on().dtype, {kVocab, kHidden}),
                   .out = out});
  EXPECT_TRUE(Close(Get(out), reference::Embed(ids, table, kHidden), {}));
}

TEST_P(OpRows, EmbedScalesInFloat32) {
  constexpr int64_t kVocab = 16, kHidden = 66;
  const Values table = Random(9).Normal(kVocab * kHidden, on().dtype);
  const Ints ids = {4, 0, 15};
  const TensorView out = Output(DType::kFloat32, {3, kHidden});
  const float scale = 12.0f / 0.22f;
  backend().Embed({.token_ids = PutInts(ids, {3}),
                   .table = Put(table, on().dtype, {kVocab, kHidden}),
                   .out = out,
                   .scale = scale});
  Values want = reference::Embed(ids, table, kHidden);
  for (double& value : want) value = static_cast<float>(value) * scale;
  EXPECT_EQ(Get(out), want);
}

TEST_P(OpRows, ScaleLogitsScalesEveryLogit) {
  for (const Shape& shape : {Shape{1, 5}, Shape{3, 1001}, Shape{64, 32'003}}) {
    SCOPED_TRACE(shape[1]);
    const Values logits = Random(10).Normal(shape[0] * shape[1], DType::kFloat32, 3.0);
    const TensorView put = Put(logits, DType::kFloat32, shape);
    backend().ScaleLogits({put, 0.1f});
    Values want = logits;
    for (double& value : want) value = static_cast<float>(value) * 0.1f;
    EXPECT_EQ(Get(put), want);
  }
}

TEST_P(OpRows, GateMulMatchesReference) {
  Random random(3);
  for (int64_t num_rows : {1, 3, 64}) {
    SCOPED_TRACE(num_rows);
    constexpr int64_t kInner = 328;
    const Values gate_up = random.Normal(num_rows * 2 * kInner, act(), 3.0);
    const TensorView out = Output(act(), {num_rows, kInner});
    backend().GateMul({.gate_up = Put(gate_up, act(), {num_rows, 2 * kInner}), .out = out});
    EXPECT_TRUE(
        Close(Get(out), reference::GateMul(gate_up, kInner), ToleranceFor(Op::kGateMul, act())));
  }
}

TEST_P(OpRows, GateMulOfLargeGatesIsZeroOrIdentity) {
  constexpr int64_t kInner = 64;
  Values gate_up(2 * kInner, 1.0);
  for (int64_t i = 0; i < kInner; ++i) gate_up[i] = i % 2 == 0 ? 1000.0 : -1000.0;
  for (Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
    const TensorView out = Output(act(), {1, kInner});
    backend().GateMul({Put(gate_up, act(), {1, 2 * kInner}), out, activation});
    EXPECT_TRUE(Close(Get(out), reference::GateMul(gate_up, kInner, activation), {1e-30, 0.0}));
  }
}

TEST_P(OpRows, GateMulByGeluMatchesReference) {
  constexpr int64_t kRows = 7, kInner = 331;
  const Values gate_up = Random(13).Normal(kRows * 2 * kInner, act(), 3.0);
  const TensorView out = Output(act(), {kRows, kInner});
  backend().GateMul({Put(gate_up, act(), {kRows, 2 * kInner}), out, Activation::kGeluTanh});
  EXPECT_TRUE(Close(Get(out), reference::GateMul(gate_up, kInner, Activation::kGeluTanh),
                    ToleranceFor(Op::kGateMul, act())));
}

TEST_P(OpRows, GateMulClampsBothOfASwiglu) {
  constexpr int64_t kRows = 7, kInner = 331;
  Values gate_up = Random(15).Normal(kRows * 2 * kInner, act(), 3.0);
  gate_up[5] = 1000.0;
  gate_up[6] = -1000.0;
  gate_up[kInner + 7] = 1000.0;
  gate_up[8] = gate_up[kInner + 9] = std::nan("");
  for (double limit : {7.0, 2.0}) {
    const TensorView out = Output(act(), {kRows, kInner});
    backend().GateMul({.gate_up = Put(gate_up, act(), {kRows, 2 * kInner}),
                       .out = out,
                       .activation = Activation::kClampedSwiglu,
                       .limit = static_cast<float>(limit),
                       .alpha = 1.7f});
    EXPECT_TRUE(Close(Get(out), reference::ClampedSwiglu(gate_up, kInner, limit, 1.7f),
                      ToleranceFor(Op::kGateMul, act())));
  }
}

TEST_P(OpRows, ScaleLogitsCapsThem) {
  const Values logits = Random(14).Normal(3 * 1001, DType::kFloat32, 40.0);
  const TensorView put = Put(logits, DType::kFloat32, {3, 1001});
  backend().ScaleLogits({put, 0.5f, 30.0f});
  Values want = logits;
  for (double& value : want) value = 30.0 * std::tanh(0.5 * value / 30.0);
  EXPECT_TRUE(Close(Get(put), want, {1e-5, 1e-6}));
}

TEST_P(OpRows, GatherRowsCopiesBits) {
  constexpr int64_t kRows = 33, kHidden = 256;
  Values x = Random(4).Normal(kRows * kHidden, DType::kFloat32);
  x[7] = NAN;
  const TensorView from = Put(x, DType::kFloat32, {kRows, kHidden});
  for (const Ints& rows : {Ints{0}, Ints{32, 0, 7, 7}, Random(5).Below(50, kRows)}) {
    const int64_t count = static_cast<int64_t>(rows.size());
    const TensorView out = Output(DType::kFloat32, {count, kHidden});
    backend().GatherRows({.x = from, .rows = PutInts(rows, {count}), .out = out});
    EXPECT_TRUE(SameBits(GetBytes(out),
                         Encode(reference::GatherRows(x, rows, kHidden), DType::kFloat32), 4));
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, OpRows, ::testing::ValuesIn(AllBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
