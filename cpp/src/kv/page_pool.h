// PagePool: which pages of the KV cache are free. Pure host arithmetic.
#pragma once

#include <cstdint>
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

  // Gives pages back. Each must have been taken.
  void Release(const std::vector<int32_t>& pages);

 private:
  int64_t num_pages_;
  int64_t page_size_;
  std::vector<int32_t> free_;  // descending, so that the lowest id is at the back
  std::vector<bool> is_free_;
};

}  // namespace tidal
