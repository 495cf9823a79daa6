// PagePool and SequencePages: nobody's page is anybody else's, and every page comes back.
#include "kv/page_pool.h"

#include <gtest/gtest.h>

#include <random>
#include <set>

#include "kv/paged_kv_cache.h"
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
  pool.Release({1, 3});
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
  pool.Release({0});
  EXPECT_TRUE(Throws<InvalidArgument>([&] { pool.Release({0}); }, {"page 0"}));
  EXPECT_THROW(pool.Release({3}), InvalidArgument);
  EXPECT_THROW(pool.Release({4}), InvalidArgument);
  EXPECT_THROW(pool.Release({-1}), InvalidArgument);
}

TEST(PagePool, ImpossibleSizesAreRefused) {
  EXPECT_THROW(PagePool(0, 16), InvalidArgument);
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

}  // namespace
}  // namespace tidal::test
