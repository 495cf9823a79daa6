#include "tidal/plan.h"

#include <algorithm>

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
    TIDAL_CHECK(own == LayerKind::kSparse, InvalidArgument, name, ": got layer ", layer,
                ", which select_layers has too, expected it in one of the two");
    own = kind;
    previous = layer;
  }
}

}  // namespace

DecodePlan::DecodePlan(std::vector<LayerKind> kinds) : kinds_(std::move(kinds)) {
  for (int64_t layer = 0; layer < num_layers(); ++layer) {
    if (kind(layer) == LayerKind::kSelect || kind(layer) == LayerKind::kScored) {
      choosing_layers_.push_back(layer);
    }
  }
}

DecodePlan DecodePlan::Dense(int64_t num_layers) {
  TIDAL_CHECK(num_layers >= 1, InvalidArgument, "plan: got ", num_layers, " layers, expected >= 1");
  return DecodePlan(std::vector<LayerKind>(static_cast<size_t>(num_layers), LayerKind::kFull));
}

DecodePlan DecodePlan::Tidal(int64_t num_layers, int64_t full_layers,
                             const std::vector<int64_t>& select_layers,
                             const std::vector<int64_t>& scored_layers) {
  TIDAL_CHECK(!select_layers.empty() || !scored_layers.empty(), InvalidArgument,
              "select_layers: got none, and no scored_layers, expected at least one layer that "
              "chooses positions");
  TIDAL_CHECK(full_layers >= 1 && full_layers < num_layers, InvalidArgument, "full_layers: got ",
              full_layers, ", expected 1 to ", num_layers - 1, " (the model has ", num_layers,
              " layers)");
  std::vector<LayerKind> kinds(static_cast<size_t>(num_layers), LayerKind::kSparse);
  Assign("select_layers", select_layers, full_layers, LayerKind::kSelect, kinds);
  Assign("scored_layers", scored_layers, full_layers, LayerKind::kScored, kinds);
  auto first = std::find_if(kinds.begin(), kinds.end(),
                            [](LayerKind kind) { return kind != LayerKind::kSparse; });
  std::fill(kinds.begin(), first, LayerKind::kFull);
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
  for (LayerKind kind : kinds_) text += "FSPs"[static_cast<size_t>(kind)];
  return text;
}

}  // namespace tidal
