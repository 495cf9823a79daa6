// The index of a text's n-grams against a search through all of it.
#include "engine/ngram_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <span>
#include <vector>

namespace tidal::test {
namespace {

using Tokens = std::vector<int32_t>;

std::optional<int64_t> Search(std::span<const int32_t> tokens) {
  for (size_t n = NgramIndex::kLongest; n >= NgramIndex::kShortest; --n) {
    if (tokens.size() < n) continue;
    const auto last = tokens.last(n);
    for (size_t end = tokens.size() - 1; end >= n; --end) {
      if (std::ranges::equal(tokens.subspan(end - n, n), last)) return static_cast<int64_t>(end);
    }
  }
  return std::nullopt;
}

TEST(NgramIndex, FindsWhatFollowedTheLastTokens) {
  NgramIndex index;
  EXPECT_EQ(index.Find(Tokens{}), std::nullopt);
  EXPECT_EQ(NgramIndex().Find(Tokens{5}), std::nullopt);
  EXPECT_EQ(NgramIndex().Find(Tokens{5, 6, 5}), std::nullopt) << "one token is no n-gram";
  EXPECT_EQ(NgramIndex().Find(Tokens{5, 6, 7, 5, 6}), 2);
  EXPECT_EQ(NgramIndex().Find(Tokens{5, 6, 7, 5, 6, 8, 5, 6}), 5) << "the last time counts";
  EXPECT_EQ(NgramIndex().Find(Tokens{1, 5, 6, 7, 2, 5, 6, 8, 1, 5, 6}), 3) << "the longest counts";
  EXPECT_EQ(NgramIndex().Find(Tokens{5, 5, 5}), 2) << "it may run into itself";
}

TEST(NgramIndex, FindsWhatASearchFindsAsTheTextGrows) {
  std::mt19937 random(1);
  for (const int32_t vocab_size : {1, 2, 3, 10, 50}) {
    for (int round = 0; round < 20; ++round) {
      NgramIndex index;
      Tokens tokens;
      while (tokens.size() < 300) {
        // Some at once, as a prompt or a round comes.
        for (uint32_t count = random() % (round % 2 == 0 ? 2 : 90) + 1; count > 0; --count) {
          tokens.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(vocab_size)));
        }
        ASSERT_EQ(index.Find(tokens), Search(tokens)) << tokens.size() << " of " << vocab_size;
      }
    }
  }
}

}  // namespace
}  // namespace tidal::test
