// HostPages: room in host memory for pages of the KV cache, so that a paused sequence can go on
// where it was.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "kv/paged_kv_cache.h"

namespace tidal {

class HostPages {
 public:
  // Room for num_pages pages of `cache`, which must outlive it. The system gives the memory when it
  // is first written. Throws OutOfMemoryError.
  HostPages(const PagedKvCache& cache, int64_t num_pages);

  int64_t num_pages() const { return num_pages_; }

  // Whole pages, in every layer. `from` is a page of the cache and `to` one of these,
  // or the other way round.
  void Save(Backend& backend, const std::vector<PageCopy>& copies);
  void Restore(Backend& backend, const std::vector<PageCopy>& copies);

 private:
  // One of the cache's parts().
  struct Part {
    TensorView pages;                // of the cache
    std::unique_ptr<char[]> memory;  // [num_pages] of them
  };

  int64_t num_pages_;
  std::vector<Part> parts_;
};

}  // namespace tidal
