// Selection: the positions chosen in a step. Written by a layer that chooses (S or P), read by a
// scored layer itself and by the sparse layers after it until the next that chooses.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "backend/device_tensors.h"
#include "tidal/plan.h"
#include "tidal/request.h"

namespace tidal {

class Selection {
 public:
  // A dense plan allocates nothing.
  Selection(Backend& backend, const ModelConfig& model, const DecodeConfig& config,
            const DecodePlan& plan);

  // Rows of at most this length attend to everything, whatever the plan.
  int64_t dense_len() const { return dense_len_; }

  // `ordinal`: the how-manieth choosing layer of the plan this is, from 0.
  AttentionSelectArgs SelectArgs(int64_t ordinal, const AttentionArgs& attention) const;
  // Without a shadow: from the keys themselves.
  ScoreKeysArgs ScoreArgs(int64_t ordinal, const AttentionArgs& attention,
                          const ShadowKeys& shadow = {}) const;

  SelectTopKArgs TopKArgs(int64_t ordinal, const AttentionArgs& attention) const;
  AttentionSparseArgs SparseArgs(int64_t ordinal, const AttentionArgs& attention) const;

  // The sets of each of the first num_rows rows in the last sparse step, of all layers.
  std::vector<ChosenSets> CountSets(Backend& backend, int64_t num_rows) const;

  // What every choosing layer chose for a row of the last sparse step.
  std::vector<LayerSelection> Read(Backend& backend, int64_t row) const;

 private:
  TensorView Scores(int64_t ordinal, int64_t num_rows) const {
    return scores_[static_cast<size_t>(ordinal)].Rows(0, num_rows);
  }

  DecodeConfig config_;
  std::vector<int64_t> choosing_layers_;
  int64_t num_kv_heads_;
  int64_t num_sets_;
  int64_t dense_len_;
  DeviceTensors tensors_;
  TensorView lse_;  // [max_batch_size, Hq] float32
  // One a choosing layer.
  std::vector<TensorView> scores_;        // [max_batch_size, Hq, max_seq_len], all in one place
  std::vector<TensorView> token_idx_;     // [max_batch_size, num_sets, token_budget] int32
  std::vector<TensorView> num_selected_;  // [max_batch_size, num_sets] int32
};

}  // namespace tidal
