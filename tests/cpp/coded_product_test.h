// What the tests of products with a weight in codes share.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>

#include "coded_weight.h"
#include "layer_sizes.h"

namespace tidal::test {

// OpShape says how the weight is kept and its sizes: how, in_features, out_features.
template <typename OpShape>
class CodedProductTest : public OpTest<OpShape> {
 protected:
  explicit CodedProductTest(uint64_t seed) : random_(seed) {}

  StepLimits Limits() const {
    StepLimits limits = this->SmallLimits(this->dtype());
    SetProductSizes(this->shape().in_features, this->shape().out_features, limits.model);
    limits.max_batch_size = 64;
    limits.decoded_bytes = 2 * this->shape().in_features * this->shape().out_features;
    return limits;
  }

  void MakeMatrix() {
    const int64_t in = this->shape().in_features, out = this->shape().out_features;
    const double size = 1.0 / std::sqrt(static_cast<double>(in));
    matrix_ = CodedMatrix::Make(random_, this->shape().how, {out, in}, size);
  }

  Weight PutMatrix() {
    const CodesCase& how = this->shape().how;
    const int64_t in = this->shape().in_features, out = this->shape().out_features;
    const int64_t groups = (in + matrix_.group_size - 1) / matrix_.group_size;
    Weight weight(
        this->PutBytes(matrix_.codes, DType::kUInt8, {out, in * CodeBits(how.codes) / 8}));
    weight.codes = how.codes;
    weight.group_size = matrix_.group_size;
    weight.scales =
        this->PutBytes(matrix_.ScaleBytes(how.scale_dtype), how.scale_dtype, {groups, out});
    if (how.has_zeros) weight.zeros = this->PutBytes(matrix_.zeros, DType::kUInt8, {groups, out});
    return weight;
  }

  static Values FirstRows(const Values& values, int64_t rows, int64_t columns) {
    return Values(values.begin(), values.begin() + rows * columns);
  }
  Values FirstInputs(int64_t tokens, const Values& x) const {
    return FirstRows(x, tokens, this->shape().in_features);
  }

  LinearArgs Args(int64_t tokens, TensorView out) {
    LinearArgs args;
    args.x = this->Put(FirstInputs(tokens, x_), this->act(), {tokens, this->shape().in_features});
    args.weight = weight_;
    args.out = out;
    args.quantizes_inputs = quantizes_inputs_;
    return args;
  }

  void ExpectNormAndGateMulAreTheSame(const Ints& counts) {
    const int64_t in = this->shape().in_features, size = this->shape().out_features / 2;
    Backend& backend = this->backend();
    const DType act = this->act();
    for (int64_t tokens : counts) {
      SCOPED_TRACE(tokens);
      RmsNormArgs norm = {
          .x = this->Put(random_.Normal(tokens * in, DType::kFloat32), DType::kFloat32,
                         {tokens, in}),
          .weight = this->Put(random_.Normal(in, this->dtype(), 0.1, 0.3), this->dtype(), {in}),
          .out = this->Output(act, {tokens, in}),
          .eps = 1e-5f};
      LinearArgs linear = Args(tokens, this->Output(act, {tokens, 2 * size}));
      linear.x = norm.out;
      GateMulArgs gate_mul = {.gate_up = linear.out, .out = this->Output(act, {tokens, size})};
      backend.GateUpMul({norm, linear, gate_mul});
      const Values fused = this->Get(gate_mul.out);
      gate_mul.out = this->Output(act, {tokens, size});
      backend.RmsNorm(norm);
      backend.Linear(linear);
      backend.GateMul(gate_mul);
      EXPECT_TRUE(Close(fused, this->Get(gate_mul.out), ToleranceFor(Op::kFused, act)));
    }
  }

  Random random_;
  CodedMatrix matrix_;
  Weight weight_;
  Values x_, bias_;
  bool quantizes_inputs_ = false;
};

}  // namespace tidal::test
