// Sum and Product: exact as long as int64 holds the result, the largest int64 beyond.
#include "core/checked.h"

#include <gtest/gtest.h>

namespace tidal::test {
namespace {

constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
constexpr int64_t kTwoTo32 = int64_t{1} << 32;

TEST(Checked, SmallNumbersAreExact) {
  EXPECT_EQ(Sum({}), 0);
  EXPECT_EQ(Sum({1, 2, 3}), 6);
  EXPECT_EQ(Product({}), 1);
  EXPECT_EQ(Product({7, 6, 5}), 210);
  EXPECT_EQ(Product({kTwoTo32, kTwoTo32 / 4}), int64_t{1} << 62);
}

TEST(Checked, WhatIsBeyondIsTheLargest) {
  EXPECT_EQ(Sum({kMax, 0}), kMax);
  EXPECT_EQ(Sum({kMax, 1, 5}), kMax);
  EXPECT_EQ(Product({kTwoTo32, kTwoTo32}), kMax);            // wraps to 0
  EXPECT_EQ(Product({kTwoTo32, kTwoTo32, kTwoTo32}), kMax);  // wraps to 0 twice
  EXPECT_EQ(Product({kMax, 3}), kMax);
}

TEST(Checked, NothingTimesAnythingIsNothing) {
  EXPECT_EQ(Product({kMax, kMax, 0}), 0);
  EXPECT_EQ(Product({0, kMax, kMax}), 0);
}

}  // namespace
}  // namespace tidal::test
