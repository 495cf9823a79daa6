// Linear on the CPU with every instruction set of this processor: right with each, and with weights
// in codes bit for bit what it is with the float32 numbers that the codes stand for.
#include <gtest/gtest.h>

#include <cmath>

#include "backend/cpu/cpu_backend.h"
#include "coded_weight.h"
#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

class OpLinearIsa : public ::testing::TestWithParam<CpuIsa> {
 protected:
  void SetUp() override {
    if (!HasIsa(GetParam())) GTEST_SKIP() << "this processor does not have it";
    backend_ = MakeCpuBackend({.device = {}, .num_threads = 2}, GetParam());
  }

  // x . weight^T + bias of so many tokens.
  std::vector<float> Product(const Weight& weight, DType bias_dtype, int64_t tokens) {
    Bytes bias = Encode(bias_, bias_dtype);
    const int64_t in = weight.num_inputs(), outputs = weight.num_outputs();
    std::vector<float> out(static_cast<size_t>(tokens * outputs), NAN);
    backend_->Linear({.x = TensorView(x_.data(), DType::kFloat32, {tokens, in}),
                      .weight = weight,
                      .bias = TensorView(bias.data(), bias_dtype, {outputs}),
                      .out = TensorView(out.data(), DType::kFloat32, {tokens, outputs})});
    return out;
  }

  void SetInputs(int64_t in, int64_t outputs, int64_t most_tokens) {
    const Values x = random_.Normal(most_tokens * in, DType::kFloat32);
    x_.assign(x.begin(), x.end());
    bias_ = random_.Normal(outputs, DType::kBFloat16);
  }

  Random random_{17};
  std::unique_ptr<Backend> backend_;
  std::vector<float> x_;
  Values bias_;
};

const std::vector<CodesCase> kKinds = {
    {"float8", WeightCodes::kFloat8, 0, DType::kFloat32},
    {"float8_group32", WeightCodes::kFloat8, 32, DType::kFloat16},
    {"float8_group128", WeightCodes::kFloat8, 128, DType::kBFloat16},
    {"int4", WeightCodes::kInt4, 128, DType::kBFloat16},
    {"int4_zeros", WeightCodes::kInt4, 64, DType::kFloat16, true},
    {"int4_group32_zeros", WeightCodes::kInt4, 32, DType::kFloat32, true},
    {"int4_row", WeightCodes::kInt4, 0, DType::kFloat32},
    {"mxfp4", WeightCodes::kMxfp4, 32, DType::kUInt8},
};

// Inputs and outputs, neither whole vectors nor whole tiles.
constexpr int64_t kSizes[][2] = {{2, 1}, {8, 5}, {40, 37}, {328, 13}, {578, 283}};

TEST_P(OpLinearIsa, CodesGiveTheBitsOfTheNumbersTheyStandFor) {
  for (const auto [in, outputs] : kSizes) {
    SetInputs(in, outputs, 70);
    for (CodesCase how : kKinds) {
      if (how.group_size > in) how.group_size = 0;
      CodedMatrix matrix =
          CodedMatrix::Make(random_, how, {outputs, in}, 1.0 / std::sqrt(static_cast<double>(in)));
      const int64_t groups = (in + matrix.group_size - 1) / matrix.group_size;
      std::vector<float> numbers(matrix.values.begin(), matrix.values.end());
      Bytes scales = matrix.ScaleBytes(how.scale_dtype);
      Weight coded(
          TensorView(matrix.codes.data(), DType::kUInt8, {outputs, in * CodeBits(how.codes) / 8}));
      coded.codes = how.codes;
      coded.group_size = matrix.group_size;
      coded.scales = TensorView(scales.data(), how.scale_dtype, {groups, outputs});
      if (how.has_zeros) {
        coded.zeros = TensorView(matrix.zeros.data(), DType::kUInt8, {groups, outputs});
      }
      ASSERT_TRUE(backend_->ReadsCodes(coded));
      for (int64_t tokens : {1, 2, 3, 4, 7, 15, 16, 64, 65, 70}) {
        SCOPED_TRACE(how.name + ", " + std::to_string(in) + " x " + std::to_string(outputs) + ", " +
                     std::to_string(tokens) + " tokens");
        const TensorView plain(numbers.data(), DType::kFloat32, {outputs, in});
        EXPECT_EQ(Product(coded, DType::kBFloat16, tokens),
                  Product(plain, DType::kFloat32, tokens));
      }
    }
  }
}

TEST_P(OpLinearIsa, NumbersOfEveryTypeMatchTheReference) {
  for (const auto [in, outputs] : kSizes) {
    SetInputs(in, outputs, 70);
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      const Values weight =
          random_.Normal(outputs * in, dtype, 1.0 / std::sqrt(static_cast<double>(in)));
      Bytes stored = Encode(weight, dtype);
      for (int64_t tokens : {1, 3, 6, 70}) {
        SCOPED_TRACE(std::string(DTypeName(dtype)) + ", " + std::to_string(in) + " x " +
                     std::to_string(outputs) + ", " + std::to_string(tokens) + " tokens");
        const std::vector<float> got =
            Product(TensorView(stored.data(), dtype, {outputs, in}), dtype, tokens);
        const Values x(x_.begin(), x_.begin() + tokens * in);
        EXPECT_TRUE(Close(Values(got.begin(), got.end()),
                          reference::Linear(x, weight, Rounded(bias_, dtype), in),
                          ToleranceFor(Op::kLinear, DType::kFloat32)));
      }
    }
  }
}

TEST_P(OpLinearIsa, GroupsThatCutVectorsAreRefused) {
  SetInputs(64, 4, 1);
  Bytes codes(4 * 64), scales(4 * 4 * 4);
  Weight weight(TensorView(codes.data(), DType::kUInt8, {4, 64}));
  weight.codes = WeightCodes::kFloat8;
  weight.group_size = 16;
  weight.scales = TensorView(scales.data(), DType::kFloat32, {4, 4});
  EXPECT_FALSE(backend_->ReadsCodes(weight));
  EXPECT_TRUE(Throws<UnsupportedError>([&] { Product(weight, DType::kFloat32, 1); },
                                       {"groups of 16 inputs", "a multiple of 32 or all inputs"}));
}

std::string IsaName(const ::testing::TestParamInfo<CpuIsa>& info) {
  return info.param == CpuIsa::kGeneric ? "generic"
         : info.param == CpuIsa::kAvx2  ? "avx2"
                                        : "avx512";
}

INSTANTIATE_TEST_SUITE_P(Cpu, OpLinearIsa,
                         ::testing::Values(CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx512),
                         IsaName);

}  // namespace
}  // namespace tidal::test
