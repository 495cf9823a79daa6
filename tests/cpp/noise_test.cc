// Noise: repeatable normal values, and what lies where.
#include "core/noise.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "backend_test.h"
#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

constexpr int64_t kCount = 1009;

Bytes ReadAll(const Noise& noise, int64_t offset, int64_t bytes) {
  Bytes all(static_cast<size_t>(bytes));
  noise.Read(offset, bytes, all.data());
  return all;
}

TEST(Noise, HasTheMeanAndDeviationAsked) {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    SCOPED_TRACE(DTypeName(dtype));
    const int64_t count = 100003;
    const Noise noise(dtype, Normal{1.0, 0.02}, 3, count);
    double sum = 0.0, squares = 0.0;
    for (double value : Decode(ReadAll(noise, 0, count * DTypeBytes(dtype)), dtype)) {
      sum += value;
      squares += (value - 1.0) * (value - 1.0);
    }
    EXPECT_NEAR(sum / count, 1.0, 1e-3);
    EXPECT_NEAR(std::sqrt(squares / count), 0.02, 1e-3);
  }
}

TEST(Noise, TheSeedDecides) {
  auto bytes = [](uint64_t seed) {
    return ReadAll(Noise(DType::kBFloat16, Normal{}, seed, kCount), 0, 2 * kCount);
  };
  EXPECT_EQ(bytes(1), bytes(1));
  EXPECT_NE(bytes(1), bytes(2));
}

TEST(Noise, RepeatsItsBlockWithoutEnd) {
  const Noise noise(DType::kFloat32, Normal{}, 1, kCount);
  const Bytes block = ReadAll(noise, 0, 4 * kCount);
  Bytes three = block;
  for (int i = 0; i < 2; ++i) three.insert(three.end(), block.begin(), block.end());
  EXPECT_EQ(ReadAll(noise, 0, 12 * kCount), three);
  EXPECT_EQ(ReadAll(noise, 4000, 60), Bytes(three.begin() + 4000, three.begin() + 4060));
  EXPECT_EQ(ReadAll(noise, 4 * kCount * 1000 + 8, 60),
            Bytes(three.begin() + 8, three.begin() + 68));
  EXPECT_EQ(noise.From(4 * kCount + 4).size(), static_cast<size_t>(4 * kCount - 4));
}

TEST(Noise, OnlyFloatTypes) {
  EXPECT_TRUE(Throws<InvalidArgument>([] { Noise(DType::kInt32, Normal{}, 1, kCount); },
                                      {"int32", "bfloat16"}));
}

}  // namespace
}  // namespace tidal::test
