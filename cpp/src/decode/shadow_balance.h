// The factors of a model's shadow keys (core/shadow_code.h), measured on tokens drawn at random:
// which channels are large is a matter of the weights, hardly of the text (docs/quality.md).
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/backend.h"
#include "decode/runner_buffers.h"
#include "kv/paged_kv_cache.h"
#include "kv/shadow_cache.h"
#include "model/weights.h"

namespace tidal {

// Tokens that are read for it, where a sequence has room for as many.
inline constexpr int64_t kBalanceTokens = 256;
inline int64_t NumBalanceTokens(const DecodeConfig& config) {
  return std::min(kBalanceTokens, config.max_seq_len);
}

// Pages to read them into, apart from the decoder's own, which may be full.
PagedKvCache MakeBalancePages(Backend& backend, const ModelConfig& model,
                              const DecodeConfig& config);

struct BalanceInputs {
  const ModelConfig& model;
  const ModelWeights& weights;
  float rope_scaling;  // RopeFrequencies::attention_scaling
  int64_t num_tokens;
  int64_t chunk;  // of them that are read together, at most what a prefill pass has room for
  RunnerBuffers& buffers;  // of which a pass is used
};

// Measures sqrt(rms k / rms q) of each layer and channel, k and q rotated. Reads the tokens into
// pages of `cache`, which are free again afterwards.
ShadowBalance MeasureShadowBalance(Backend& backend, PagedKvCache& cache,
                                   const BalanceInputs& inputs);

}  // namespace tidal
