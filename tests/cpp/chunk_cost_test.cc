// The cost model of prompt chunks against machines of known speed.
#include "engine/chunk_cost.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "common/launch_config.h"

namespace tidal::test {
namespace {

struct Machine {
  double base_ms, per_token_ms, per_pair_ms;

  double Time(const ChunkWork& work) const {
    return base_ms + per_token_ms * static_cast<double>(work.num_tokens) +
           per_pair_ms * work.num_pairs;
  }
};

constexpr Machine kH200{3.4, 20e-3, 0.87e-6};
constexpr Machine kCpu{40.0, 12.0, 1e-4};
constexpr Machine kSmallModel{0.05, 2e-3, 1e-8};

ChunkWork WorkOf(int64_t count, int64_t begin) {
  ChunkWork work;
  work.Add(count, begin);
  return work;
}

// The largest relative error of a prediction over chunks of all places and lengths.
double WorstError(const ChunkCost& cost, const Machine& machine, int64_t longest) {
  double worst = 0.0;
  for (int64_t begin : {int64_t{0}, longest / 8, longest / 2, longest}) {
    for (int64_t count : {64, 512, 2048, 4096}) {
      const ChunkWork work = WorkOf(count, begin);
      worst = std::max(worst, std::abs(cost.Predict(work) / machine.Time(work) - 1.0));
    }
  }
  return worst;
}

// Reads prompts as a scheduler would: chunks of what fits into `limit_ms`.
void ReadPrompts(ChunkCost& cost, const Machine& machine, int count, std::mt19937& random) {
  std::uniform_real_distribution<double> noise(0.9, 1.1);
  for (int prompt = 0; prompt < count; ++prompt) {
    const int64_t length = prompt % 2 == 0 ? 65536 : 1 + static_cast<int64_t>(random() % 4096);
    for (int64_t begin = 0; begin < length;) {
      const int64_t tokens = std::clamp<int64_t>(cost.TokensWithin(60.0, {}, begin), 64, 4096);
      const ChunkWork work = WorkOf(std::min(tokens, length - begin), begin);
      cost.Observe(work, machine.Time(work) * noise(random));
      begin += work.num_tokens;
    }
  }
}

TEST(ChunkCost, LearnsAnyMachine) {
  for (const Machine& machine : {kH200, kCpu, kSmallModel}) {
    std::mt19937 random(1);
    ChunkCost cost;
    ReadPrompts(cost, machine, 4, random);
    EXPECT_LT(WorstError(cost, machine, 65536), 0.25) << machine.per_token_ms;
  }
}

TEST(ChunkCost, OneMeasurementIsEnoughForTheLikeOfIt) {
  for (const Machine& machine : {kH200, kCpu, kSmallModel}) {
    ChunkCost cost;
    const ChunkWork work = WorkOf(256, 0);
    cost.Observe(work, machine.Time(work));
    EXPECT_NEAR(cost.Predict(work) / machine.Time(work), 1.0, 1e-9);
  }
}

TEST(ChunkCost, TokensWithinIsTheMostThatFits) {
  std::mt19937 random(2);
  ChunkCost cost;
  ReadPrompts(cost, kH200, 2, random);
  for (int64_t begin : {0, 1000, 32768, 131072}) {
    for (double ms : {10.0, 25.0, 60.0}) {
      const ChunkWork first = WorkOf(100, 50);
      const int64_t count = cost.TokensWithin(ms, first, begin);
      ChunkWork work = first;
      work.Add(count, begin);
      EXPECT_LE(cost.Predict(work), ms * (1 + 1e-9));
      work = first;
      work.Add(count + 1, begin);
      EXPECT_GT(cost.Predict(work), ms);
    }
  }
  EXPECT_EQ(cost.TokensWithin(0.0, {}, 0), 0);
  EXPECT_EQ(cost.TokensWithin(1.0, WorkOf(4096, 131072), 0), 0);
}

TEST(ChunkCost, FirstChunksAreShortAndDouble) {
  ChunkCost cost;
  const double forever = std::numeric_limits<double>::infinity();
  EXPECT_EQ(cost.TokensWithin(forever, {}, 0), 256);
  const ChunkWork work = WorkOf(256, 0);
  cost.Observe(work, kH200.Time(work));
  EXPECT_EQ(cost.TokensWithin(forever, {}, 0), 512);
  EXPECT_EQ(cost.TokensWithin(forever, WorkOf(500, 0), 0), 12);
}

// A chunk that was planned for 60 ms takes about 60 ms, on a slow machine too, from the fifth on.
TEST(ChunkCost, ChunksTakeTheTimeTheyWereGiven) {
  std::mt19937 random(3);
  for (const Machine& machine : {kH200, Machine{2.0, 0.2, 1e-5}}) {
    ChunkCost cost;
    int64_t begin = 0;
    for (int chunk = 0; begin < 131072; ++chunk) {
      const ChunkWork work =
          WorkOf(std::max<int64_t>(cost.TokensWithin(60.0, {}, begin), 1), begin);
      const double ms = machine.Time(work);
      if (chunk >= 5) {
        EXPECT_LT(ms, 60.0 * 1.2) << "chunk " << chunk << " at " << begin;
        EXPECT_GT(ms, 60.0 * 0.7) << "chunk " << chunk << " at " << begin;
      }
      cost.Observe(work, ms);
      begin += work.num_tokens;
    }
  }
}

// An H200 with Llama-3.1-8B's shape reads a chunk's attention in waves of blocks, of 132 each, and
// the cost that is learnt is linear: what it plans for 60 ms takes about 60 all the same.
TEST(ChunkCost, WavesOfBlocksTakeTheTimeThatWasPlanned) {
  constexpr int kSms = 132, kLayers = 32, kKvHeads = 8, kTileQueries = 32, kPage = 64;
  constexpr double kTokenTileMs = 1.7e-3;
  auto waves = [](int64_t num_blocks) { return (num_blocks + kSms - 1) / kSms; };
  auto time = [&](int64_t count, int64_t begin) {
    const int64_t num_tiles = (count + kTileQueries - 1) / kTileQueries * kKvHeads;
    const int64_t num_token_tiles = (begin + count + kPromptTokens - 1) / kPromptTokens;
    const PromptSplits splits =
        ChoosePromptSplits(Splitting::kByBatch, num_tiles, num_token_tiles, kSms);
    const int64_t split_blocks = (num_tiles - splits.num_whole) * splits.num_splits;
    const int64_t tiles = waves(splits.num_whole) * (num_token_tiles + kPromptBlockTiles) +
                          waves(split_blocks) * (splits.span + kPromptBlockTiles);
    return 1.0 + std::max(3.5, 21.7e-3 * static_cast<double>(count)) +
           kLayers * kTokenTileMs * static_cast<double>(tiles);
  };
  ChunkCost cost;
  double total_ms = 0.0;
  int chunk = 0;
  for (int64_t begin = 0, count = 0; begin < 131072; begin += count, ++chunk) {
    const int64_t within = cost.TokensWithin(60.0, {}, begin);
    count = std::max<int64_t>((begin + within) / kPage * kPage - begin, kPage);
    const double ms = time(count, begin);
    if (chunk >= 5) {
      EXPECT_LT(ms, 60.0 * 1.1) << count << " tokens at " << begin;
    }
    cost.Observe(WorkOf(count, begin), ms);
    total_ms += ms;
  }
  EXPECT_GT(total_ms / chunk, 60.0 * 0.9);
}

TEST(ChunkCost, FollowsAMachineThatChangesItsSpeed) {
  std::mt19937 random(4);
  ChunkCost cost;
  ReadPrompts(cost, kH200, 4, random);
  const Machine slower{10.0, 60e-3, 2.6e-6};
  ReadPrompts(cost, slower, 8, random);
  EXPECT_LT(WorstError(cost, slower, 65536), 0.25);
}

TEST(ChunkCost, OneHiccupChangesLittle) {
  std::mt19937 random(5);
  ChunkCost cost;
  ReadPrompts(cost, kH200, 4, random);
  const ChunkWork work = WorkOf(1024, 8192);
  const double before = cost.Predict(work);
  ChunkCost slow = cost, fast = cost;
  slow.Observe(work, 100 * before);
  EXPECT_LT(slow.Predict(work), 2 * before);
  fast.Observe(work, before / 100);
  EXPECT_GT(fast.Predict(work), before / 4);
}

TEST(ChunkCost, NoTimeIsNoMeasurement) {
  ChunkCost cost;
  const ChunkWork work = WorkOf(256, 0);
  const double before = cost.Predict(work);
  for (double ms : {0.0, -1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    cost.Observe(work, ms);
  }
  cost.Observe({}, 1.0);
  EXPECT_EQ(cost.Predict(work), before);
  EXPECT_EQ(cost.TokensWithin(1e9, {}, 0), 256);
}

}  // namespace
}  // namespace tidal::test
