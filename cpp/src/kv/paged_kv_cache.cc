#include "kv/paged_kv_cache.h"

#include <algorithm>

#include "core/checked.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// Pieces of the noise one after the other, until dst is full.
void UploadNoise(Backend& backend, const TensorView& dst, int64_t offset, const Noise& noise) {
  for (int64_t done = 0; done < dst.bytes();) {
    std::span<const char> piece = noise.From(offset + done);
    int64_t bytes = std::min(dst.bytes() - done, static_cast<int64_t>(piece.size()));
    TensorView part(static_cast<char*>(dst.ptr) + done, dst.dtype, {bytes / DTypeBytes(dst.dtype)});
    backend.Upload(part, piece.data());
    done += bytes;
  }
}

}  // namespace

PagedKvCache::PagedKvCache(Backend& backend, const ModelConfig& model, DType dtype,
                           int64_t num_pages, int64_t page_size, const char* what)
    : pool_(num_pages, page_size), is_filled_(static_cast<size_t>(num_pages), false) {
  for (int64_t layer = 0; layer < model.num_layers; ++layer) {
    int64_t half = Product({num_pages, page_size, model.kv_size(), DTypeBytes(dtype)});
    buffers_.push_back(backend.Allocate(Product({2, half}), what));
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

std::vector<TensorView> PagedKvCache::halves() const {
  std::vector<TensorView> halves = k_pages_;
  halves.insert(halves.end(), v_pages_.begin(), v_pages_.end());
  return halves;
}

void PagedKvCache::Copy(Backend& backend, const std::vector<PageCopy>& copies) {
  for (const PageCopy& copy : copies) {
    for (const std::vector<TensorView>* layers : {&k_pages_, &v_pages_}) {
      for (const TensorView& pages : *layers) {
        backend.Copy(pages.Rows(copy.to, 1), pages.Rows(copy.from, 1));
      }
    }
  }
}

bool PagedKvCache::IsFilled(const std::vector<int32_t>& pages) const {
  return std::all_of(pages.begin(), pages.end(),
                     [&](int32_t page) { return is_filled_[static_cast<size_t>(page)]; });
}

void PagedKvCache::Fill(Backend& backend, const std::vector<int32_t>& pages, const Noise& noise) {
  for (size_t begin = 0, end = 0; begin < pages.size(); begin = end) {
    end = begin + 1;
    if (is_filled_[static_cast<size_t>(pages[begin])]) continue;
    // A run of neighbours is one copy.
    while (end < pages.size() && pages[end] == pages[end - 1] + 1 &&
           !is_filled_[static_cast<size_t>(pages[end])]) {
      ++end;
    }
    // Into the noise: other values for every page, layer, K and V.
    int64_t offset = pages[begin] * bytes() / pool_.num_pages();
    for (size_t layer = 0; layer < k_pages_.size(); ++layer) {
      for (const TensorView* all : {&k_pages_[layer], &v_pages_[layer]}) {
        TensorView run = all->Rows(pages[begin], static_cast<int64_t>(end - begin));
        UploadNoise(backend, run, offset, noise);
        offset += run.bytes();
      }
    }
    for (size_t i = begin; i < end; ++i) is_filled_[static_cast<size_t>(pages[i])] = true;
  }
}

int64_t PagedKvCache::BytesPerPage(const ModelConfig& model, DType dtype, int64_t page_size) {
  return Product({2, model.num_layers, page_size, model.kv_size(), DTypeBytes(dtype)});
}

}  // namespace tidal
