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

// Looks at all of a text each time.
class Search {
 public:
  std::optional<int64_t> Find(std::span<const int32_t> tokens) {
    const size_t num_new = tokens.size() - length_;
    length_ = tokens.size();
    if (place_ > 0 && std::ranges::equal(tokens.last(num_new), tokens.subspan(place_, num_new))) {
      place_ += num_new;
      num_same_ += num_new;
      if (num_same_ >= NgramIndex::kLongest) return place_;
    }
    place_ = 0;
    for (size_t n = NgramIndex::kLongest; n >= NgramIndex::kShortest; --n) {
      if (tokens.size() < n) continue;
      const auto last = tokens.last(n);
      for (size_t end = tokens.size() - 1; end >= n; --end) {
        if (!std::ranges::equal(tokens.subspan(end - n, n), last)) continue;
        place_ = end;
        num_same_ = n;
        return place_;
      }
    }
    return std::nullopt;
  }

 private:
  size_t length_ = 0, place_ = 0, num_same_ = 0;
};

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

TEST(NgramIndex, KeepsToAPlaceAsLongAsTheTextDoes) {
  // 1 2 3 4 are followed by 5 and, the last time, by 6.
  Tokens tokens = {8, 9, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 6, 0, 8, 9};
  NgramIndex index;
  EXPECT_EQ(index.Find(tokens), 2);
  tokens.insert(tokens.end(), {1, 2, 3, 4});
  EXPECT_EQ(index.Find(tokens), 6) << "8 9 1 2 3 4 occurred only there";
  EXPECT_EQ(NgramIndex().Find(tokens), 12);
  tokens.push_back(6);
  EXPECT_EQ(index.Find(tokens), 13) << "the text has left it";
}

TEST(NgramIndex, FindsWhatASearchFindsAsTheTextGrows) {
  std::mt19937 random(1);
  for (const int32_t vocab_size : {1, 2, 3, 10, 50}) {
    for (int round = 0; round < 20; ++round) {
      NgramIndex index;
      Search search;
      Tokens tokens;
      while (tokens.size() < 300) {
        // Some at once, as a prompt or a round comes.
        for (uint32_t count = random() % (round % 2 == 0 ? 2 : 90) + 1; count > 0; --count) {
          tokens.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(vocab_size)));
        }
        ASSERT_EQ(index.Find(tokens), search.Find(tokens)) << tokens.size() << " of " << vocab_size;
      }
    }
  }
}

}  // namespace
}  // namespace tidal::test
