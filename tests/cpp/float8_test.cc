// Rows of fp8: their codes, and how every instruction set reads them.
#include "core/float8.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/kernels/kernels.h"

namespace tidal::test {
namespace {

class Float8Isa : public ::testing::TestWithParam<CpuIsa> {
 protected:
  void SetUp() override {
    if (!HasIsa(GetParam())) GTEST_SKIP() << "this processor has no such instructions";
  }
};

TEST_P(Float8Isa, ReadsEveryCode) {
  std::vector<uint8_t> codes(256);
  std::iota(codes.begin(), codes.end(), uint8_t{0});
  for (int64_t count : {256, 255, 137, 19, 3}) {
    for (int64_t first : {int64_t{0}, 256 - count}) {
      std::vector<float> got(static_cast<size_t>(count) + 1, -1.0f);
      SelectKernels(GetParam())
          .widen[StorageIndex(DType::kFloat8)](&codes[first], count, got.data());
      for (int64_t i = 0; i < count; ++i) {
        const float want = Float8ToFloat(codes[first + i]);
        if (std::isnan(want)) {
          EXPECT_TRUE(std::isnan(got[i])) << first + i;
        } else {
          EXPECT_EQ(got[i], want) << first + i;
        }
      }
      EXPECT_EQ(got.back(), -1.0f);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, Float8Isa,
                         ::testing::Values(CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx512));

TEST(Float8Row, IsDividedByItsScaleAndSaturates) {
  const float x[] = {1.0f, -0.5f, 300.0f, -1e30f, 0.0f, 0.0625f};
  Float8 codes[6];
  EncodeFloat8Row(x, 6, 0.5f, codes);
  const float want[] = {2.0f, -1.0f, 448.0f, -448.0f, 0.0f, 0.125f};
  for (int i = 0; i < 6; ++i) EXPECT_EQ(ToFloat(codes[i]), want[i]) << i;
}

TEST(Float8Row, BecomesNanWithOneNumberThatIsNotFinite) {
  for (float odd : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    const float x[] = {1.0f, odd, 3.0f};
    Float8 codes[3];
    EncodeFloat8Row(x, 3, 1.0f, codes);
    for (Float8 code : codes) EXPECT_TRUE(std::isnan(ToFloat(code)));
  }
}

}  // namespace
}  // namespace tidal::test
