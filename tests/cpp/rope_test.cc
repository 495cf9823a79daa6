// Rotary frequencies of every type, against the papers' formulas written down once more.
#include "model/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

namespace tidal::test {
namespace {

constexpr double kTwoPi = 6.283185307179586;

RopeConfig Config(RopeType type, double theta, double factor, int64_t original = 0) {
  RopeConfig rope;
  rope.type = type;
  rope.theta = theta;
  rope.factor = factor;
  rope.original_max_position_embeddings = original;
  return rope;
}

ModelConfig Model(int64_t head_dim, RopeConfig rope) {
  ModelConfig model;
  model.head_dim = head_dim;
  model.max_position_embeddings = 4096;
  model.rope = std::move(rope);
  return model;
}

// Radians per token of pair i.
double PlainFrequency(double theta, int64_t i, int64_t head_dim) {
  return std::exp(-std::log(theta) * 2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
}

template <typename FrequencyOf>
void ExpectFrequencies(const RopeFrequencies& got, int64_t head_dim, const FrequencyOf& want) {
  ASSERT_EQ(static_cast<int64_t>(got.inv_freq.size()), head_dim / 2);
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    const double expected = want(i);
    EXPECT_NEAR(got.inv_freq[static_cast<size_t>(i)], expected, 1e-6 * expected) << "pair " << i;
  }
}

class Rope : public ::testing::TestWithParam<int64_t> {  // head_dim
 protected:
  int64_t dim() const { return GetParam(); }
};

TEST_P(Rope, DefaultIsAGeometricSeries) {
  for (double theta : {1e4, 5e5, 1e6}) {
    const auto rope = ComputeRope(Model(dim(), Config(RopeType::kDefault, theta, 1.0)), 100);
    ExpectFrequencies(rope, dim(), [&](int64_t i) { return PlainFrequency(theta, i, dim()); });
    EXPECT_EQ(rope.inv_freq[0], 1.0f);
    EXPECT_EQ(rope.attention_scaling, 1.0f);
  }
}

TEST_P(Rope, DimsThatDoNotTurnHaveFrequency0) {
  const int64_t rotary_dim = dim() / 4 * 2;
  RopeConfig config = Config(RopeType::kDefault, 1e4, 1.0);
  config.rotary_dim = rotary_dim;
  ExpectFrequencies(ComputeRope(Model(dim(), config), 100), dim(), [&](int64_t i) {
    return i < rotary_dim / 2 ? PlainFrequency(1e4, i, rotary_dim) : 0.0;
  });
}

// Position interpolation: position t turns as far as position t / factor did.
TEST_P(Rope, LinearDividesAllFrequencies) {
  const auto rope = ComputeRope(Model(dim(), Config(RopeType::kLinear, 1e4, 2.5)), 100000);
  ExpectFrequencies(rope, dim(), [&](int64_t i) { return PlainFrequency(1e4, i, dim()) / 2.5; });
  EXPECT_EQ(rope.attention_scaling, 1.0f);
}

// NTK-aware: theta grows so that the slowest pair is stretched by s = factor L / M - (factor - 1).
TEST_P(Rope, DynamicStretchesTheSlowestPairByTheLength) {
  const auto model = Model(dim(), Config(RopeType::kDynamic, 1e4, 2.0));
  for (int64_t seq_len : {1, 4095, 4096}) {
    ExpectFrequencies(ComputeRope(model, seq_len), dim(),
                      [&](int64_t i) { return PlainFrequency(1e4, i, dim()); });
  }
  for (int64_t seq_len : {5000, 8192, 40000}) {
    const double stretch = 2.0 * static_cast<double>(seq_len) / 4096.0 - 1.0;
    const int64_t last = dim() / 2 - 1;
    ExpectFrequencies(ComputeRope(model, seq_len), dim(), [&](int64_t i) {
      // theta' = theta s^(D / (D - 2)): pair i slows down by s^(i / last), the last one by s.
      const double share = static_cast<double>(i) / static_cast<double>(last);
      return PlainFrequency(1e4, i, dim()) * std::pow(stretch, -share);
    });
  }
}

// Llama 3.1: pairs that turn more than high_freq_factor times in the original window stay, those
// that turn less than low_freq_factor times are slowed by factor, a linear blend between.
TEST_P(Rope, Llama3SlowsTheSlowPairsOnly) {
  RopeConfig config = Config(RopeType::kLlama3, 5e5, 8.0, 8192);
  config.low_freq_factor = 1.0;
  config.high_freq_factor = 4.0;
  const auto model = Model(dim(), config);
  int64_t kept = 0, slowed = 0, blended = 0;
  ExpectFrequencies(ComputeRope(model, 131072), dim(), [&](int64_t i) {
    const double plain = PlainFrequency(5e5, i, dim());
    const double turns = 8192.0 * plain / kTwoPi;
    const double keep = std::min(1.0, std::max(0.0, (turns - 1.0) / 3.0));
    ++(keep == 1.0 ? kept : keep == 0.0 ? slowed : blended);
    return plain * (keep + (1.0 - keep) / 8.0);
  });
  EXPECT_GT(kept, 0);
  EXPECT_GT(slowed, 0);
  EXPECT_GT(blended, 0) << "the test's sizes leave no pair between the bands";
}

// YaRN: by pair index, a ramp from "turns beta_fast times" to "turns beta_slow times".
TEST_P(Rope, YarnBlendsByPairIndex) {
  for (bool truncate : {true, false}) {
    SCOPED_TRACE(truncate);
    RopeConfig config = Config(RopeType::kYarn, 1e4, 16.0, 2048);
    config.beta_fast = 32.0;
    config.beta_slow = 1.0;
    config.truncate = truncate;
    const auto model = Model(dim(), config);
    // The pair index at which a frequency turns `turns` times in 2048 tokens.
    auto pair_of = [&](double turns) {
      return std::log(2048.0 / (kTwoPi * turns)) / std::log(1e4) * static_cast<double>(dim()) / 2.0;
    };
    double first = pair_of(32.0), last = pair_of(1.0);
    if (truncate) first = std::floor(first), last = std::ceil(last);
    first = std::max(first, 0.0);
    const auto rope = ComputeRope(model, 30000);
    ExpectFrequencies(rope, dim(), [&](int64_t i) {
      const double ramp =
          std::min(1.0, std::max(0.0, (static_cast<double>(i) - first) / (last - first)));
      const double plain = PlainFrequency(1e4, i, dim());
      return plain * (1.0 - ramp) + plain / 16.0 * ramp;
    });
    EXPECT_NEAR(rope.attention_scaling, 1.0 + 0.1 * std::log(16.0), 1e-6);
  }
}

TEST_P(Rope, LongropePicksItsFactorsByLength) {
  RopeConfig config = Config(RopeType::kLongrope, 1e4, 32.0, 4096);
  for (int64_t i = 0; i < dim() / 2; ++i) {
    config.short_factor.push_back(1.0 + 0.01 * static_cast<double>(i));
    config.long_factor.push_back(2.0 + 0.5 * static_cast<double>(i));
  }
  const auto model = Model(dim(), config);
  for (int64_t seq_len : {100, 4096, 4097, 100000}) {
    SCOPED_TRACE(seq_len);
    const auto& factors = seq_len > 4096 ? config.long_factor : config.short_factor;
    const auto rope = ComputeRope(model, seq_len);
    ExpectFrequencies(rope, dim(), [&](int64_t i) {
      return PlainFrequency(1e4, i, dim()) / factors[static_cast<size_t>(i)];
    });
    EXPECT_NEAR(rope.attention_scaling, std::sqrt(1.0 + std::log(32.0) / std::log(4096.0)), 1e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(HeadDims, Rope, ::testing::Values(64, 128), [](const auto& head_dim) {
  return "dim" + std::to_string(head_dim.param);
});

TEST(RopeScaling, AGivenAttentionFactorWins) {
  RopeConfig yarn = Config(RopeType::kYarn, 1e4, 4.0, 2048);
  yarn.attention_factor = 1.5;
  EXPECT_EQ(ComputeRope(Model(64, yarn), 100).attention_scaling, 1.5f);
  RopeConfig longrope = Config(RopeType::kLongrope, 1e4, 4.0, 2048);
  longrope.short_factor = longrope.long_factor = std::vector<double>(32, 1.0);
  longrope.attention_factor = 0.75;
  EXPECT_EQ(ComputeRope(Model(64, longrope), 100).attention_scaling, 0.75f);
}

TEST(RopeScaling, YarnMscalesDivide) {
  RopeConfig yarn = Config(RopeType::kYarn, 1e4, 40.0, 4096);
  yarn.mscale = 1.0;
  yarn.mscale_all_dim = 0.5;
  const double log_factor = std::log(40.0);
  EXPECT_NEAR(ComputeRope(Model(64, yarn), 100).attention_scaling,
              (1.0 + 0.1 * log_factor) / (1.0 + 0.05 * log_factor), 1e-6);
}

TEST(RopeScaling, NoStretchingNoScaling) {
  RopeConfig yarn = Config(RopeType::kYarn, 1e4, 1.0, 4096);
  EXPECT_EQ(ComputeRope(Model(64, yarn), 100).attention_scaling, 1.0f);
}

}  // namespace
}  // namespace tidal::test
