#include "kv/paged_kv_cache.h"

#include <algorithm>

#include "core/checked.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// The scale of int8 rows of noise: as large as the noise of other dtypes.
constexpr float kNoiseScale = 1.0f / Noise::kInt8PerUnit;

// Bytes of the scales of a half of the cache.
int64_t ScaleBytes(const ModelConfig& model, DType dtype, int64_t num_tokens) {
  if (dtype != DType::kInt8) return 0;
  return Product({num_tokens, model.num_kv_heads, DTypeBytes(DType::kFloat32)});
}

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
    const int64_t half = Product({num_pages, page_size, model.kv_size(), DTypeBytes(dtype)});
    const int64_t scales = ScaleBytes(model, dtype, Product({num_pages, page_size}));
    buffers_.push_back(backend.Allocate(Product({2, Sum({half, scales})}), what));
    char* data = static_cast<char*>(buffers_.back().data());
    PagedKv& kv = layers_.emplace_back();
    if (scales > 0) {
      auto view = [&](char* at) {
        return TensorView(at, DType::kFloat32, {num_pages, model.num_kv_heads, page_size});
      };
      kv.k_scales = view(data);
      kv.v_scales = view(data + scales);
      data += 2 * scales;
    }
    auto view = [&](char* at) {
      return TensorView(at, dtype, {num_pages, model.num_kv_heads, page_size, model.head_dim});
    };
    kv.k_pages = view(data);
    kv.v_pages = view(data + half);
    if (dtype == DType::kFloat8) {
      kv.k_scale = model.layer(layer).k_scale;
      kv.v_scale = model.layer(layer).v_scale;
    }
  }
}

int64_t PagedKvCache::bytes() const {
  int64_t total = 0;
  for (const Buffer& buffer : buffers_) total += buffer.bytes();
  return total;
}

PagedKv PagedKvCache::Layer(int64_t layer, const TensorView& page_table,
                            const TensorView& seq_lens) const {
  PagedKv kv = layers_[static_cast<size_t>(layer)];
  kv.page_table = page_table;
  kv.seq_lens = seq_lens;
  return kv;
}

std::vector<TensorView> PagedKvCache::parts() const {
  std::vector<TensorView> parts;
  for (const PagedKv& kv : layers_) {
    for (const TensorView& part : {kv.k_pages, kv.v_pages, kv.k_scales, kv.v_scales}) {
      if (part) parts.push_back(part);
    }
  }
  return parts;
}

void PagedKvCache::Copy(Backend& backend, const std::vector<PageCopy>& copies) {
  const std::vector<TensorView> all = parts();
  for (const PageCopy& copy : copies) {
    for (const TensorView& part : all) {
      backend.Copy(part.Rows(copy.to, 1), part.Rows(copy.from, 1));
    }
  }
}

bool PagedKvCache::IsFilled(const std::vector<int32_t>& pages) const {
  return std::all_of(pages.begin(), pages.end(),
                     [&](int32_t page) { return is_filled_[static_cast<size_t>(page)]; });
}

void PagedKvCache::Fill(Backend& backend, const std::vector<int32_t>& pages, const Noise& noise) {
  const std::vector<TensorView> all = parts();
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
    for (const TensorView& part : all) {
      const TensorView run = part.Rows(pages[begin], static_cast<int64_t>(end - begin));
      if (part.rank == 4) {
        UploadNoise(backend, run, offset, noise);
      } else {
        const std::vector<float> scales(static_cast<size_t>(run.numel()), kNoiseScale);
        backend.Upload(run, scales.data());
      }
      offset += run.bytes();
    }
    for (size_t i = begin; i < end; ++i) is_filled_[static_cast<size_t>(pages[i])] = true;
  }
}

int64_t PagedKvCache::BytesPerPage(const ModelConfig& model, DType dtype, int64_t page_size) {
  const int64_t half = Product({page_size, model.kv_size(), DTypeBytes(dtype)});
  return Product({2, model.num_layers, Sum({half, ScaleBytes(model, dtype, page_size)})});
}

}  // namespace tidal
