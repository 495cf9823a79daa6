#include "kv/host_pages.h"

#include <new>

#include "core/checked.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// Calls visit(from, to, count) for each run of pages that follow each other on both sides.
template <typename Visit>
void ForEachRun(const std::vector<PageCopy>& copies, const Visit& visit) {
  for (size_t begin = 0, end = 0; begin < copies.size(); begin = end) {
    end = begin + 1;
    while (end < copies.size() && copies[end].from == copies[end - 1].from + 1 &&
           copies[end].to == copies[end - 1].to + 1) {
      ++end;
    }
    visit(copies[begin].from, copies[begin].to, static_cast<int64_t>(end - begin));
  }
}

}  // namespace

HostPages::HostPages(const PagedKvCache& cache, int64_t num_pages) : num_pages_(num_pages) {
  for (const TensorView& pages : cache.parts()) {
    const int64_t bytes = Product({num_pages, pages.Rows(0, 1).bytes()});
    auto* memory = new (std::nothrow) char[static_cast<size_t>(bytes)];
    TIDAL_CHECK(memory != nullptr, OutOfMemoryError, "host_kv_gib: cannot allocate ", num_pages,
                " pages of host memory; lower it");
    parts_.push_back({pages, std::unique_ptr<char[]>(memory)});
  }
}

void HostPages::Save(Backend& backend, const std::vector<PageCopy>& copies) {
  ForEachRun(copies, [&](int32_t from, int32_t to, int64_t count) {
    for (const Part& part : parts_) {
      const TensorView run = part.pages.Rows(from, count);
      backend.Download(part.memory.get() + to * (run.bytes() / count), run);
    }
  });
}

void HostPages::Restore(Backend& backend, const std::vector<PageCopy>& copies) {
  ForEachRun(copies, [&](int32_t from, int32_t to, int64_t count) {
    for (const Part& part : parts_) {
      const TensorView run = part.pages.Rows(to, count);
      backend.Upload(run, part.memory.get() + from * (run.bytes() / count));
    }
  });
}

}  // namespace tidal
