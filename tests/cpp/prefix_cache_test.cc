// The prefix cache against a plain dictionary of what is known, and the pool's idle pages.
#include "kv/prefix_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "kv/sequence_pages.h"
#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

using Tokens = std::vector<int32_t>;
using Pages = std::vector<int32_t>;

// 0, 1, 2, ... `count` of them, then `tail`.
Tokens Count(int32_t count, const Tokens& tail = {}) {
  Tokens tokens;
  for (int32_t i = 0; i < count; ++i) tokens.push_back(i);
  tokens.insert(tokens.end(), tail.begin(), tail.end());
  return tokens;
}

Tokens Prefix(const Tokens& tokens, size_t length) {
  return Tokens(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(length));
}

// Reads the tokens as a sequence that finds what it can, publishes its whole pages and ends.
// Returns the pages it had.
Pages Read(PagePool& pool, PrefixCache& cache, const Tokens& tokens, const std::string& salt = "") {
  SequencePages pages(pool, 0);
  pages.Adopt(cache.Find(tokens, salt));
  const auto found = static_cast<int64_t>(pages.pages().size()) * pool.page_size();
  pages.Own(static_cast<int64_t>(tokens.size()), found, found);
  cache.Publish(tokens, pages.pages(), salt);
  return pages.pages();
}

TEST(PrefixCache, FindsWholePagesButNeverTheLastToken) {
  PagePool pool(10, 4);
  PrefixCache cache(pool);
  const Pages pages = Read(pool, cache, Count(12));
  EXPECT_EQ(pages, (Pages{0, 1, 2}));
  EXPECT_EQ(cache.Find(Count(13), ""), pages);
  EXPECT_EQ(cache.Find(Count(12), ""), (Pages{0, 1}));
  EXPECT_EQ(cache.Find(Count(9), ""), (Pages{0, 1}));
  EXPECT_EQ(cache.Find(Count(8), ""), (Pages{0}));
  EXPECT_EQ(cache.Find(Count(4), ""), Pages{});
  EXPECT_EQ(cache.Find(Count(1), ""), Pages{});
  EXPECT_EQ(cache.Find(Tokens{}, ""), Pages{});
  EXPECT_EQ(cache.Find(Count(7, {99, 8, 9, 10}), ""), (Pages{0}));
  EXPECT_EQ(cache.Find(Tokens{1, 2, 3, 4, 5}, ""), Pages{})
      << "a page is known with what is before it";
  EXPECT_EQ(cache.Peek(Count(12), "").num_pages, 2);
  const PrefixStats stats = cache.stats();
  EXPECT_EQ(stats.pages, 3);
  EXPECT_EQ(stats.lookups, 9) << "without tokens there is nothing to look up";
  EXPECT_EQ(stats.hits, 5);
  EXPECT_EQ(stats.hit_tokens, 4 * (3 + 2 + 2 + 1 + 1));
}

TEST(PrefixCache, APartOfAPageIsNotPublished) {
  PagePool pool(10, 4);
  PrefixCache cache(pool);
  Read(pool, cache, Count(11));
  EXPECT_EQ(cache.stats().pages, 2);
  Read(pool, cache, {7, 7, 7});
  EXPECT_EQ(cache.stats().pages, 2);
  EXPECT_EQ(pool.num_free(), 10);
  EXPECT_EQ(pool.num_idle(), 2);
}

TEST(PrefixCache, IdlePagesAreRoom) {
  PagePool pool(4, 4);
  PrefixCache cache(pool);
  Read(pool, cache, Count(16));
  EXPECT_EQ(pool.num_free(), 4);
  EXPECT_EQ(pool.num_idle(), 4);
  EXPECT_TRUE(Throws<CapacityError>([&] { pool.Take(5); }, {"need 5", "have 4"}));
  EXPECT_EQ(cache.stats().pages, 4) << "what does not fit evicts nothing";
  EXPECT_EQ(pool.Take(1), (Pages{3})) << "the last page of the prefix goes first";
  EXPECT_EQ(cache.Peek(Count(17), "").num_pages, 3);
  EXPECT_EQ(pool.num_free(), 3);
  EXPECT_EQ(cache.stats().evictions, 1);
}

TEST(PrefixCache, PagesLeaveInOrderOfLastUse) {
  PagePool pool(4, 1);
  PrefixCache cache(pool);
  Read(pool, cache, {10, 11});    // pages 0, 1
  Read(pool, cache, {20});        // page 2
  Read(pool, cache, {30});        // page 3
  cache.Find(Tokens{10, 0}, "");  // the first page of the first is in use again, its second not
  EXPECT_EQ(pool.Take(1), (Pages{1}));
  EXPECT_EQ(pool.Take(1), (Pages{2}));
  EXPECT_EQ(pool.Take(1), (Pages{3}));
  EXPECT_EQ(pool.Take(1), (Pages{0}));
  EXPECT_EQ(cache.stats().pages, 0);
}

TEST(PrefixCache, OwnedPagesStay) {
  PagePool pool(4, 4);
  PrefixCache cache(pool);
  Read(pool, cache, Count(8));
  SequencePages user(pool, 0);
  const uint64_t version = user.version();
  user.Adopt(cache.Find(Count(9), ""));
  EXPECT_NE(user.version(), version) << "a page table that was uploaded is out of date";
  EXPECT_EQ(pool.num_free(), 2);
  EXPECT_EQ(pool.Take(2), (Pages{2, 3}));
  EXPECT_EQ(cache.Peek(Count(9), "").num_pages, 2);
  EXPECT_EQ(cache.Peek(Count(9), "").num_idle, 0);
  EXPECT_THROW(pool.Take(1), CapacityError);
  user.Release();
  EXPECT_EQ(cache.Peek(Count(9), "").num_idle, 2);
  EXPECT_EQ(pool.Take(2), (Pages{0, 1}));
}

TEST(PrefixCache, OwnedPagesStayKnownWhileOthersLeave) {
  PagePool pool(3, 4);
  PrefixCache cache(pool);
  SequencePages user(pool, 4);
  cache.Publish(Count(4), user.pages(), "");
  Read(pool, cache, {9, 9, 9, 9});  // page 1, used later
  EXPECT_EQ(pool.Take(2), (Pages{1, 2}));
  EXPECT_EQ(cache.Find(Count(5), ""), (Pages{0}));
  EXPECT_EQ(cache.stats().pages, 1);
}

TEST(PrefixCache, TheFirstToPublishWins) {
  PagePool pool(10, 4);
  PrefixCache cache(pool);
  SequencePages one(pool, 8), two(pool, 12);
  cache.Publish(Count(8), one.pages(), "");
  cache.Publish(Count(12), two.pages(), "");
  EXPECT_EQ(cache.Find(Count(13), ""), (Pages{0, 1, 4}));
  two.Release();
  EXPECT_EQ(pool.num_idle(), 1) << "pages 2 and 3 are nobody's";
  EXPECT_EQ(pool.num_free(), 8);
}

// Two read the same at once; the one whose pages are known ends, the other goes on behind them.
TEST(PrefixCache, IdlePagesBeforeOwnedOnesAreRoomToo) {
  PagePool pool(5, 4);
  PrefixCache cache(pool);
  SequencePages one(pool, 8), two(pool, 12);
  cache.Publish(Count(8), one.pages(), "");
  cache.Publish(Count(12), two.pages(), "");
  one.Release();
  EXPECT_EQ(pool.num_free(), 2);
  EXPECT_EQ(pool.Take(2), (Pages{0, 1}));
  EXPECT_EQ(cache.stats().pages, 0);
  EXPECT_EQ(two.pages(), (Pages{2, 3, 4})) << "its owner keeps what it has";
  two.Release();
  EXPECT_EQ(pool.num_free(), 3);
}

TEST(PrefixCache, AnOwnerCopiesAKnownPageBeforeItWrites) {
  PagePool pool(4, 4);
  PrefixCache cache(pool);
  SequencePages pages(pool, 8);
  cache.Publish(Count(8), pages.pages(), "");
  EXPECT_EQ(pages.NumMissing(8, 6, 6), 1);
  const auto copies = pages.Own(8, 6, 6);
  ASSERT_EQ(copies.size(), 1u);
  EXPECT_EQ(copies[0].from, 1);
  EXPECT_EQ(copies[0].to, 2);
  EXPECT_EQ(cache.Find(Count(9), ""), (Pages{0, 1})) << "the known page is as it was";
}

TEST(PrefixCache, SaltsNeverShare) {
  PagePool pool(100, 2);
  PrefixCache cache(pool);
  const std::vector<std::string> salts = {"", "a", "b", std::string("a\0", 2),
                                          std::string("\0a", 2)};
  std::set<int32_t> seen;
  for (const std::string& salt : salts) {
    EXPECT_TRUE(cache.Find(Count(9), salt).empty());
    for (int32_t page : Read(pool, cache, Count(8), salt)) {
      EXPECT_TRUE(seen.insert(page).second) << "page " << page << " belongs to two salts";
    }
  }
  for (const std::string& salt : salts) EXPECT_EQ(cache.Find(Count(9), salt).size(), 4u);
  EXPECT_EQ(cache.stats().pages, 20);
}

TEST(PrefixCache, APageIsKnownByOneSaltOnly) {
  PagePool pool(4, 2);
  PrefixCache cache(pool);
  SequencePages pages(pool, 4);
  cache.Publish(Count(4), pages.pages(), "a");
  cache.Publish(Count(4), pages.pages(), "b");
  EXPECT_EQ(cache.Peek(Count(5), "a").num_pages, 2);
  EXPECT_EQ(cache.Peek(Count(5), "b").num_pages, 0);
}

TEST(PrefixCache, ForgetDropsAllBehindTheFirstPage) {
  PagePool pool(10, 2);
  PrefixCache cache(pool);
  Read(pool, cache, {1, 2, 3, 4, 5, 6});
  Read(pool, cache, {1, 2, 7, 8});
  Read(pool, cache, {9, 9});
  cache.Forget(Tokens{1, 2, 3, 4, 0}, "");
  EXPECT_EQ(cache.stats().pages, 1);
  EXPECT_EQ(cache.Peek(Tokens{9, 9, 9}, "").num_pages, 1);
  cache.Forget(Tokens{9}, "");
  cache.Forget(Tokens{9, 9}, "other");
  EXPECT_EQ(cache.stats().pages, 1);
  EXPECT_EQ(pool.num_free(), 10);
  EXPECT_EQ(pool.num_idle(), 1);
}

TEST(PrefixCache, LeavesThePoolAsItWas) {
  PagePool pool(10, 2);
  SequencePages kept(pool, 4);
  {
    PrefixCache cache(pool);
    cache.Publish(Count(4), kept.pages(), "");
    Read(pool, cache, {5, 6, 7, 8});
  }
  EXPECT_EQ(pool.num_idle(), 0);
  EXPECT_EQ(pool.num_free(), 8);
  EXPECT_FALSE(pool.IsShared(kept.pages()[0]));
  kept.Release();
  EXPECT_EQ(pool.Take(10).size(), 10u);
}

TEST(PrefixCache, PagesThatNobodyTookAreRefused) {
  PagePool pool(4, 2);
  EXPECT_TRUE(Throws<InvalidArgument>([&] { pool.Hold(0); }, {"page 0", "held"}));
  EXPECT_TRUE(Throws<InvalidArgument>([&] { pool.Drop(0); }, {"page 0", "dropped"}));
  EXPECT_THROW(pool.Drop(4), InvalidArgument);
  SequencePages pages(pool, 2);
  EXPECT_TRUE(Throws<InvalidArgument>([&] { pages.Adopt({0}); }, {"adopt"}));
}

// Random sequences against what a dictionary says: a page that is found holds exactly the tokens
// asked for, behind the same ones before it, by the same salt; whoever owns pages keeps them as
// they are; and the pool's counts are those of the pages.
TEST(PrefixCache, AgreesWithADictionary) {
  constexpr int64_t kPages = 40, kPageSize = 2;
  PagePool pool(kPages, kPageSize);
  auto cache = std::make_unique<PrefixCache>(pool);
  std::mt19937 engine(3);
  struct Story {
    SequencePages pages;
    Tokens tokens;
    std::string salt;
    size_t published = 0;
  };
  std::vector<std::unique_ptr<Story>> stories;
  // What each page holds: the salt and all tokens up to its end.
  std::vector<std::pair<std::string, Tokens>> content(kPages);
  int64_t num_found = 0, num_full = 0;
  for (int round = 0; round < 30000; ++round) {
    const auto action = engine() % 8;
    if (action < 4) {
      // Few different tokens: prefixes meet often.
      Tokens tokens;
      for (auto i = engine() % 24; i > 0; --i) tokens.push_back(static_cast<int32_t>(engine() % 2));
      const std::string salt = engine() % 2 == 0 ? "one" : "two";
      auto story = std::make_unique<Story>(Story{SequencePages(pool, 0), tokens, salt});
      story->pages.Adopt(cache->Find(tokens, salt));
      const auto found = static_cast<int64_t>(story->pages.pages().size()) * kPageSize;
      num_found += found;
      ASSERT_LE(found, std::max<int64_t>(static_cast<int64_t>(tokens.size()) - 1, 0));
      for (size_t i = 0; i < story->pages.pages().size(); ++i) {
        const auto& held = content[static_cast<size_t>(story->pages.pages()[i])];
        ASSERT_EQ(held.first, salt);
        ASSERT_EQ(held.second, Prefix(tokens, (i + 1) * kPageSize));
      }
      const auto length = static_cast<int64_t>(tokens.size());
      if (story->pages.NumMissing(length, found, found) > pool.num_free()) {
        ASSERT_THROW(story->pages.Own(length, found, found), CapacityError);
        ++num_full;
        continue;
      }
      ASSERT_TRUE(story->pages.Own(length, found, found).empty());
      for (auto i = static_cast<size_t>(found / kPageSize); i < story->pages.pages().size(); ++i) {
        content[static_cast<size_t>(story->pages.pages()[i])] = {
            salt, Prefix(tokens, std::min((i + 1) * kPageSize, tokens.size()))};
      }
      stories.push_back(std::move(story));
    } else if (!stories.empty() && action < 6) {
      std::swap(stories[engine() % stories.size()], stories.back());
      Story& story = *stories.back();
      story.published = engine() % (story.tokens.size() + 1);
      cache->Publish(Prefix(story.tokens, story.published), story.pages.pages(), story.salt);
    } else if (!stories.empty() && action == 6) {
      std::swap(stories[engine() % stories.size()], stories.back());
      stories.pop_back();
    } else if (engine() % 200 == 0) {
      cache = nullptr;
      ASSERT_EQ(pool.num_idle(), 0);
      cache = std::make_unique<PrefixCache>(pool);
    }
    std::set<int32_t> owned;
    for (const auto& story : stories) {
      for (size_t i = 0; i < story->pages.pages().size(); ++i) {
        const int32_t page = story->pages.pages()[i];
        owned.insert(page);
        ASSERT_EQ(content[static_cast<size_t>(page)].second,
                  Prefix(story->tokens, std::min((i + 1) * kPageSize, story->tokens.size())));
      }
    }
    ASSERT_EQ(pool.num_free(), kPages - static_cast<int64_t>(owned.size()));
    ASSERT_LE(pool.num_idle(), pool.num_free());
  }
  EXPECT_GT(num_found, 10000);
  EXPECT_GT(num_full, 100);
  EXPECT_GT(cache->stats().evictions, 10);
  stories.clear();
  EXPECT_EQ(pool.num_free(), kPages);
  EXPECT_EQ(pool.num_idle(), cache->stats().pages);
  EXPECT_EQ(pool.Take(kPages).size(), static_cast<size_t>(kPages));
  EXPECT_EQ(cache->stats().pages, 0);
}

}  // namespace
}  // namespace tidal::test
