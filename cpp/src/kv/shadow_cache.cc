#include "kv/shadow_cache.h"

#include <utility>

#include "core/checked.h"

namespace tidal {
namespace {

constexpr const char* kPurpose = "the KV cache";

// Bytes of one key's codes and scale.
int64_t KeyBytes(const ModelConfig& model) {
  return model.head_dim / 2 + DTypeBytes(DType::kFloat16);
}

}  // namespace

ShadowCache::ShadowCache(PlanId plan, Backend& backend, const ModelConfig& model,
                         std::vector<int64_t> layers, int64_t num_pages, int64_t page_size)
    : plan_(plan), layers_(std::move(layers)) {
  const auto num_layers = static_cast<int64_t>(layers_.size());
  const int64_t num_keys = Product({num_pages, model.num_kv_heads, page_size});
  const int64_t scale_bytes = Product({num_keys, DTypeBytes(DType::kFloat16)});
  const MemoryItem factors = Factors(model, num_layers);
  factors_ = backend.Allocate(factors.bytes, factors.purpose);
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    buffers_.push_back(backend.Allocate(Product({num_keys, KeyBytes(model)}), kPurpose));
    char* data = static_cast<char*>(buffers_.back().data());
    char* own = static_cast<char*>(factors_.data()) + layer * factors.bytes / num_layers;
    shadows_.push_back(
        {.codes = TensorView(data + scale_bytes, DType::kUInt8,
                             {num_pages, model.num_kv_heads, page_size, model.head_dim / 2}),
         .scales = TensorView(data, DType::kFloat16, {num_pages, model.num_kv_heads, page_size}),
         .balance = TensorView(own, DType::kFloat32, {model.num_kv_heads, model.head_dim})});
  }
}

void ShadowCache::SetBalance(Backend& backend, const ShadowBalance& balance) {
  for (size_t i = 0; i < layers_.size(); ++i) {
    backend.Upload(shadows_[i].balance, balance[static_cast<size_t>(layers_[i])].data());
  }
}

void ShadowCache::Copy(Backend& backend, const std::vector<PageCopy>& copies) {
  for (const PageCopy& copy : copies) {
    for (const ShadowKeys& shadow : shadows_) {
      for (const TensorView* pages : {&shadow.codes, &shadow.scales}) {
        backend.Copy(pages->Rows(copy.to, 1), pages->Rows(copy.from, 1));
      }
    }
  }
}

MemoryItem ShadowCache::Factors(const ModelConfig& model, int64_t num_layers) {
  return {"factors of the shadow",
          Product({num_layers, model.kv_size(), DTypeBytes(DType::kFloat32)})};
}

int64_t ShadowCache::BytesPerPage(const ModelConfig& model, int64_t num_layers, int64_t page_size) {
  return Product({num_layers, page_size, model.num_kv_heads, KeyBytes(model)});
}

}  // namespace tidal
