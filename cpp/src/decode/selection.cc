#include "decode/selection.h"

#include <algorithm>
#include <numeric>

namespace tidal {

Selection::Selection(Backend& backend, const ModelConfig& model, const DecodeConfig& config,
                     const DecodePlan& plan)
    : config_(config),
      choosing_layers_(plan.choosing_layers()),
      num_kv_heads_(model.num_kv_heads),
      num_sets_(NumSets(config.granularity, model.num_q_heads, model.num_kv_heads)),
      dense_len_(std::max(config.top_p_mass < 1.0 ? config.min_token_budget : config.token_budget,
                          config.sparse_min_context)),
      tensors_(backend, "selection") {
  if (plan.is_dense()) return;
  int64_t b = config.max_batch_size;
  // One layer after the other: the scores of all lie in one place.
  std::vector<DType> dtypes;
  for (int64_t layer : choosing_layers_) {
    const bool by_shadow = plan.kind(layer) == LayerKind::kScored && config.shadow != Shadow::kNone;
    dtypes.push_back(by_shadow ? backend.shadow_score_dtype() : DType::kFloat32);
  }
  const DType widest = *std::max_element(dtypes.begin(), dtypes.end(), [](DType one, DType other) {
    return DTypeBytes(one) < DTypeBytes(other);
  });
  const TensorView scores = tensors_.Make(widest, {b, model.num_q_heads, config.max_seq_len});
  for (DType dtype : dtypes) {
    scores_.push_back(scores);
    scores_.back().dtype = dtype;
  }
  lse_ = tensors_.Make(DType::kFloat32, {b, model.num_q_heads});
  for (size_t i = 0; i < choosing_layers_.size(); ++i) {
    token_idx_.push_back(tensors_.Make(DType::kInt32, {b, num_sets_, config.token_budget}));
    num_selected_.push_back(tensors_.Make(DType::kInt32, {b, num_sets_}));
  }
}

AttentionSelectArgs Selection::SelectArgs(int64_t ordinal, const AttentionArgs& attention) const {
  int64_t b = attention.q.dim(0);
  return {.attention = attention, .scores = Scores(ordinal, b), .lse = lse_.Rows(0, b)};
}

ScoreKeysArgs Selection::ScoreArgs(int64_t ordinal, const AttentionArgs& attention,
                                   const ShadowKeys& shadow) const {
  int64_t b = attention.q.dim(0);
  return {.q = attention.q,
          .kv = attention.kv,
          .shadow = shadow,
          .rule = attention.rule,
          .scores = Scores(ordinal, b),
          .lse = lse_.Rows(0, b)};
}

SelectTopKArgs Selection::TopKArgs(int64_t ordinal, const AttentionArgs& attention) const {
  int64_t b = attention.q.dim(0);
  return {.scores = Scores(ordinal, b),
          .lse = lse_.Rows(0, b),
          .seq_lens = attention.kv.seq_lens,
          .num_kv_heads = num_kv_heads_,
          .granularity = config_.granularity,
          .pooling = config_.pooling,
          .sink_tokens = config_.sink_tokens,
          .recent_tokens = config_.recent_tokens,
          .top_p_mass = static_cast<float>(config_.top_p_mass),
          .min_tokens = config_.min_token_budget,
          .token_idx = token_idx_[static_cast<size_t>(ordinal)].Rows(0, b),
          .num_selected = num_selected_[static_cast<size_t>(ordinal)].Rows(0, b)};
}

AttentionSparseArgs Selection::SparseArgs(int64_t ordinal, const AttentionArgs& attention) const {
  int64_t b = attention.q.dim(0);
  return {.attention = attention,
          .token_idx = token_idx_[static_cast<size_t>(ordinal)].Rows(0, b),
          .num_selected = num_selected_[static_cast<size_t>(ordinal)].Rows(0, b),
          .set_sizes = config_.top_p_mass < 1.0 ? SetSizes::kRagged : SetSizes::kEqual,
          // A row alone takes sparse steps only when it is longer.
          .dense_len = b == 1 ? 0 : dense_len_};
}

std::vector<ChosenSets> Selection::CountSets(Backend& backend, int64_t num_rows) const {
  std::vector<ChosenSets> rows(static_cast<size_t>(num_rows));
  std::vector<int32_t> sizes(static_cast<size_t>(num_rows * num_sets_));
  for (const TensorView& num_selected : num_selected_) {
    backend.Download(sizes.data(), num_selected.Rows(0, num_rows));
    auto begin = sizes.begin();
    for (ChosenSets& row : rows) {
      row.num_sets += num_sets_;
      row.num_positions = std::accumulate(begin, begin + num_sets_, row.num_positions);
      begin += num_sets_;
    }
  }
  return rows;
}

std::vector<LayerSelection> Selection::Read(Backend& backend, int64_t row) const {
  std::vector<LayerSelection> chosen;
  int64_t budget = config_.token_budget;
  std::vector<int32_t> sets(static_cast<size_t>(num_sets_ * budget));
  std::vector<int32_t> sizes(static_cast<size_t>(num_sets_));
  for (size_t i = 0; i < choosing_layers_.size(); ++i) {
    backend.Download(sets.data(), token_idx_[i].Rows(row, 1));
    backend.Download(sizes.data(), num_selected_[i].Rows(row, 1));
    int64_t num_selected = *std::max_element(sizes.begin(), sizes.end());
    LayerSelection layer{.layer = choosing_layers_[i],
                         .num_sets = num_sets_,
                         .num_selected = num_selected,
                         .token_idx = {}};
    for (int64_t set = 0; set < num_sets_; ++set) {
      auto begin = sets.begin() + set * budget;
      layer.token_idx.insert(layer.token_idx.end(), begin, begin + num_selected);
    }
    chosen.push_back(std::move(layer));
  }
  return chosen;
}

}  // namespace tidal
