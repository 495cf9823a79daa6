// The weights of a model on a backend: named tensors in, device layout out, every shape checked.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "tidal/config.h"
#include "tidal/weights.h"

namespace tidal {

struct LayerWeights {
  TensorView input_norm;    // [H]
  TensorView qkv;           // [(Hq + 2 Hkv) * D, H]: q_proj, k_proj, v_proj stacked
  TensorView qkv_bias;      // [(Hq + 2 Hkv) * D], or absent
  TensorView q_norm;        // [D], or absent
  TensorView k_norm;        // [D], or absent
  TensorView o;             // [H, Hq * D]
  TensorView o_bias;        // [H], or absent
  TensorView post_norm;     // [H]
  TensorView gate_up;       // [2 I, H]: gate_proj, up_proj stacked
  TensorView gate_up_bias;  // [2 I], or absent
  TensorView down;          // [H, I]
  TensorView down_bias;     // [H], or absent
};

struct ModelWeights {
  TensorView embedding;  // [V, H]
  std::vector<LayerWeights> layers;
  TensorView final_norm;  // [H]
  TensorView lm_head;     // [V, H]; the embedding itself if tied

  std::vector<Buffer> buffers;  // own all of the above
  int64_t bytes = 0;
};

struct WeightShape {
  std::string name;  // in a checkpoint
  std::vector<int64_t> shape;
};

// Every tensor the config calls for, in the order in which it is loaded.
std::vector<WeightShape> ExpectedWeights(const ModelConfig& model);

// Of all of them on the device.
int64_t WeightBytes(const ModelConfig& model, DType dtype);

// Reads every weight the config calls for, converts it to `dtype` and uploads it.
// Throws WeightsError for a missing tensor, a wrong shape or an unreadable file.
ModelWeights LoadWeights(Backend& backend, const ModelConfig& model, DType dtype,
                         const WeightSource& source, const LoadProgress& progress);

}  // namespace tidal
