#include "tidal/plan.h"

#include "tidal/error.h"

namespace tidal {

DecodePlan DecodePlan::Dense(int64_t num_layers) {
  TIDAL_CHECK(num_layers >= 1, InvalidArgument, "plan: got ", num_layers, " layers, expected >= 1");
  return DecodePlan(std::vector<LayerKind>(static_cast<size_t>(num_layers), LayerKind::kFull), {});
}

DecodePlan DecodePlan::Tidal(int64_t num_layers, int64_t full_layers,
                             const std::vector<int64_t>& select_layers) {
  TIDAL_CHECK(!select_layers.empty(), InvalidArgument,
              "select_layers: got none, expected at least one layer that chooses positions");
  TIDAL_CHECK(full_layers >= 1 && full_layers < num_layers, InvalidArgument, "full_layers: got ",
              full_layers, ", expected 1 to ", num_layers - 1, " (the model has ", num_layers,
              " layers)");
  int64_t previous = full_layers - 1;
  for (int64_t layer : select_layers) {
    TIDAL_CHECK(layer > previous && layer < num_layers, InvalidArgument,
                "select_layers: got layer ", layer, " after ", previous,
                ", expected strictly ascending layers from ", full_layers, " (full_layers) to ",
                num_layers - 1);
    previous = layer;
  }
  std::vector<LayerKind> kinds(static_cast<size_t>(num_layers), LayerKind::kSparse);
  for (int64_t layer = 0; layer < select_layers.front(); ++layer) {
    kinds[static_cast<size_t>(layer)] = LayerKind::kFull;
  }
  for (int64_t layer : select_layers) kinds[static_cast<size_t>(layer)] = LayerKind::kSelect;
  return DecodePlan(std::move(kinds), select_layers);
}

std::string DecodePlan::ToString() const {
  std::string text;
  for (LayerKind kind : kinds_) {
    text += kind == LayerKind::kFull ? 'F' : kind == LayerKind::kSelect ? 'S' : 's';
  }
  return text;
}

}  // namespace tidal
