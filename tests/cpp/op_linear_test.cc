// Linear: x . weight^T + bias, stored or accumulated, for every number of rows a pass may have.
#include <gtest/gtest.h>

#include "backend_test.h"
#include "layer_sizes.h"

namespace tidal::test {
namespace {

struct LinearShape {
  std::string name;
  int64_t num_rows = 0;
  int64_t in_features = 0;
  int64_t out_features = 0;
};

class OpLinear : public OpTest<LinearShape> {
 protected:
  void SetUp() override {
    OpTest::SetUp();
    if (IsSkipped()) return;
    StepLimits limits = SmallLimits(dtype());
    SetProductSizes(shape().in_features, shape().out_features, limits.model);
    limits.max_batch_size = 32;
    Open(GetParam().on, limits);
    const auto [name, rows, in, out] = shape();
    // Outputs of size about 1, whatever the length of the sum.
    x_ = random_.Normal(rows * in, act());
    weight_ = random_.Normal(out * in, dtype(), 1.0 / std::sqrt(static_cast<double>(in)));
    bias_ = random_.Normal(out, dtype());
  }

  LinearArgs Args(int64_t num_rows, const Values& x, const Values& bias, TensorView out) {
    const auto [name, rows, in, features] = shape();
    LinearArgs args;
    args.x = Put(x, act(), {num_rows, in});
    args.weight = Put(weight_, dtype(), {features, in});
    if (!bias.empty()) args.bias = Put(bias, dtype(), {features});
    args.out = out;
    return args;
  }

  Values Want(const Values& bias) const {
    return reference::Linear(x_, weight_, bias, shape().in_features);
  }

  Shape out_shape() const { return {shape().num_rows, shape().out_features}; }

  Random random_{1};
  Values x_, weight_, bias_;
};

TEST_P(OpLinear, MatchesReference) {
  const TensorView out = Output(act(), out_shape());
  backend().Linear(Args(shape().num_rows, x_, {}, out));
  EXPECT_TRUE(Close(Get(out), Want({}), ToleranceFor(Op::kLinear, act())));
}

TEST_P(OpLinear, AddsBias) {
  const TensorView out = Output(act(), out_shape());
  backend().Linear(Args(shape().num_rows, x_, bias_, out));
  EXPECT_TRUE(Close(Get(out), Want(bias_), ToleranceFor(Op::kLinear, act())));
}

TEST_P(OpLinear, StoresFloat32Unrounded) {
  const TensorView out = Output(DType::kFloat32, out_shape());
  backend().Linear(Args(shape().num_rows, x_, bias_, out));
  EXPECT_TRUE(Close(Get(out), Want(bias_), ToleranceFor(Op::kLinear, DType::kFloat32)));
}

TEST_P(OpLinear, AccumulatesIntoTheResidualStream) {
  for (const Values& bias : {Values{}, bias_}) {
    const Values residual =
        random_.Normal(shape().num_rows * shape().out_features, DType::kFloat32);
    const TensorView out = Put(residual, DType::kFloat32, out_shape());
    LinearArgs args = Args(shape().num_rows, x_, bias, out);
    args.output = LinearOutput::kAccumulate;
    backend().Linear(args);
    Values want = Want(bias);
    for (size_t i = 0; i < want.size(); ++i) want[i] += residual[i];
    EXPECT_TRUE(Close(Get(out), want, ToleranceFor(Op::kLinear, DType::kFloat32)));
  }
}

std::vector<LinearShape> EverywhereShapes() {
  std::vector<LinearShape> shapes;
  for (int64_t rows : {1, 2, 3, 8, 17, 64, 65, 200}) {
    shapes.push_back({"rows" + std::to_string(rows), rows, 328, 200});
  }
  // Few rows: weights streamed in tiles; several tiles a block, chunks and tiles that do not
  // divide.
  for (int64_t rows : {1, 2, 3, 5, 8}) {
    shapes.push_back({"stream_rows" + std::to_string(rows), rows, 1056, 5000});
  }
  shapes.push_back({"stream_short_rows", 3, 64, 20000});
  shapes.push_back({"stream_parts3", 8, 320, 20000});
  shapes.push_back({"stream_parts7", 3, 896, 20000});
  shapes.push_back({"stream_long_rows1", 1, 14336, 48});
  shapes.push_back({"stream_long_rows8", 8, 14336, 48});
  shapes.push_back({"stream_square", 1, 4096, 1040});
  return shapes;
}

INSTANTIATE_TEST_SUITE_P(Backends, OpLinear,
                         ::testing::ValuesIn(Cases<LinearShape>(AllBackends(), EverywhereShapes(),
                                                                {{"odd_rows1", 1, 131, 77},
                                                                 {"odd_rows5", 5, 131, 77},
                                                                 {"odd_rows70", 70, 131, 77},
                                                                 {"in1", 3, 1, 5},
                                                                 {"out1", 3, 50, 1}})),
                         CaseNameOf<OpCase<LinearShape>>);

// A decode batch: each sequence's result must not depend on its company.
class OpLinearBatch : public BackendTest {};

TEST_P(OpLinearBatch, RowEqualsRowAlone) {
  constexpr int64_t kIn = 320, kOut = 192, kRows = 64;
  StepLimits limits = SmallLimits(GetParam().dtype);
  limits.model.hidden_size = kIn;
  limits.max_batch_size = kRows;
  Open(GetParam(), limits);
  Random random(2);
  const Values x = random.Normal(kRows * kIn, act());
  const TensorView x_rows = Put(x, act(), {kRows, kIn});
  const TensorView weight =
      Put(random.Normal(kOut * kIn, on().dtype, 0.05), on().dtype, {kOut, kIn});
  const TensorView alone = Output(act(), {1, kOut});
  for (int64_t batch_size : {2, 3, 4, 5, 8, 13, 16, 33, 64}) {
    SCOPED_TRACE(batch_size);
    const TensorView together = Output(act(), {batch_size, kOut});
    backend().Linear(
        {.x = x_rows.Rows(0, batch_size), .weight = weight, .bias = {}, .out = together});
    for (int64_t row = 0; row < batch_size; ++row) {
      backend().Linear({.x = x_rows.Rows(row, 1), .weight = weight, .bias = {}, .out = alone});
      if (on().is_cpu()) {
        EXPECT_TRUE(SameBits(GetBytes(together.Rows(row, 1)), GetBytes(alone), DTypeBytes(act())));
      } else {
        EXPECT_TRUE(
            Close(Get(together.Rows(row, 1)), Get(alone), ToleranceFor(Op::kLinear, act())));
      }
    }
  }
}

TEST_P(OpLinearBatch, NanStaysInItsRow) {
  constexpr int64_t kIn = 64, kOut = 96, kRows = 4;
  Open(GetParam(), SmallLimits(GetParam().dtype));
  Random random(3);
  Values x = random.Normal(kRows * kIn, act());
  const Values weight = random.Normal(kOut * kIn, on().dtype, 0.1);
  x[2 * kIn + 5] = NAN;
  const TensorView out = Output(act(), {kRows, kOut});
  backend().Linear({.x = Put(x, act(), {kRows, kIn}),
                    .weight = Put(weight, on().dtype, {kOut, kIn}),
                    .bias = {},
                    .out = out});
  EXPECT_TRUE(
      Close(Get(out), reference::Linear(x, weight, {}, kIn), ToleranceFor(Op::kLinear, act())));
}

INSTANTIATE_TEST_SUITE_P(Backends, OpLinearBatch, ::testing::ValuesIn(AllBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
