#include "kv/page_pool.h"

#include <algorithm>
#include <cassert>

#include "tidal/error.h"

namespace tidal {

PagePool::PagePool(int64_t num_pages, int64_t page_size)
    : num_pages_(num_pages), page_size_(page_size) {
  TIDAL_CHECK(num_pages > 0 && page_size > 0, InvalidArgument, "page pool: got ", num_pages,
              " pages of ", page_size, " tokens, expected both >= 1");
  num_owners_.assign(static_cast<size_t>(num_pages), 0);
  free_.reserve(static_cast<size_t>(num_pages));
  for (int64_t page = num_pages - 1; page >= 0; --page) free_.push_back(static_cast<int32_t>(page));
}

std::vector<int32_t> PagePool::Take(int64_t count) {
  TIDAL_CHECK(count <= num_free(), CapacityError, "KV cache: need ", count, " pages of ",
              page_size_, " tokens, have ", num_free(), " free of ", num_pages_,
              "; raise max_seq_len or max_batch_size, or send fewer or shorter sequences");
  std::vector<int32_t> pages(free_.rbegin(), free_.rbegin() + count);
  free_.resize(free_.size() - static_cast<size_t>(count));
  for (int32_t page : pages) num_owners_[static_cast<size_t>(page)] = 1;
  return pages;
}

void PagePool::CheckTaken(int32_t page, const char* what) const {
  TIDAL_CHECK(page >= 0 && page < num_pages_ && num_owners_[static_cast<size_t>(page)] > 0,
              InvalidArgument, "page pool: page ", page, " was ", what, " but not taken");
}

void PagePool::Share(const std::vector<int32_t>& pages) {
  for (int32_t page : pages) {
    CheckTaken(page, "shared");
    ++num_owners_[static_cast<size_t>(page)];
  }
}

void PagePool::Release(std::span<const int32_t> pages) {
  for (int32_t page : pages) {
    CheckTaken(page, "released");
    if (--num_owners_[static_cast<size_t>(page)] == 0) free_.push_back(page);
  }
  // The next Take again gets the lowest ids, whatever the order of release.
  std::sort(free_.begin(), free_.end(), std::greater<>());
}

}  // namespace tidal
