// PagePool: which pages of the KV cache are free, and how many owners the others have. Pure host
// arithmetic.
//
// A page that the prefix cache holds and nobody owns is idle: its K and V may be found again, and
// it is room for whoever takes pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace tidal {

// Who holds pages that nobody owns, until room is needed.
class PageHolder {
 public:
  virtual ~PageHolder() = default;

  // Drops pages (PagePool::Drop) until at least `count` idle ones have become free. There are as
  // many.
  virtual void Evict(int64_t count) noexcept = 0;
};

class PagePool {
 public:
  PagePool(int64_t num_pages, int64_t page_size);

  int64_t num_pages() const { return num_pages_; }
  // Pages that Take can give: idle ones are among them.
  int64_t num_free() const { return static_cast<int64_t>(free_.size()) + num_idle_; }
  int64_t num_idle() const { return num_idle_; }
  int64_t page_size() const { return page_size_; }
  int64_t PagesFor(int64_t num_tokens) const { return (num_tokens + page_size_ - 1) / page_size_; }

  // Takes `count` pages, lowest free ids first; where those are too few, the holder evicts idle
  // ones. Throws CapacityError, taking none, if there are fewer.
  std::vector<int32_t> Take(int64_t count);

  // One owner more for pages that have been taken, or are held.
  void Share(const std::vector<int32_t>& pages);
  bool IsOwned(int32_t page) const { return num_owners_[static_cast<size_t>(page)] > 0; }
  bool HasOtherOwners(int32_t page) const { return num_owners_[static_cast<size_t>(page)] > 1; }
  // Whether an owner must not write to the page: another one, or the prefix cache, reads it.
  bool IsShared(int32_t page) const;

  // Whether the holder holds it, with or without owners.
  bool IsHeld(int32_t page) const { return is_held_[static_cast<size_t>(page)]; }

  // One owner less for each page, which must have one; without any it is free, or idle if it is
  // held.
  void Release(std::span<const int32_t> pages);

  // At most one holder; null: nobody holds pages any more, which all must have been dropped.
  void SetHolder(PageHolder* holder) { holder_ = holder; }
  // Holds a page that has been taken; Drop lets go of it.
  void Hold(int32_t page);
  void Drop(int32_t page);

 private:
  void CheckTaken(int32_t page, const char* what) const;
  void Free(int32_t page);

  int64_t num_pages_;
  int64_t page_size_;
  std::vector<int32_t> free_;  // a heap with the lowest id in front
  std::vector<int32_t> num_owners_;
  std::vector<bool> is_held_;
  int64_t num_idle_ = 0;  // held pages without owners
  PageHolder* holder_ = nullptr;
};

}  // namespace tidal
