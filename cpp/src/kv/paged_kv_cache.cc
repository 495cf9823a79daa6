#include "kv/paged_kv_cache.h"

#include "tidal/error.h"

namespace tidal {

PagedKvCache::PagedKvCache(Backend& backend, const ModelConfig& model, DType dtype,
                           int64_t num_pages, int64_t page_size)
    : pool_(num_pages, page_size) {
  for (int64_t layer = 0; layer < model.num_layers; ++layer) {
    int64_t half = num_pages * page_size * model.kv_size() * DTypeBytes(dtype);
    buffers_.push_back(backend.Allocate(2 * half, "the KV cache"));
    char* data = static_cast<char*>(buffers_.back().data());
    auto view = [&](char* at) {
      return TensorView(at, dtype, {num_pages, model.num_kv_heads, page_size, model.head_dim});
    };
    k_pages_.push_back(view(data));
    v_pages_.push_back(view(data + half));
  }
}

int64_t PagedKvCache::bytes() const {
  int64_t total = 0;
  for (const Buffer& buffer : buffers_) total += buffer.bytes();
  return total;
}

PagedKv PagedKvCache::Layer(int64_t layer, const TensorView& page_table,
                            const TensorView& seq_lens) const {
  return {.k_pages = k_pages_[static_cast<size_t>(layer)],
          .v_pages = v_pages_[static_cast<size_t>(layer)],
          .page_table = page_table,
          .seq_lens = seq_lens};
}

int64_t PagedKvCache::BytesPerPage(const ModelConfig& model, DType dtype, int64_t page_size) {
  return 2 * model.num_layers * page_size * model.kv_size() * DTypeBytes(dtype);
}

}  // namespace tidal
