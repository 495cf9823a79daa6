// The weights of a model on a backend: named tensors in, device layout out, every shape checked.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "tidal/config.h"
#include "tidal/weights.h"

namespace tidal {

// Norms are float32 where ModelConfig::norm_offset was added to them.
struct LayerWeights {
  TensorView input_norm;  // [H], or absent
  Weight qkv;             // [(Hq + 2 Hkv) * D, H]: q_proj, k_proj, v_proj stacked
  TensorView qkv_bias;    // [(Hq + 2 Hkv) * D], or absent
  TensorView q_norm;      // [D], of all heads [Hq * D], or absent
  TensorView k_norm;      // [D], of all heads [Hkv * D], or absent
  TensorView sinks;       // [Hq] float32, or absent
  Weight o;               // [H, Hq * D]
  TensorView o_bias;      // [H], or absent
  TensorView post_norm;   // [H], or absent
  // The MLP; in a layer with experts the one that all tokens have, or absent.
  Weight gate_up;           // [2 I, H]: gate_proj, up_proj stacked
  TensorView gate_up_bias;  // [2 I], or absent
  Weight down;              // [H, I]
  TensorView down_bias;     // [H], or absent
  TensorView o_norm;        // [H]: of what attention adds, or absent
  TensorView down_norm;     // [H]: of what the MLP adds, or absent
  // A layer with experts has these; I' is their intermediate size.
  TensorView router;                // [E, H], of numbers
  TensorView router_bias;           // [E], or absent
  TensorView router_correction;     // [E] float32, or absent
  TensorView shared_gate;           // [1, H], of numbers, or absent
  Weight experts_gate_up;           // [E * 2 I', H]: expert by expert gate_proj, up_proj stacked
  TensorView experts_gate_up_bias;  // [E * 2 I'], or absent
  Weight experts_down;              // [E * H, I']
  TensorView experts_down_bias;     // [E * H], or absent
};

struct ModelWeights {
  TensorView embedding;  // [V, H]
  std::vector<LayerWeights> layers;
  TensorView final_norm;  // [H]
  Weight lm_head;         // [V, H]; if tied, and not in codes of its own, the embedding itself

  std::vector<Buffer> buffers;  // own all of the above
  int64_t bytes = 0;
};

struct WeightShape {
  std::string name;  // in a checkpoint
  std::vector<int64_t> shape;
};

// Every tensor the config calls for, in the order in which it is loaded.
std::vector<WeightShape> ExpectedWeights(const ModelConfig& model);

// What the weights take of a device.
struct WeightMemory {
  int64_t bytes = 0;
  // The largest matrix of a layer that stays in codes, experts left out, as numbers.
  int64_t decoded_bytes = 0;
  // Most inputs of a matrix whose products quantizes_inputs; 0: there is none.
  int64_t quantized_inputs = 0;
};
WeightMemory MeasureWeights(const Backend& backend, const ModelConfig& model, DType dtype,
                            const WeightSource& source);

// Reads every weight the config calls for and uploads it: in codes what the source has in codes
// that the backend's products read, all else as numbers of `dtype`.
// Throws WeightsError for a missing tensor, a wrong shape or an unreadable file.
ModelWeights LoadWeights(Backend& backend, const ModelConfig& model, DType dtype,
                         const WeightSource& source, const LoadProgress& progress);

}  // namespace tidal
