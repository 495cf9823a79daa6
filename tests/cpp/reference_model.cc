// The model in double precision (reference_model.h).
#include "reference_model.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace tidal::test {

ReferenceModel::ReferenceModel(const ModelConfig& model, const TinyModel& weights,
                               const DecodeConfig& config)
    : model_(model),
      weights_(weights),
      config_(config),
      plan_(config.select_layers.empty() && config.scored_layers.empty()
                ? DecodePlan::Dense(model.num_layers)
                : DecodePlan::Tidal(model.num_layers, config.full_layers, config.select_layers,
                                    config.scored_layers)) {}

const Values& ReferenceModel::Weight(const std::string& name) {
  const auto [entry, added] = rounded_.try_emplace(name);
  if (added) entry->second = Rounded(weights_.tensor(name).values, config_.dtype);
  return entry->second;
}

Values ReferenceModel::Project(const Values& x, const std::string& name) {
  const std::string bias = name + ".bias";
  return reference::Linear(x, Weight(name + ".weight"),
                           weights_.Find(bias) != nullptr ? Weight(bias) : Values{},
                           static_cast<int64_t>(x.size()));
}

// A projection split into heads, normalised if the model asks for it, and rotated.
Values ReferenceModel::Heads(const Values& x, const std::string& name, const std::string& norm,
                             const Values& cos_sin) {
  Values heads = Project(x, name);
  if (model_.qk_norm)
    heads = reference::RmsNorm(heads, Weight(norm + ".weight"), model_.rms_norm_eps);
  return reference::Rotate(heads, cos_sin, model_.head_dim);
}

Values ReferenceModel::Attention(int64_t layer, const Values& q, Mode mode) {
  const reference::Sequence& cache = cache_[static_cast<size_t>(layer)];
  const int64_t n = cache.seq_len(), heads = model_.num_q_heads;
  const double sm_scale = 1.0 / std::sqrt(static_cast<double>(model_.head_dim));
  const LayerKind kind = mode == Mode::kPlan ? plan_.kind(layer) : LayerKind::kFull;
  const bool reads_sets = (kind == LayerKind::kSparse || kind == LayerKind::kScored) &&
                          n > config_.token_budget && n > config_.sparse_min_context;
  Ints everything(static_cast<size_t>(n));
  std::iota(everything.begin(), everything.end(), 0);
  Values out;
  std::vector<float> scores, lse;
  const auto attend = [&](bool to_sets) {
    out.clear();
    for (int64_t head = 0; head < heads; ++head) {
      const Ints& positions =
          to_sets ? sets_[static_cast<size_t>(head) * sets_.size() / heads] : everything;
      const auto one = reference::AttendHead(&q[head * model_.head_dim], cache,
                                             head / model_.group_size(), positions, sm_scale);
      out.insert(out.end(), one.out.begin(), one.out.end());
      if (to_sets) continue;
      scores.insert(scores.end(), one.scores.begin(), one.scores.end());
      lse.push_back(static_cast<float>(one.lse));
    }
  };
  if (kind != LayerKind::kSparse || !reads_sets) attend(false);
  if (kind == LayerKind::kSelect || kind == LayerKind::kScored) {
    sets_ = reference::SelectTopK({.scores = scores.data(),
                                   .lse = lse.data(),
                                   .max_len = n,
                                   .num_q_heads = heads,
                                   .num_kv_heads = model_.num_kv_heads,
                                   .seq_len = n,
                                   .token_budget = config_.token_budget,
                                   .sink_tokens = config_.sink_tokens,
                                   .recent_tokens = config_.recent_tokens,
                                   .granularity = config_.granularity,
                                   .pooling = config_.pooling});
  }
  if (reads_sets) attend(true);
  return out;
}

Values ReferenceModel::Logits(int32_t token, Mode mode) {
  auto add = [](Values& to, const Values& what) {
    for (size_t i = 0; i < to.size(); ++i) to[i] += what[i];
  };
  const int64_t hidden = model_.hidden_size, inner = model_.intermediate_size;
  Values inv_freq;
  for (int64_t i = 0; i < model_.head_dim; i += 2) {
    inv_freq.push_back(std::pow(model_.rope.theta, -static_cast<double>(i) / model_.head_dim));
  }
  const auto position = static_cast<int32_t>(cache_[0].seq_len());
  const Values cos_sin = reference::RopeTable({position}, {0}, Rounded(inv_freq, DType::kFloat32),
                                              model_.head_dim, 1.0);
  Values x = reference::Embed({token}, Weight("model.embed_tokens.weight"), hidden);
  for (int64_t layer = 0; layer < model_.num_layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const std::string attention = prefix + "self_attn.";
    const double eps = model_.rms_norm_eps;
    Values normed = reference::RmsNorm(x, Weight(prefix + "input_layernorm.weight"), eps);
    const Values q = Heads(normed, attention + "q_proj", attention + "q_norm", cos_sin);
    const Values k = Heads(normed, attention + "k_proj", attention + "k_norm", cos_sin);
    const Values v = Project(normed, attention + "v_proj");
    reference::Sequence& cache = cache_[static_cast<size_t>(layer)];
    cache.k.insert(cache.k.end(), k.begin(), k.end());
    cache.v.insert(cache.v.end(), v.begin(), v.end());
    add(x, Project(Attention(layer, q, mode), attention + "o_proj"));
    normed = reference::RmsNorm(x, Weight(prefix + "post_attention_layernorm.weight"), eps);
    Values gate_up = Project(normed, prefix + "mlp.gate_proj");
    const Values up = Project(normed, prefix + "mlp.up_proj");
    gate_up.insert(gate_up.end(), up.begin(), up.end());
    add(x, Project(reference::GateMul(gate_up, inner), prefix + "mlp.down_proj"));
  }
  const std::string head = model_.tie_word_embeddings ? "model.embed_tokens" : "lm_head";
  return Project(reference::RmsNorm(x, Weight("model.norm.weight"), model_.rms_norm_eps), head);
}

void ReferenceModel::Clear() {
  cache_.assign(static_cast<size_t>(model_.num_layers),
                {model_.num_kv_heads, model_.head_dim, {}, {}});
}

Values ReferenceModel::DecodeLogits(const Ints& token_ids, int64_t num_prefill) {
  Clear();
  Values logits;
  for (size_t i = 0; i < token_ids.size(); ++i) {
    const bool prompt = static_cast<int64_t>(i) < num_prefill;
    const Values row = Logits(token_ids[i], prompt ? Mode::kDense : Mode::kPlan);
    if (static_cast<int64_t>(i) + 1 >= num_prefill) {
      logits.insert(logits.end(), row.begin(), row.end());
    }
  }
  return logits;
}

Ints ReferenceModel::Turn(const Ints& prompt, int64_t max_new_tokens) {
  if (cache_.empty()) Clear();
  unread_.insert(unread_.end(), prompt.begin(), prompt.end());
  Values logits;
  for (int32_t token : unread_) logits = Logits(token, Mode::kDense);
  Ints chosen;
  while (true) {
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    chosen.push_back(static_cast<int32_t>(best));
    if (static_cast<int64_t>(chosen.size()) == max_new_tokens) break;
    logits = Logits(chosen.back(), Mode::kPlan);
  }
  unread_ = {chosen.back()};
  return chosen;
}

}  // namespace tidal::test
