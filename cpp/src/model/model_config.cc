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

void ValidateRope(const ModelConfig& model) {
  const RopeConfig& rope = model.rope;
  TIDAL_CHECK(rope.rotary_dim >= 0 && rope.rotary_dim <= model.head_dim && rope.rotary_dim % 2 == 0,
              ConfigError, "rope rotary_dim: got ", rope.rotary_dim,
              ", expected an even number up to head_dim ", model.head_dim);
  CheckPositive("rope theta", rope.theta);
  CheckPositive("rope factor", rope.factor);
  bool needs_original = rope.type == RopeType::kLlama3 || rope.type == RopeType::kYarn ||
                        rope.type == RopeType::kLongrope;
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
  CheckPositive("embedding_scale", model.embedding_scale);
  CheckPositive("residual_scale", model.residual_scale);
  CheckPositive("logit_scale", model.logit_scale);
  if (model.attention_scale != 0.0) CheckPositive("attention_scale", model.attention_scale);
  TIDAL_CHECK(!model.branch_norms || model.residual_scale == 1.0, ConfigError,
              "residual_scale: got ", model.residual_scale,
              " with branch_norms, which undo it; expected 1");
  TIDAL_CHECK(model.layers.empty() || static_cast<int64_t>(model.layers.size()) == model.num_layers,
              ConfigError, "layers: got ", model.layers.size(), ", expected none or num_layers ",
              model.num_layers);
  ValidateRope(model);
}

}  // namespace tidal
