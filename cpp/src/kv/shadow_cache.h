// ShadowCache: the keys of the layers that score them, in 4 bits (core/shadow_code.h), in pages
// that are numbered as the cache's. Filled from the cache before a step needs it.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "kv/sequence_pages.h"
#include "tidal/plan.h"

namespace tidal {

// By layer, and KV head and channel within: [num_layers][Hkv * D] factors (ShadowKeys::balance).
using ShadowBalance = std::vector<std::vector<float>>;

class ShadowCache {
 public:
  // Allocates pages for `layers` (ascending) of `plan` on `backend`. Throws OutOfMemoryError.
  ShadowCache(PlanId plan, Backend& backend, const ModelConfig& model, std::vector<int64_t> layers,
              int64_t num_pages, int64_t page_size);

  PlanId plan() const { return plan_; }
  const std::vector<int64_t>& layers() const { return layers_; }
  // The shadow of layers()[ordinal].
  const ShadowKeys& Layer(size_t ordinal) const { return shadows_[ordinal]; }

  // Sets the factors of all its layers; what was written before is of no use then.
  void SetBalance(Backend& backend, const ShadowBalance& balance);

  // Whole pages, in every layer.
  void Copy(Backend& backend, const std::vector<PageCopy>& copies);

  // Bytes of the factors of num_layers layers, apart from the pages.
  static MemoryItem Factors(const ModelConfig& model, int64_t num_layers);
  // Bytes of one page over num_layers layers.
  static int64_t BytesPerPage(const ModelConfig& model, int64_t num_layers, int64_t page_size);

 private:
  PlanId plan_;
  std::vector<int64_t> layers_;
  Buffer factors_;               // balance of all layers
  std::vector<Buffer> buffers_;  // one a layer: scales, codes
  std::vector<ShadowKeys> shadows_;
};

}  // namespace tidal
