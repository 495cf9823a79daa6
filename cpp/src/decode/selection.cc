#include "decode/selection.h"

#include <algorithm>

namespace tidal {

Selection::Selection(Backend& backend, const ModelConfig& model, const DecodeConfig& config,
                     const DecodePlan& plan)
    : config_(config),
      select_layers_(plan.select_layers()),
      num_kv_heads_(model.num_kv_heads),
      num_sets_(NumSets(config.granularity, model.num_q_heads, model.num_kv_heads)),
      dense_len_(std::max(config.token_budget, config.sparse_min_context)),
      tensors_(backend, "selection") {
  if (plan.is_dense()) return;
  int64_t b = config.max_batch_size;
  scores_ = tensors_.Make(DType::kFloat32, {b, model.num_q_heads, config.max_seq_len});
  lse_ = tensors_.Make(DType::kFloat32, {b, model.num_q_heads});
  num_selected_ = tensors_.Make(DType::kInt32, {b});
  for (size_t i = 0; i < select_layers_.size(); ++i) {
    token_idx_.push_back(tensors_.Make(DType::kInt32, {b, num_sets_, config.token_budget}));
  }
}

AttentionSelectArgs Selection::SelectArgs(const AttentionArgs& attention) const {
  int64_t b = attention.q.dim(0);
  return {.attention = attention, .scores = scores_.Rows(0, b), .lse = lse_.Rows(0, b)};
}

SelectTopKArgs Selection::TopKArgs(int64_t ordinal, const AttentionArgs& attention) const {
  int64_t b = attention.q.dim(0);
  return {.scores = scores_.Rows(0, b),
          .lse = lse_.Rows(0, b),
          .seq_lens = attention.kv.seq_lens,
          .num_kv_heads = num_kv_heads_,
          .granularity = config_.granularity,
          .pooling = config_.pooling,
          .sink_tokens = config_.sink_tokens,
          .recent_tokens = config_.recent_tokens,
          .token_idx = token_idx_[static_cast<size_t>(ordinal)].Rows(0, b),
          .num_selected = num_selected_.Rows(0, b)};
}

AttentionSparseArgs Selection::SparseArgs(int64_t ordinal, const AttentionArgs& attention) const {
  int64_t b = attention.q.dim(0);
  return {.attention = attention,
          .token_idx = token_idx_[static_cast<size_t>(ordinal)].Rows(0, b),
          .num_selected = num_selected_.Rows(0, b),
          // A row alone takes sparse steps only when it is longer.
          .dense_len = b == 1 ? 0 : dense_len_};
}

std::vector<LayerSelection> Selection::Read(Backend& backend, int64_t row, int64_t seq_len) const {
  std::vector<LayerSelection> chosen;
  int64_t budget = config_.token_budget;
  int64_t num_selected = std::min(budget, seq_len);
  std::vector<int32_t> sets(static_cast<size_t>(num_sets_ * budget));
  for (size_t i = 0; i < select_layers_.size(); ++i) {
    backend.Download(sets.data(), token_idx_[i].Rows(row, 1));
    LayerSelection layer{.layer = select_layers_[i],
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
