// DecodePlan: how it prints, and which plans are refused.
#include "tidal/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

TEST(DecodePlan, DenseIsAllFull) {
  const DecodePlan plan = DecodePlan::Dense(5);
  EXPECT_EQ(plan.ToString(), "FFFFF");
  EXPECT_TRUE(plan.is_dense());
  EXPECT_EQ(plan.num_layers(), 5);
  EXPECT_TRUE(plan.choosing_layers().empty());
}

struct PlanCase {
  std::string name;
  int64_t num_layers;
  int64_t full_layers;
  std::vector<int64_t> select_layers;
  std::string printed;
  std::vector<int64_t> scored_layers = {};
};

class TidalPlan : public ::testing::TestWithParam<PlanCase> {};

TEST_P(TidalPlan, PrintsOneLetterPerLayer) {
  const auto& [name, num_layers, full_layers, select_layers, printed, scored_layers] = GetParam();
  const DecodePlan plan = DecodePlan::Tidal(num_layers, full_layers, select_layers, scored_layers);
  EXPECT_EQ(plan.ToString(), printed);
  EXPECT_FALSE(plan.is_dense());
  std::vector<int64_t> choosing = select_layers;
  choosing.insert(choosing.end(), scored_layers.begin(), scored_layers.end());
  std::sort(choosing.begin(), choosing.end());
  EXPECT_EQ(plan.choosing_layers(), choosing);
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    const char letter = printed[static_cast<size_t>(layer)];
    const LayerKind want = letter == 'F'   ? LayerKind::kFull
                           : letter == 'S' ? LayerKind::kSelect
                           : letter == 'P' ? LayerKind::kScored
                                           : LayerKind::kSparse;
    EXPECT_EQ(plan.kind(layer), want) << layer;
  }
}

INSTANTIATE_TEST_SUITE_P(Plans, TidalPlan,
                         ::testing::Values(PlanCase{"paper", 12, 2, {2, 5}, "FFSssSssssss"},
                                           PlanCase{"late_first", 6, 1, {3}, "FFFSss"},
                                           PlanCase{"one_full", 4, 1, {1, 3}, "FSsS"},
                                           PlanCase{"adjacent", 5, 2, {2, 3}, "FFSSs"},
                                           PlanCase{"last_only", 3, 2, {2}, "FFS"},
                                           PlanCase{"scored", 6, 2, {}, "FFPsPs", {2, 4}},
                                           PlanCase{"all_scored", 4, 1, {}, "FPPP", {1, 2, 3}},
                                           PlanCase{"late_scored", 5, 1, {}, "FFFPs", {3}},
                                           PlanCase{"both", 7, 2, {3}, "FFPSsPs", {2, 5}},
                                           PlanCase{"select_first", 5, 1, {1}, "FSsPs", {3}}),
                         [](const auto& plan) { return plan.param.name; });

// Layers with a window are themselves, and the others are counted without them.
TEST(DecodePlan, LayersWithAWindowStayWhatTheyAre) {
  PlanLayers layers(9);
  layers.windows = {0, 2, 5, 8};
  EXPECT_EQ(DecodePlan::Dense(layers).ToString(), "wFwFFwFFw");
  EXPECT_EQ(DecodePlan::Tidal(layers, 1, {3}).ToString(), "wFwSswssw");
  EXPECT_EQ(DecodePlan::Tidal(layers, 1, {}, {4, 6}).ToString(), "wFwFPwPsw");
  EXPECT_EQ(DecodePlan::Tidal(layers, 2, {4}).ToString(), "wFwFSwssw");
  EXPECT_EQ(DecodePlan::Tidal(layers, 1, {1}).ToString(), "wSwsswssw");
  EXPECT_TRUE(Throws<InvalidArgument>([&] { DecodePlan::Tidal(layers, 1, {5}); },
                                      {"select_layers", "got layer 5", "window"}));
}

struct BadPlan {
  std::string name;
  int64_t num_layers;
  int64_t full_layers;
  std::vector<int64_t> select_layers;
  std::string field;
  std::string got;
  std::vector<int64_t> scored_layers = {};
};

class RefusedPlan : public ::testing::TestWithParam<BadPlan> {};

TEST_P(RefusedPlan, NamesTheFieldAndTheValue) {
  const auto& bad = GetParam();
  EXPECT_TRUE(Throws<InvalidArgument>(
      [&] {
        DecodePlan::Tidal(bad.num_layers, bad.full_layers, bad.select_layers, bad.scored_layers);
      },
      {bad.field, bad.got, "expected"}));
}

INSTANTIATE_TEST_SUITE_P(
    Plans, RefusedPlan,
    ::testing::Values(BadPlan{"no_select_layer", 8, 2, {}, "select_layers", "got none"},
                      BadPlan{"no_full_layer", 8, 0, {2}, "full_layers", "got 0"},
                      BadPlan{"negative_full_layers", 8, -1, {2}, "full_layers", "got -1"},
                      BadPlan{"all_layers_full", 8, 8, {2}, "full_layers", "got 8"},
                      BadPlan{"one_layer", 1, 1, {0}, "full_layers", "got 1"},
                      BadPlan{"before_full_layers", 8, 2, {1}, "select_layers", "got layer 1"},
                      BadPlan{"negative", 8, 2, {-1}, "select_layers", "got layer -1"},
                      BadPlan{"past_the_end", 8, 2, {8}, "select_layers", "got layer 8"},
                      BadPlan{"twice", 8, 2, {3, 3}, "select_layers", "got layer 3"},
                      BadPlan{"descending", 8, 2, {5, 3}, "select_layers", "got layer 3"},
                      BadPlan{"scored_end", 8, 2, {}, "scored_layers", "got layer 8", {8}},
                      BadPlan{"scored_full", 8, 2, {3}, "scored_layers", "got layer 1", {1}},
                      BadPlan{"scored_twice", 8, 2, {}, "scored_layers", "got layer 4", {4, 4}},
                      BadPlan{"in_both", 8, 2, {3}, "scored_layers", "got layer 3", {3}}),
    [](const auto& plan) { return plan.param.name; });

TEST(DecodePlan, NeedsALayer) {
  EXPECT_TRUE(Throws<InvalidArgument>([] { DecodePlan::Dense(0); }, {"got 0", "expected"}));
}

}  // namespace
}  // namespace tidal::test
