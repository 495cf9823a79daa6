#include "decode/transformer.h"

#include <cmath>

namespace tidal {

Transformer::Transformer(Backend& backend, const ModelConfig& model, const ModelWeights& weights,
                         const PagedKvCache& cache, float rope_scaling)
    : backend_(backend),
      model_(model),
      weights_(weights),
      cache_(cache),
      rope_scaling_(rope_scaling),
      sm_scale_(static_cast<float>(model.attention_scale > 0.0
                                       ? model.attention_scale
                                       : 1.0 / std::sqrt(static_cast<double>(model.head_dim)))),
      embedding_scale_(static_cast<float>(model.embedding_scale / model.residual_scale)),
      norm_eps_(
          static_cast<float>(model.rms_norm_eps / (model.residual_scale * model.residual_scale))) {}

void Transformer::Begin(const Pass& pass) const {
  backend_.Embed({.token_ids = pass.token_ids,
                  .table = weights_.embedding,
                  .out = pass.hidden,
                  .scale = embedding_scale_});
  RopeTableArgs table = {.positions = pass.positions,
                         .seq_idx = pass.seq_idx,
                         .inv_freq = pass.inv_freq,
                         .attention_scaling = rope_scaling_,
                         .cos_sin = pass.cos_sin};
  backend_.RopeTable(table);
  if (!pass.still_cos_sin) return;
  table.inv_freq = pass.still_freq;
  table.cos_sin = pass.still_cos_sin;
  backend_.RopeTable(table);
}

void Transformer::BeginAttention(int64_t layer, const Pass& pass) const {
  const LayerWeights& w = weights_.layers[static_cast<size_t>(layer)];
  backend_.QkvRopeAppend({
      .norm = {.x = pass.hidden, .weight = w.input_norm, .out = pass.normed, .eps = norm_eps_},
      .linear = {.x = pass.normed, .weight = w.qkv, .bias = w.qkv_bias, .out = pass.qkv},
      .append = {.qkv = pass.qkv,
                 .cos_sin = model_.layer(layer).has_rope ? pass.cos_sin : pass.still_cos_sin,
                 .q_norm = w.q_norm,
                 .k_norm = w.k_norm,
                 .norm_eps = static_cast<float>(model_.rms_norm_eps),
                 .positions = pass.positions,
                 .seq_idx = pass.seq_idx,
                 .q = pass.q,
                 .kv = Cache(layer, pass)},
  });
}

void Transformer::FinishLayer(int64_t layer, const Pass& pass) const {
  const LayerWeights& w = weights_.layers[static_cast<size_t>(layer)];
  TensorView attention_out(pass.attention_out.ptr, pass.attention_out.dtype,
                           {pass.attention_out.dim(0), model_.q_size()});
  AddBranch({.x = attention_out, .weight = w.o, .bias = w.o_bias, .out = {}}, w.o_norm, pass);
  backend_.GateUpSiluMul({
      .norm = {.x = pass.hidden, .weight = w.post_norm, .out = pass.normed, .eps = norm_eps_},
      .linear =
          {.x = pass.normed, .weight = w.gate_up, .bias = w.gate_up_bias, .out = pass.gate_up},
      .silu_mul = {.gate_up = pass.gate_up, .out = pass.mlp},
  });
  AddBranch({.x = pass.mlp, .weight = w.down, .bias = w.down_bias, .out = {}}, w.down_norm, pass);
}

void Transformer::AddBranch(LinearArgs product, const TensorView& norm, const Pass& pass) const {
  if (!norm) {
    product.out = pass.hidden;
    product.output = LinearOutput::kAccumulate;
    backend_.Linear(product);
    return;
  }
  product.out = pass.branch;
  backend_.Linear(product);
  backend_.RmsNorm(
      {.x = pass.branch, .weight = norm, .out = pass.hidden, .eps = norm_eps_, .adds = true});
}

void Transformer::Logits(const TensorView& hidden, const TensorView& normed,
                         const TensorView& logits) const {
  backend_.NormLinear({
      .norm = {.x = hidden, .weight = weights_.final_norm, .out = normed, .eps = norm_eps_},
      .linear = {.x = normed, .weight = weights_.lm_head, .bias = {}, .out = logits},
  });
  if (model_.logit_scale != 1.0) {
    backend_.ScaleLogits({logits, static_cast<float>(model_.logit_scale)});
  }
}

}  // namespace tidal
