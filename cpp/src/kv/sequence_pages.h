// SequencePages: the pages of one sequence. Sequences that began as the same one share pages until
// one of them writes.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "kv/page_pool.h"

namespace tidal {

// The whole pages of tokens that begin like earlier ones. The last token is in none of them, for
// somebody has to compute what follows it.
int64_t NumCommonPages(std::span<const int32_t> earlier, std::span<const int32_t> tokens,
                       int64_t page_size);

struct PageCopy {
  int32_t from;
  int32_t to;
};

// Given back on destruction.
class SequencePages {
 public:
  SequencePages(PagePool& pool, int64_t num_tokens)
      : pool_(&pool), pages_(pool.Take(pool.PagesFor(num_tokens))) {}
  ~SequencePages() { Release(); }
  SequencePages(SequencePages&& other) noexcept
      : pool_(other.pool_), pages_(std::move(other.pages_)), version_(other.version_) {
    other.pages_.clear();
  }
  SequencePages& operator=(SequencePages&&) = delete;

  const std::vector<int32_t>& pages() const { return pages_; }
  // Another number each time that pages() has changed, for whoever keeps a copy.
  uint64_t version() const { return version_; }
  void Release() {
    pool_->Release(pages_);
    pages_.clear();
    ++version_;
  }

  // The pages of the first num_tokens tokens, with this as another owner.
  SequencePages Share(int64_t num_tokens) const;

  // Takes pages that the prefix cache found for the first tokens, as another owner; there must be
  // none yet.
  void Adopt(std::vector<int32_t> pages);

  // Free pages that Own needs beside those that it gives back.
  int64_t NumMissing(int64_t num_tokens, int64_t first, int64_t cached) const;

  // Has pages for exactly num_tokens tokens, of which those that hold the tokens from `first` on
  // have no other owner. Returns what must be copied before anything is written so that the first
  // `cached` tokens stay in the cache. Throws CapacityError, changing nothing.
  std::vector<PageCopy> Own(int64_t num_tokens, int64_t first, int64_t cached);

  // Gives back the pages behind the first num_tokens tokens.
  void Shrink(int64_t num_tokens);

 private:
  SequencePages(PagePool* pool, std::vector<int32_t> pages)
      : pool_(pool), pages_(std::move(pages)) {}

  PagePool* pool_;
  std::vector<int32_t> pages_;
  uint64_t version_ = 0;
};

}  // namespace tidal
