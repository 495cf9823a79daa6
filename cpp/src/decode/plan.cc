#include "tidal/plan.h"

#include <utility>

#include "tidal/error.h"

namespace tidal {
namespace {

// Sets the kind of the layers of one setting, which `name` names.
void Assign(const char* name, const std::vector<int64_t>& layers, int64_t full_layers,
            LayerKind kind, std::vector<LayerKind>& kinds) {
  const auto num_layers = static_cast<int64_t>(kinds.size());
  int64_t previous = full_layers - 1;
  for (int64_t layer : layers) {
    TIDAL_CHECK(layer > previous && layer < num_layers, InvalidArgument, name, ": got layer ",
                layer, " after ", previous, ", expected strictly ascending layers from ",
                full_layers, " (full_layers) to ", num_layers - 1);
    LayerKind& own = kinds[static_cast<size_t>(layer)];
    TIDAL_CHECK(own != LayerKind::kWindow, InvalidArgument, name, ": got layer ", layer,
                ", which has a window, expected layers that attend to everything");
    TIDAL_CHECK(own == LayerKind::kSparse, InvalidArgument, name, ": got layer ", layer,
                ", which select_layers has too, expected it in one of the two");
    own = kind;
    previous = layer;
  }
}

// All of one kind but for those with a window.
std::vector<LayerKind> KindsOf(const PlanLayers& layers, LayerKind kind) {
  std::vector<LayerKind> kinds(static_cast<size_t>(layers.count), kind);
  for (int64_t layer : layers.windows) kinds[static_cast<size_t>(layer)] = LayerKind::kWindow;
  return kinds;
}

}  // namespace

PlanLayers::PlanLayers(const ModelConfig& model) : count(model.num_layers) {
  for (int64_t layer = 0; layer < count; ++layer) {
    if (model.layer(layer).window > 0) windows.push_back(layer);
  }
}

DecodePlan::DecodePlan(std::vector<LayerKind> kinds) : kinds_(std::move(kinds)) {
  for (int64_t layer = 0; layer < num_layers(); ++layer) {
    if (kind(layer) == LayerKind::kSelect || kind(layer) == LayerKind::kScored) {
      choosing_layers_.push_back(layer);
    }
  }
}

DecodePlan DecodePlan::Dense(const PlanLayers& layers) {
  TIDAL_CHECK(layers.count >= 1, InvalidArgument, "plan: got ", layers.count,
              " layers, expected >= 1");
  return DecodePlan(KindsOf(layers, LayerKind::kFull));
}

DecodePlan DecodePlan::Tidal(const PlanLayers& layers, int64_t full_layers,
                             const std::vector<int64_t>& select_layers,
                             const std::vector<int64_t>& scored_layers) {
  TIDAL_CHECK(!select_layers.empty() || !scored_layers.empty(), InvalidArgument,
              "select_layers: got none, and no scored_layers, expected at least one layer that "
              "chooses positions");
  TIDAL_CHECK(full_layers >= 1 && full_layers < layers.count, InvalidArgument, "full_layers: got ",
              full_layers, ", expected 1 to ", layers.count - 1, " (the model has ", layers.count,
              " layers)");
  std::vector<LayerKind> kinds = KindsOf(layers, LayerKind::kSparse);
  Assign("select_layers", select_layers, full_layers, LayerKind::kSelect, kinds);
  Assign("scored_layers", scored_layers, full_layers, LayerKind::kScored, kinds);
  for (LayerKind& kind : kinds) {
    if (kind == LayerKind::kSelect || kind == LayerKind::kScored) break;
    if (kind == LayerKind::kSparse) kind = LayerKind::kFull;
  }
  return DecodePlan(std::move(kinds));
}

std::vector<int64_t> DecodePlan::LayersOf(LayerKind wanted) const {
  std::vector<int64_t> layers;
  for (int64_t layer = 0; layer < num_layers(); ++layer) {
    if (kind(layer) == wanted) layers.push_back(layer);
  }
  return layers;
}

std::string DecodePlan::ToString() const {
  std::string text;
  for (LayerKind kind : kinds_) text += "FSPsw"[static_cast<size_t>(kind)];
  return text;
}

}  // namespace tidal
