#include "decode/transformer.h"

#include <cmath>

#include "model/rope.h"

namespace tidal {
namespace {

// The product of one of a layer's matrices, as the pass has them.
LinearArgs InPass(LinearArgs product, const Pass& pass) {
  product.quantizes_inputs = pass.quantizes_inputs && product.weight.quantizes_inputs;
  return product;
}

}  // namespace

Transformer::Transformer(Backend& backend, const ModelConfig& model, const ModelWeights& weights,
                         const PagedKvCache& cache, float rope_scaling)
    : backend_(backend),
      model_(model),
      weights_(weights),
      cache_(cache),
      rope_scaling_({rope_scaling,
                     model.window_rope ? ComputeWindowRope(model).attention_scaling : 1.0f, 1.0f}),
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
  for (size_t kind = 0; kind < kNumRotations; ++kind) {
    const Rotation& rotation = pass.rotations[kind];
    if (!rotation.cos_sin) continue;
    backend_.RopeTable({.positions = pass.positions,
                        .seq_idx = pass.seq_idx,
                        .inv_freq = rotation.inv_freq,
                        .attention_scaling = rope_scaling_[kind],
                        .cos_sin = rotation.cos_sin,
                        .q_cos_sin = rotation.q_cos_sin,
                        .query_scale_beta = static_cast<float>(model_.rope.query_scale_beta),
                        .original_len = model_.rope.original_max_position_embeddings});
  }
}

AttentionRule Transformer::Rule(int64_t layer) const {
  return {.sm_scale = sm_scale_,
          .softcap = static_cast<float>(model_.attention_softcap),
          .window = model_.layer(layer).window,
          .sinks = weights_.layers[static_cast<size_t>(layer)].sinks};
}

RmsNormArgs Transformer::InputNorm(const TensorView& weight, const Pass& pass) const {
  return {.x = pass.hidden, .weight = weight, .out = pass.normed, .eps = norm_eps_};
}

void Transformer::BeginAttention(int64_t layer, const Pass& pass, Appended appended) const {
  const LayerWeights& w = weights_.layers[static_cast<size_t>(layer)];
  const Rotation& rotation = pass.rotation(RotationOf(model_, layer));
  backend_.QkvRopeAppend({
      .norm = InputNorm(w.input_norm, pass),
      .linear =
          InPass({.x = pass.normed, .weight = w.qkv, .bias = w.qkv_bias, .out = pass.qkv}, pass),
      .append = {.qkv = pass.qkv,
                 .cos_sin = rotation.cos_sin,
                 .q_norm = w.q_norm,
                 .k_norm = w.k_norm,
                 .norm_eps = static_cast<float>(model_.rms_norm_eps),
                 .positions = pass.positions,
                 .seq_idx = pass.seq_idx,
                 .q = pass.q,
                 .kv = Cache(layer, pass),
                 .q_cos_sin = rotation.q_cos_sin,
                 .appended = appended},
  });
}

void Transformer::FinishLayer(int64_t layer, const Pass& pass) const {
  const LayerWeights& w = weights_.layers[static_cast<size_t>(layer)];
  TensorView attention_out(pass.attention_out.ptr, pass.attention_out.dtype,
                           {pass.attention_out.dim(0), model_.q_size()});
  AddBranch({.x = attention_out, .weight = w.o, .bias = w.o_bias, .out = {}}, w.o_norm, pass);
  if (model_.layer(layer).has_experts) {
    AddExperts(w, pass);
  } else {
    AddMlp(w, pass);
  }
}

GateMulArgs Transformer::GateMul(const TensorView& gate_up, const TensorView& out) const {
  return {.gate_up = gate_up,
          .out = out,
          .activation = model_.activation,
          .limit = static_cast<float>(model_.swiglu_limit),
          .alpha = static_cast<float>(model_.swiglu_alpha)};
}

void Transformer::AddMlp(const LayerWeights& w, const Pass& pass) const {
  backend_.GateUpMul({
      .norm = InputNorm(w.post_norm, pass),
      .linear = InPass(
          {.x = pass.normed, .weight = w.gate_up, .bias = w.gate_up_bias, .out = pass.gate_up},
          pass),
      .gate_mul = GateMul(pass.gate_up, pass.mlp),
  });
  AddBranch({.x = pass.mlp, .weight = w.down, .bias = w.down_bias, .out = {}}, w.down_norm, pass);
}

void Transformer::BeginSharedExpert(const LayerWeights& w, const Pass& pass) const {
  backend_.GateUpMul({
      .norm = {},
      .linear = InPass({.x = pass.normed,
                        .weight = w.gate_up,
                        .bias = w.gate_up_bias,
                        .out = pass.shared_gate_up},
                       pass),
      .gate_mul = GateMul(pass.shared_gate_up, pass.shared_mlp),
  });
  // In front of the product with down, which is linear, so that it can be added at once.
  if (w.shared_gate) {
    backend_.GateRows({.x = pass.normed, .weight = w.shared_gate, .out = pass.shared_mlp});
  }
}

void Transformer::AddExperts(const LayerWeights& w, const Pass& pass) const {
  // The experts read the normed inputs too, which NormLinear would not keep.
  backend_.RmsNorm(InputNorm(w.post_norm, pass));
  backend_.Linear(
      {.x = pass.normed, .weight = w.router, .bias = w.router_bias, .out = pass.router_logits});
  const bool has_shared = model_.shared_expert_size > 0;
  if (has_shared) BeginSharedExpert(w, pass);
  backend_.ExpertMlp({
      .select = {.logits = pass.router_logits,
                 .correction = w.router_correction,
                 .expert_ids = pass.expert_ids,
                 .weights = pass.expert_weights,
                 .score = model_.router_score,
                 .normalized = model_.normalized_routing,
                 .scale = static_cast<float>(model_.routing_scale)},
      .gate_up = {.x = pass.normed,
                  .weight = w.experts_gate_up,
                  .bias = w.experts_gate_up_bias,
                  .expert_ids = pass.expert_ids,
                  .out = pass.expert_gate_up},
      .gate_mul = GateMul(pass.expert_gate_up, pass.expert_mlp),
      .down = {.x = pass.expert_mlp,
               .weight = w.experts_down,
               .bias = w.experts_down_bias,
               .expert_ids = pass.expert_ids,
               .out = pass.expert_out},
      .add = {.x = pass.expert_out, .weights = pass.expert_weights, .out = pass.hidden},
  });
  if (has_shared) {
    AddBranch({.x = pass.shared_mlp, .weight = w.down, .bias = w.down_bias, .out = {}}, {}, pass);
  }
}

void Transformer::AddBranch(LinearArgs product, const TensorView& norm, const Pass& pass) const {
  product = InPass(product, pass);
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
  if (model_.logit_scale != 1.0 || model_.logit_softcap != 0.0) {
    backend_.ScaleLogits(
        {logits, static_cast<float>(model_.logit_scale), static_cast<float>(model_.logit_softcap)});
  }
}

}  // namespace tidal
