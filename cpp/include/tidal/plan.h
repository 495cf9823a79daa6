// DecodePlan: which layers look at the whole cache, which choose positions, which follow.
//
// TidalDecode (arXiv 2410.05076, section 3): a few token-selection layers score every cached
// position, the layers after them attend only to what was chosen.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tidal/config.h"

namespace tidal {

enum class LayerKind : int32_t {
  kFull,    // F: dense attention over all positions
  kSelect,  // S: dense attention, whose scores also choose a set of positions
  kScored,  // P: scores all keys to choose a set, then attends to that set only
  kSparse,  // s: attention over the last chosen set only
  kWindow,  // w: the model attends to the last tokens only, whatever the plan
};

// The layers that a plan is for.
struct PlanLayers {
  int64_t count = 0;
  std::vector<int64_t> windows;  // those with a window, ascending

  PlanLayers(int64_t num_layers) : count(num_layers) {}  // NOLINT: all attend to everything
  explicit PlanLayers(const ModelConfig& model);
};

// Names a plan that an engine can run, one of the two here or one that was added to them. The name
// of one that has gone is never given again.
enum class PlanId : int64_t {
  kDense,    // every layer full
  kDecoder,  // the plan of the decoder's settings
};

// One LayerKind per layer; an immutable value, valid by construction.
class DecodePlan {
 public:
  // Every layer full, but for those with a window: dense decoding, through the same code.
  static DecodePlan Dense(const PlanLayers& layers);

  // Layers before `full_layers` are full, those in `select_layers` select, those in
  // `scored_layers` are scored, all others are sparse; layers between `full_layers` and the first
  // that chooses are full too (nothing is chosen yet). Those with a window are none of these.
  // Throws InvalidArgument if both lists are empty, one is not strictly ascending or not within
  // [full_layers, num_layers), or a layer is in both or has a window, or if full_layers < 1.
  static DecodePlan Tidal(const PlanLayers& layers, int64_t full_layers,
                          const std::vector<int64_t>& select_layers,
                          const std::vector<int64_t>& scored_layers = {});

  int64_t num_layers() const { return static_cast<int64_t>(kinds_.size()); }
  LayerKind kind(int64_t layer) const { return kinds_[static_cast<size_t>(layer)]; }
  bool is_dense() const { return choosing_layers_.empty(); }
  // The layers that choose a set, S and P, ascending.
  const std::vector<int64_t>& choosing_layers() const { return choosing_layers_; }

  // The layers of one kind, ascending.
  std::vector<int64_t> LayersOf(LayerKind kind) const;

  // "FFSsssPsss": one letter per layer.
  std::string ToString() const;

 private:
  explicit DecodePlan(std::vector<LayerKind> kinds);

  std::vector<LayerKind> kinds_;
  std::vector<int64_t> choosing_layers_;
};

}  // namespace tidal
