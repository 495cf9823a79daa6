#include "kv/sequence_pages.h"

#include <algorithm>
#include <span>

#include "tidal/error.h"

namespace tidal {

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

int64_t SequencePages::NumMissing(int64_t num_tokens, int64_t first) const {
  int64_t wanted = pool_->PagesFor(num_tokens), have = static_cast<int64_t>(pages_.size());
  int64_t missing = std::max<int64_t>(wanted - have, 0);
  for (int64_t i = first / pool_->page_size(); i < std::min(wanted, have); ++i) {
    if (pool_->IsShared(pages_[static_cast<size_t>(i)])) ++missing;
  }
  return missing;
}

std::vector<PageCopy> SequencePages::Own(int64_t num_tokens, int64_t first, int64_t cached) {
  std::vector<int32_t> taken = pool_->Take(NumMissing(num_tokens, first));
  Shrink(num_tokens);
  auto next = taken.begin();
  std::vector<PageCopy> copies;
  std::vector<int32_t> left;
  auto num_cached_pages = static_cast<size_t>(pool_->PagesFor(cached));
  for (auto i = static_cast<size_t>(first / pool_->page_size()); i < pages_.size(); ++i) {
    if (!pool_->IsShared(pages_[i])) continue;
    if (i < num_cached_pages) copies.push_back({.from = pages_[i], .to = *next});
    left.push_back(pages_[i]);
    pages_[i] = *next++;
  }
  pool_->Release(left);
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
