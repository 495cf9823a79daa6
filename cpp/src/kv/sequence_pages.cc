#include "kv/sequence_pages.h"

#include <algorithm>
#include <span>
#include <utility>

#include "tidal/error.h"

namespace tidal {

int64_t NumCommonPages(std::span<const int32_t> earlier, std::span<const int32_t> tokens,
                       int64_t page_size) {
  const auto end =
      std::mismatch(earlier.begin(), earlier.end(), tokens.begin(), tokens.end() - 1).second;
  return (end - tokens.begin()) / page_size;
}

SequencePages SequencePages::Share(int64_t num_tokens) const {
  auto end = pages_.begin() + pool_->PagesFor(num_tokens);
  std::vector<int32_t> pages(pages_.begin(), end);
  pool_->Share(pages);
  return SequencePages(pool_, std::move(pages));
}

void SequencePages::Adopt(std::vector<int32_t> pages) {
  TIDAL_CHECK(pages_.empty(), InvalidArgument, "sequence pages: got ", pages.size(),
              " to adopt, has ", pages_.size(), " of its own, expected none");
  pool_->Share(pages);
  pages_ = std::move(pages);
  ++version_;
}

int64_t SequencePages::NumMissing(int64_t num_tokens, int64_t first, int64_t cached) const {
  int64_t wanted = pool_->PagesFor(num_tokens), have = static_cast<int64_t>(pages_.size());
  int64_t num_cached_pages = pool_->PagesFor(cached);
  int64_t missing = std::max<int64_t>(wanted - have, 0);
  for (int64_t i = std::min(first / pool_->page_size(), wanted); i < have; ++i) {
    int32_t page = pages_[static_cast<size_t>(i)];
    bool comes_back = !pool_->HasOtherOwners(page);
    if (i >= wanted) {
      missing -= comes_back ? 1 : 0;
    } else if (pool_->IsShared(page) && (i < num_cached_pages || !comes_back)) {
      ++missing;
    }
  }
  return std::max<int64_t>(missing, 0);
}

std::vector<PageCopy> SequencePages::Own(int64_t num_tokens, int64_t first, int64_t cached) {
  int64_t missing = NumMissing(num_tokens, first, cached);
  if (missing > pool_->num_free()) pool_->Take(missing);  // which throws
  Shrink(num_tokens);
  auto num_cached_pages = static_cast<size_t>(pool_->PagesFor(cached));
  auto begin = static_cast<size_t>(first / pool_->page_size());
  std::vector<size_t> replaced;
  for (size_t i = begin; i < pages_.size(); ++i) {
    if (!pool_->IsShared(pages_[i])) continue;
    replaced.push_back(i);
    // Nothing in it is of use, so that it may be taken again at once.
    if (i >= num_cached_pages) pool_->Release({&pages_[i], 1});
  }
  int64_t num_new = pool_->PagesFor(num_tokens) - static_cast<int64_t>(pages_.size());
  std::vector<int32_t> taken = pool_->Take(static_cast<int64_t>(replaced.size()) + num_new);
  auto next = taken.begin();
  std::vector<PageCopy> copies;
  for (size_t i : replaced) {
    int32_t from = std::exchange(pages_[i], *next++);
    if (i >= num_cached_pages) continue;
    copies.push_back({.from = from, .to = pages_[i]});
    pool_->Release({&from, 1});
  }
  pages_.insert(pages_.end(), next, taken.end());
  if (!taken.empty()) ++version_;
  return copies;
}

void SequencePages::Shrink(int64_t num_tokens) {
  auto keep = static_cast<size_t>(pool_->PagesFor(num_tokens));
  if (keep >= pages_.size()) return;
  pool_->Release(std::span(pages_).subspan(keep));
  pages_.resize(keep);
  ++version_;
}

}  // namespace tidal
