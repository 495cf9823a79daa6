// PagePool: which pages of the KV cache are free, and how many owners the others have. Pure host
// arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace tidal {

class PagePool {
 public:
  PagePool(int64_t num_pages, int64_t page_size);

  int64_t num_pages() const { return num_pages_; }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t page_size() const { return page_size_; }
  int64_t PagesFor(int64_t num_tokens) const { return (num_tokens + page_size_ - 1) / page_size_; }

  // Takes `count` pages, lowest free ids first. Throws CapacityError, taking none, if there are
  // fewer.
  std::vector<int32_t> Take(int64_t count);

  // One owner more for pages that have been taken.
  void Share(const std::vector<int32_t>& pages);
  bool IsShared(int32_t page) const { return num_owners_[static_cast<size_t>(page)] > 1; }

  // One owner less for each page, which must have one; without any it is free.
  void Release(std::span<const int32_t> pages);

 private:
  void CheckTaken(int32_t page, const char* what) const;

  int64_t num_pages_;
  int64_t page_size_;
  std::vector<int32_t> free_;  // descending, so that the lowest id is at the back
  std::vector<int32_t> num_owners_;
};

}  // namespace tidal
