// The sizes of the layer whose ops a test runs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tidal/config.h"

namespace tidal::test {

// Gives a model the sizes of a shape, which calls them as ModelConfig does. The head is as wide as
// the MLP.
template <typename Shape>
void SetLayerSizes(const Shape& shape, ModelConfig& model) {
  model.hidden_size = shape.hidden_size;
  model.intermediate_size = shape.intermediate_size;
  model.vocab_size = shape.intermediate_size;
  model.num_q_heads = shape.num_q_heads;
  model.num_kv_heads = shape.num_kv_heads;
  model.head_dim = shape.head_dim;
}

// Gives a model whose every size is at least that of a product with so many inputs and outputs.
inline void SetProductSizes(int64_t in_features, int64_t out_features, ModelConfig& model) {
  model.hidden_size = std::max(in_features, out_features);
  model.intermediate_size = model.vocab_size = model.hidden_size;
}

}  // namespace tidal::test
