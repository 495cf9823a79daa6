// Philox4x32-10 and the Gumbel noise made of it.
#include "core/philox.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "reference.h"

namespace tidal::test {
namespace {

// The vectors of Random123's kat_vectors file: zeros, ones, digits of pi.
TEST(Philox, ReferenceEqualsThePublishedVectors) {
  EXPECT_EQ(reference::Philox(0, 0, 0, 0, 0), 0x6627e8d5u);
  EXPECT_EQ(reference::Philox(~uint64_t{0}, ~0u, ~0u, ~0u, ~0u), 0x408f276du);
  EXPECT_EQ(reference::Philox(0x299f31d0a4093822u, 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344),
            0xd16cfe09u);
}

TEST(Philox, EqualsThePublishedVectorOfZeros) {
  EXPECT_EQ(Philox(0, 0, 0), 0x6627e8d5u);
}

TEST(Philox, EqualsTheReferenceForAnyKeyAndCounter) {
  std::mt19937_64 engine(1);
  for (int i = 0; i < 10000; ++i) {
    const uint64_t seed = engine();
    const uint32_t c0 = static_cast<uint32_t>(engine()), c1 = static_cast<uint32_t>(engine());
    ASSERT_EQ(Philox(seed, c0, c1), reference::Philox(seed, c0, c1, 0, 0));
  }
}

TEST(Philox, EveryPartOfKeyAndCounterMatters) {
  const uint32_t base = Philox(1, 2, 3);
  EXPECT_NE(Philox(2, 2, 3), base);
  EXPECT_NE(Philox(1 + (uint64_t{1} << 32), 2, 3), base);
  EXPECT_NE(Philox(1, 3, 3), base);
  EXPECT_NE(Philox(1, 2, 4), base);
}

TEST(GumbelNoise, IsFiniteAndDistributedAsItSays) {
  constexpr int kDraws = 100000;
  double sum = 0.0, squares = 0.0;
  for (uint32_t i = 0; i < kDraws; ++i) {
    const double noise = GumbelNoise(7, i, 11);
    ASSERT_TRUE(std::isfinite(noise));
    sum += noise;
    squares += noise * noise;
  }
  // Mean: Euler's constant; variance: pi^2 / 6. Five standard errors either way.
  const double mean = sum / kDraws, variance = squares / kDraws - mean * mean;
  EXPECT_NEAR(mean, 0.5772, 5 * 1.283 / std::sqrt(kDraws));
  EXPECT_NEAR(variance, 1.6449, 0.06);
}

}  // namespace
}  // namespace tidal::test
