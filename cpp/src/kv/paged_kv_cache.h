// PagedKvCache: the keys and values of all layers, in pages shared by all sequences.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "core/noise.h"
#include "kv/page_pool.h"
#include "kv/sequence_pages.h"

namespace tidal {

class PagedKvCache {
 public:
  // Allocates all pages on `backend`, for the purpose `what`. Throws OutOfMemoryError.
  PagedKvCache(Backend& backend, const ModelConfig& model, DType dtype, int64_t num_pages,
               int64_t page_size, const char* what = "the KV cache");

  PagePool& pool() { return pool_; }
  const PagePool& pool() const { return pool_; }
  int64_t bytes() const;

  // The layer's pages with a pass's page_table and seq_lens.
  PagedKv Layer(int64_t layer, const TensorView& page_table, const TensorView& seq_lens) const;

  // All that a page has: the K and V pages of every layer, and their scales. [num_pages, ...] each.
  std::vector<TensorView> parts() const;

  // Whole pages, in every layer.
  void Copy(Backend& backend, const std::vector<PageCopy>& copies);

  // For measuring without a prefill: random K and V, in every layer, for pages not filled so
  // before. What is decoded later goes over them; they stay plausible.
  bool IsFilled(const std::vector<int32_t>& pages) const;
  void Fill(Backend& backend, const std::vector<int32_t>& pages, const Noise& noise);

  // Bytes of one page over all layers, K and V.
  static int64_t BytesPerPage(const ModelConfig& model, DType dtype, int64_t page_size);

 private:
  PagePool pool_;
  std::vector<Buffer> buffers_;  // one a layer: its scales if it has some, K pages, V pages
  std::vector<PagedKv> layers_;  // without what a pass brings
  std::vector<bool> is_filled_;  // by Fill, per page
};

}  // namespace tidal
