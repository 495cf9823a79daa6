#include "model/model_config.h"

#include <cmath>

#include "tidal/error.h"

namespace tidal {
namespace {

// Far above any published model; a config beyond them is a mistake or an attack, and is refused
// before anything is allocated.
constexpr int64_t kMaxVocab = int64_t{1} << 22;
constexpr int64_t kMaxHidden = int64_t{1} << 20;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxHeads = 4096;
constexpr int64_t kMaxExperts = 4096;
constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kMaxPositions = int64_t{1} << 30;

void CheckRange(const char* field, int64_t value, int64_t max) {
  TIDAL_CHECK(value >= 1 && value <= max, ConfigError, field, ": got ", value, ", expected 1 to ",
              max);
}

void CheckPositive(const char* field, double value) {
  TIDAL_CHECK(std::isfinite(value) && value > 0.0, ConfigError, field, ": got ", value,
              ", expected a finite number > 0");
}

void ValidateRope(const ModelConfig& model, const RopeConfig& rope) {
  TIDAL_CHECK(rope.rotary_dim >= 0 && rope.rotary_dim <= model.head_dim && rope.rotary_dim % 2 == 0,
              ConfigError, "rope rotary_dim: got ", rope.rotary_dim,
              ", expected an even number up to head_dim ", model.head_dim);
  CheckPositive("rope theta", rope.theta);
  CheckPositive("rope factor", rope.factor);
  TIDAL_CHECK(std::isfinite(rope.query_scale_beta) && rope.query_scale_beta >= 0.0, ConfigError,
              "rope query_scale_beta: got ", rope.query_scale_beta, ", expected a number >= 0");
  bool needs_original = rope.type == RopeType::kLlama3 || rope.type == RopeType::kYarn ||
                        rope.type == RopeType::kLongrope || rope.query_scale_beta > 0.0;
  if (needs_original) {
    CheckRange("rope original_max_position_embeddings", rope.original_max_position_embeddings,
               kMaxPositions);
  }
  if (rope.type == RopeType::kLlama3) {
    CheckPositive("rope low_freq_factor", rope.low_freq_factor);
    TIDAL_CHECK(rope.high_freq_factor > rope.low_freq_factor, ConfigError,
                "rope high_freq_factor: got ", rope.high_freq_factor,
                ", expected more than low_freq_factor ", rope.low_freq_factor);
  }
  if (rope.type == RopeType::kLongrope) {
    auto half = static_cast<size_t>(model.rotary_dim() / 2);
    TIDAL_CHECK(rope.short_factor.size() == half && rope.long_factor.size() == half, ConfigError,
                "rope short_factor and long_factor: got ", rope.short_factor.size(), " and ",
                rope.long_factor.size(), " values, expected ", half,
                " each (half of the dims that turn)");
  }
}

// Layers with a window rotate by frequencies that hold for all sequences, and the rows of q and k
// lie in one order in all layers.
void ValidateWindowRope(const ModelConfig& model) {
  const RopeConfig& rope = *model.window_rope;
  ValidateRope(model, rope);
  TIDAL_CHECK(rope.type != RopeType::kDynamic && rope.type != RopeType::kLongrope &&
                  rope.query_scale_beta == 0.0,
              ConfigError,
              "window_rope: got one that depends on length, expected one that does not: default, "
              "linear, llama3 or yarn");
  TIDAL_CHECK(
      rope.rotary_dim == model.rope.rotary_dim && rope.interleaved == model.rope.interleaved,
      ConfigError, "window_rope: got other dims that turn than those of rope, expected the same");
}

void ValidateLayers(const ModelConfig& model) {
  TIDAL_CHECK(model.layers.empty() || static_cast<int64_t>(model.layers.size()) == model.num_layers,
              ConfigError, "layers: got ", model.layers.size(), ", expected none or num_layers ",
              model.num_layers);
  for (const LayerConfig& layer : model.layers) {
    TIDAL_CHECK(layer.window >= 0 && layer.window <= kMaxPositions, ConfigError,
                "layers: window: got ", layer.window, ", expected 0 to ", kMaxPositions);
    CheckPositive("layers k_scale", layer.k_scale);
    CheckPositive("layers v_scale", layer.v_scale);
  }
  if (!model.has_experts()) return;
  CheckRange("num_experts", model.num_experts, kMaxExperts);
  CheckRange("experts_per_token", model.experts_per_token, model.num_experts);
  CheckRange("expert_intermediate_size", model.expert_intermediate_size, kMaxHidden);
  CheckPositive("routing_scale", model.routing_scale);
  TIDAL_CHECK(model.shared_expert_size >= 0 && model.shared_expert_size <= kMaxHidden, ConfigError,
              "shared_expert_size: got ", model.shared_expert_size, ", expected 0 to ", kMaxHidden);
  TIDAL_CHECK(!model.shared_expert_gate || model.shared_expert_size > 0, ConfigError,
              "shared_expert_gate: got true without a shared expert; expected a "
              "shared_expert_size");
}

void ValidateScales(const ModelConfig& model) {
  CheckPositive("embedding_scale", model.embedding_scale);
  CheckPositive("residual_scale", model.residual_scale);
  CheckPositive("logit_scale", model.logit_scale);
  if (model.attention_scale != 0.0) CheckPositive("attention_scale", model.attention_scale);
  if (model.attention_softcap != 0.0) CheckPositive("attention_softcap", model.attention_softcap);
  if (model.logit_softcap != 0.0) CheckPositive("logit_softcap", model.logit_softcap);
  CheckPositive("swiglu_limit", model.swiglu_limit);
  CheckPositive("swiglu_alpha", model.swiglu_alpha);
  TIDAL_CHECK(std::isfinite(model.norm_offset), ConfigError, "norm_offset: got ", model.norm_offset,
              ", expected a finite number");
  TIDAL_CHECK(!model.branch_norms || model.residual_scale == 1.0, ConfigError,
              "residual_scale: got ", model.residual_scale,
              " with branch_norms, which undo it; expected 1");
  TIDAL_CHECK(model.input_norms || model.branch_norms, ConfigError,
              "input_norms: got false without branch_norms, expected one of them");
}

}  // namespace

void ValidateModelConfig(const ModelConfig& model) {
  CheckRange("vocab_size", model.vocab_size, kMaxVocab);
  CheckRange("hidden_size", model.hidden_size, kMaxHidden);
  CheckRange("intermediate_size", model.intermediate_size, kMaxHidden);
  CheckRange("num_layers", model.num_layers, kMaxLayers);
  CheckRange("num_q_heads", model.num_q_heads, kMaxHeads);
  CheckRange("num_kv_heads", model.num_kv_heads, kMaxHeads);
  CheckRange("head_dim", model.head_dim, kMaxHeadDim);
  CheckRange("max_position_embeddings", model.max_position_embeddings, kMaxPositions);
  CheckPositive("rms_norm_eps", model.rms_norm_eps);
  TIDAL_CHECK(model.head_dim % 2 == 0, ConfigError, "head_dim: got ", model.head_dim,
              ", expected an even number (rotary halves)");
  TIDAL_CHECK(model.num_q_heads % model.num_kv_heads == 0, ConfigError, "num_kv_heads: got ",
              model.num_kv_heads, ", expected a divisor of num_q_heads ", model.num_q_heads);
  ValidateScales(model);
  ValidateLayers(model);
  ValidateRope(model, model.rope);
  if (model.window_rope) ValidateWindowRope(model);
}

}  // namespace tidal
