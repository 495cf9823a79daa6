// Rotary position embedding: from a checkpoint's parameters to the frequencies of one sequence.
#pragma once

#include <cstdint>
#include <vector>

#include "tidal/config.h"

namespace tidal {

struct RopeFrequencies {
  std::vector<float> inv_freq;     // [head_dim / 2]; 0 for dims that do not turn
  float attention_scaling = 1.0f;  // multiplies cos and sin
};

// Dim i turns with dim i + head_dim / 2, the first rotary_dim / 2 of them: the loader puts the rows
// of q and k so (model/weights.cc). `seq_len`: the length that decides for the types that depend on
// length (dynamic, longrope). Keys are cached rotated, so a sequence keeps one set of frequencies:
// those of its prompt, or of the declared length of a session.
RopeFrequencies ComputeRope(const ModelConfig& model, int64_t seq_len);

// Those of layers with a window, if the model has them apart.
RopeFrequencies ComputeWindowRope(const ModelConfig& model);

}  // namespace tidal
