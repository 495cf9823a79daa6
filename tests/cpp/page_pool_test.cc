// PagePool and SequencePages: nobody's page is anybody else's, and every page comes back.
#include "kv/page_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <set>

#include "kv/sequence_pages.h"
#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

using Pages = std::vector<int32_t>;

TEST(PagePool, CountsPagesOfTokens) {
  const PagePool pool(10, 16);
  EXPECT_EQ(pool.PagesFor(0), 0);
  EXPECT_EQ(pool.PagesFor(1), 1);
  EXPECT_EQ(pool.PagesFor(16), 1);
  EXPECT_EQ(pool.PagesFor(17), 2);
  EXPECT_EQ(PagePool(10, 1).PagesFor(17), 17);
}

TEST(PagePool, TakesTheLowestFreePages) {
  PagePool pool(6, 16);
  EXPECT_EQ(pool.Take(3), (Pages{0, 1, 2}));
  EXPECT_EQ(pool.Take(2), (Pages{3, 4}));
  pool.Release(std::vector<int32_t>{1, 3});
  EXPECT_EQ(pool.Take(3), (Pages{1, 3, 5}));
  EXPECT_EQ(pool.num_free(), 0);
}

TEST(PagePool, TakingNoPagesIsFine) {
  PagePool pool(1, 16);
  EXPECT_TRUE(pool.Take(0).empty());
  EXPECT_EQ(pool.num_free(), 1);
}

TEST(PagePool, TooFewPagesIsACapacityErrorThatTakesNone) {
  PagePool pool(4, 16);
  pool.Take(1);
  EXPECT_TRUE(Throws<CapacityError>([&] { pool.Take(4); }, {"need 4", "have 3", "max_seq_len"}));
  EXPECT_EQ(pool.num_free(), 3);
  EXPECT_EQ(pool.Take(3), (Pages{1, 2, 3}));
}

TEST(PagePool, ReleasingAPageTwiceIsRefused) {
  PagePool pool(4, 16);
  pool.Take(2);
  pool.Release(std::vector<int32_t>{0});
  EXPECT_TRUE(Throws<InvalidArgument>([&] { pool.Release(std::vector<int32_t>{0}); }, {"page 0"}));
  EXPECT_THROW(pool.Release(std::vector<int32_t>{3}), InvalidArgument);
  EXPECT_THROW(pool.Release(std::vector<int32_t>{4}), InvalidArgument);
  EXPECT_THROW(pool.Release(std::vector<int32_t>{-1}), InvalidArgument);
}

TEST(PagePool, ASharedPageIsFreeWhenItsLastOwnerLeaves) {
  PagePool pool(4, 16);
  pool.Take(2);
  pool.Share({0});
  pool.Share({0, 1});
  EXPECT_TRUE(pool.IsShared(0));
  pool.Release(std::vector<int32_t>{0, 1});
  EXPECT_EQ(pool.num_free(), 2);
  EXPECT_TRUE(pool.IsShared(0));
  EXPECT_FALSE(pool.IsShared(1));
  pool.Release(std::vector<int32_t>{0, 1});
  EXPECT_EQ(pool.num_free(), 3);
  EXPECT_EQ(pool.Take(3), (Pages{1, 2, 3}));
  pool.Release(std::vector<int32_t>{0});
  EXPECT_THROW(pool.Release(std::vector<int32_t>{0}), InvalidArgument);
  EXPECT_TRUE(Throws<InvalidArgument>([&] { pool.Share({0}); }, {"page 0", "shared"}));
  EXPECT_THROW(pool.Share({4}), InvalidArgument);
}

TEST(PagePool, ImpossibleSizesAreRefused) {
  EXPECT_THROW(PagePool(-1, 16), InvalidArgument);
  EXPECT_THROW(PagePool(-1, 16), InvalidArgument);
  EXPECT_THROW(PagePool(4, 0), InvalidArgument);
}

// A thousand random takes and releases against a set of free pages.
TEST(PagePool, NeverGivesAPageTwice) {
  constexpr int64_t kPages = 50;
  PagePool pool(kPages, 8);
  std::mt19937 engine(1);
  std::vector<std::vector<int32_t>> taken;
  std::set<int32_t> in_use;
  for (int round = 0; round < 1000; ++round) {
    if (engine() % 2 == 0) {
      const int64_t count = std::min<int64_t>(engine() % 7, pool.num_free());
      taken.push_back(pool.Take(count));
      for (int32_t page : taken.back()) {
        ASSERT_TRUE(page >= 0 && page < kPages);
        ASSERT_TRUE(in_use.insert(page).second) << "page " << page << " was in use";
      }
    } else if (!taken.empty()) {
      std::swap(taken[engine() % taken.size()], taken.back());
      for (int32_t page : taken.back()) in_use.erase(page);
      pool.Release(taken.back());
      taken.pop_back();
    }
    ASSERT_EQ(pool.num_free(), kPages - static_cast<int64_t>(in_use.size()));
  }
}

TEST(SequencePages, GivesItsPagesBackOnDestruction) {
  PagePool pool(10, 4);
  {
    SequencePages pages(pool, 9);
    EXPECT_EQ(pages.pages().size(), 3u);
    SequencePages moved(std::move(pages));
    EXPECT_EQ(moved.pages().size(), 3u);
    EXPECT_EQ(pool.num_free(), 7);
  }
  EXPECT_EQ(pool.num_free(), 10);
}

TEST(SequencePages, ReleasingEarlyReleasesOnce) {
  PagePool pool(10, 4);
  {
    SequencePages pages(pool, 40);
    pages.Release();
    EXPECT_EQ(pool.num_free(), 10);
    pages.Release();
  }
  EXPECT_EQ(pool.num_free(), 10);
}

TEST(SequencePages, ThatDoNotFitLeaveThePoolAlone) {
  PagePool pool(10, 4);
  EXPECT_THROW(SequencePages(pool, 41), CapacityError);
  EXPECT_EQ(pool.num_free(), 10);
}

TEST(SequencePages, GrowAndShrink) {
  PagePool pool(10, 4);
  SequencePages pages(pool, 0);
  EXPECT_TRUE(pages.Own(9, 0, 0).empty());
  EXPECT_EQ(pages.pages(), (Pages{0, 1, 2}));
  EXPECT_TRUE(pages.Own(13, 9, 9).empty());
  EXPECT_EQ(pages.pages(), (Pages{0, 1, 2, 3}));
  EXPECT_TRUE(pages.Own(8, 3, 3).empty());
  EXPECT_EQ(pages.pages(), (Pages{0, 1}));
  pages.Shrink(100);
  EXPECT_EQ(pages.pages(), (Pages{0, 1}));
  pages.Shrink(1);
  EXPECT_EQ(pages.pages(), (Pages{0}));
  pages.Shrink(0);
  EXPECT_EQ(pool.num_free(), 10);
}

TEST(SequencePages, OwnReplacesSharedPagesFromTheFirstTokenOn) {
  PagePool pool(10, 4);
  SequencePages one(pool, 12);         // 0, 1, 2
  SequencePages two = one.Share(10);   // the same
  SequencePages three = two.Share(8);  // 0, 1
  EXPECT_EQ(pool.num_free(), 7);
  EXPECT_EQ(three.pages(), (Pages{0, 1}));
  EXPECT_EQ(two.NumMissing(17, 10, 10), 3);
  const auto copies = two.Own(17, 10, 10);
  ASSERT_EQ(copies.size(), 1u);
  EXPECT_EQ(copies[0].from, 2);
  EXPECT_EQ(copies[0].to, 3);
  EXPECT_EQ(two.pages(), (Pages{0, 1, 3, 4, 5}));
  EXPECT_EQ(one.NumMissing(12, 10, 10), 0) << "nobody else is left on page 2";
  // From token 5 on: page 1 holds one that stays, nothing behind it does.
  const auto more = two.Own(17, 5, 5);
  ASSERT_EQ(more.size(), 1u);
  EXPECT_EQ(more[0].from, 1);
  EXPECT_EQ(two.pages(), (Pages{0, 6, 3, 4, 5}));
  EXPECT_TRUE(three.Own(8, 0, 0).empty()) << "nothing stays: nothing is copied";
  EXPECT_EQ(three.pages(), (Pages{7, 8}));
}

TEST(SequencePages, OwningWhatDoesNotFitChangesNothing) {
  PagePool pool(4, 4);
  SequencePages one(pool, 12);
  SequencePages two = one.Share(12);
  EXPECT_TRUE(Throws<CapacityError>([&] { two.Own(12, 0, 12); }, {"need 3", "have 1"}));
  EXPECT_EQ(two.pages(), one.pages());
  EXPECT_EQ(pool.num_free(), 1);
  one.Release();
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_TRUE(two.Own(16, 0, 12).empty());
}

// Sequences that grow, shrink, fork, write and end at random: a page that one writes to has no
// other owner, what was in it before has been copied, and every page comes back.
TEST(SequencePages, NobodyWritesToAnothersPages) {
  constexpr int64_t kPages = 60, kPageSize = 4;
  PagePool pool(kPages, kPageSize);
  std::mt19937 engine(2);
  struct Story {
    SequencePages pages;
    std::vector<int> tokens;
  };
  std::vector<int> memory(kPages * kPageSize, -1);
  std::vector<std::unique_ptr<Story>> stories;
  auto slot = [&](const Story& story, size_t i) -> int& {
    const int32_t page = story.pages.pages()[i / kPageSize];
    return memory[static_cast<size_t>(page) * kPageSize + i % kPageSize];
  };
  for (int round = 0; round < 3000; ++round) {
    const auto action = engine() % 5;
    if (action == 0 || stories.empty()) {
      stories.push_back(std::make_unique<Story>(Story{SequencePages(pool, 0), {}}));
      continue;
    }
    std::swap(stories[engine() % stories.size()], stories.back());
    Story& story = *stories.back();
    const auto length = static_cast<int64_t>(story.tokens.size());
    if (action == 1) {
      stories.push_back(std::make_unique<Story>(Story{story.pages.Share(length), story.tokens}));
    } else if (action == 2 && engine() % 3 == 0) {
      stories.pop_back();
    } else {
      const int64_t first = length - static_cast<int64_t>(engine() % (length + 1)) / 3;
      const int64_t end = first + engine() % 9;
      if (story.pages.NumMissing(end, first, first) > pool.num_free()) continue;
      for (const PageCopy& copy : story.pages.Own(end, first, first)) {
        std::copy_n(memory.begin() + copy.from * kPageSize, kPageSize,
                    memory.begin() + copy.to * kPageSize);
      }
      story.tokens.resize(static_cast<size_t>(end));
      for (auto i = static_cast<size_t>(first); i < story.tokens.size(); ++i) {
        slot(story, i) = story.tokens[i] = round;
      }
    }
    for (const auto& each : stories) {
      for (size_t i = 0; i < each->tokens.size(); ++i) ASSERT_EQ(slot(*each, i), each->tokens[i]);
    }
  }
  stories.clear();
  EXPECT_EQ(pool.num_free(), kPages);
}

}  // namespace
}  // namespace tidal::test
