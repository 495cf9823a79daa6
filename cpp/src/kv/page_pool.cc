#include "kv/page_pool.h"

#include <algorithm>
#include <functional>

#include "tidal/error.h"

namespace tidal {

PagePool::PagePool(int64_t num_pages, int64_t page_size)
    : num_pages_(num_pages), page_size_(page_size) {
  TIDAL_CHECK(num_pages >= 0 && page_size > 0, InvalidArgument, "page pool: got ", num_pages,
              " pages of ", page_size, " tokens, expected >= 0 and >= 1");
  num_owners_.assign(static_cast<size_t>(num_pages), 0);
  is_held_.assign(static_cast<size_t>(num_pages), false);
  free_.reserve(static_cast<size_t>(num_pages));
  // Ascending ids are a heap.
  for (int64_t page = 0; page < num_pages; ++page) free_.push_back(static_cast<int32_t>(page));
}

std::vector<int32_t> PagePool::Take(int64_t count) {
  TIDAL_CHECK(count <= num_free(), CapacityError, "KV cache: need ", count, " pages of ",
              page_size_, " tokens, have ", num_free(), " free of ", num_pages_,
              "; raise max_seq_len or max_batch_size, or send fewer or shorter sequences");
  std::vector<int32_t> pages(static_cast<size_t>(std::max<int64_t>(count, 0)));
  auto missing = count - static_cast<int64_t>(free_.size());
  if (missing > 0) holder_->Evict(missing);
  for (int32_t& page : pages) {
    std::pop_heap(free_.begin(), free_.end(), std::greater<>());
    page = free_.back();
    free_.pop_back();
    num_owners_[static_cast<size_t>(page)] = 1;
  }
  return pages;
}

void PagePool::CheckTaken(int32_t page, const char* what) const {
  TIDAL_CHECK(page >= 0 && page < num_pages_ && IsOwned(page), InvalidArgument, "page pool: page ",
              page, " was ", what, " but not taken");
}

bool PagePool::IsShared(int32_t page) const {
  auto i = static_cast<size_t>(page);
  return num_owners_[i] > 1 || (num_owners_[i] == 1 && is_held_[i]);
}

void PagePool::Share(const std::vector<int32_t>& pages) {
  for (int32_t page : pages) {
    bool is_idle =
        page >= 0 && page < num_pages_ && !IsOwned(page) && is_held_[static_cast<size_t>(page)];
    if (is_idle) {
      --num_idle_;
    } else {
      CheckTaken(page, "shared");
    }
    ++num_owners_[static_cast<size_t>(page)];
  }
}

void PagePool::Release(std::span<const int32_t> pages) {
  for (int32_t page : pages) {
    CheckTaken(page, "released");
    auto i = static_cast<size_t>(page);
    if (--num_owners_[i] > 0) continue;
    if (is_held_[i]) {
      ++num_idle_;
    } else {
      Free(page);
    }
  }
}

void PagePool::Hold(int32_t page) {
  CheckTaken(page, "held");
  is_held_[static_cast<size_t>(page)] = true;
}

void PagePool::Drop(int32_t page) {
  auto i = static_cast<size_t>(page);
  TIDAL_CHECK(page >= 0 && page < num_pages_ && is_held_[i], InvalidArgument, "page pool: page ",
              page, " was dropped but not held");
  is_held_[i] = false;
  if (IsOwned(page)) return;
  --num_idle_;
  Free(page);
}

// The room was reserved: nothing is allocated.
void PagePool::Free(int32_t page) {
  free_.push_back(page);
  std::push_heap(free_.begin(), free_.end(), std::greater<>());
}

}  // namespace tidal
