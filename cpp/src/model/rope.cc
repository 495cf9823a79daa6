// The formulas of Hugging Face's modeling_rope_utils (Apache-2.0), one function a type:
// linear: position interpolation (kaiokendev); dynamic: NTK-aware (bloc97, emozilla);
// yarn: arXiv 2309.00071; longrope: arXiv 2402.13753; llama3: Llama 3.1's frequency bands.
#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace tidal {
namespace {

using Frequencies = std::vector<double>;

Frequencies Default(double theta, int64_t head_dim) {
  Frequencies freq;
  for (int64_t i = 0; i < head_dim; i += 2) {
    // The exponent is a float32 quotient in every published checkpoint's training code.
    double exponent = static_cast<float>(i) / static_cast<float>(head_dim);
    freq.push_back(1.0 / std::pow(theta, exponent));
  }
  return freq;
}

Frequencies Linear(const RopeConfig& rope, int64_t head_dim) {
  Frequencies freq = Default(rope.theta, head_dim);
  for (double& f : freq) f /= rope.factor;
  return freq;
}

Frequencies Dynamic(const RopeConfig& rope, int64_t head_dim, int64_t max_position_embeddings,
                    int64_t seq_len) {
  double window = static_cast<double>(max_position_embeddings);
  double length = std::max(static_cast<double>(seq_len), window);
  double dim = static_cast<double>(head_dim);
  double stretch = rope.factor * length / window - (rope.factor - 1.0);
  return Default(rope.theta * std::pow(stretch, dim / (dim - 2.0)), head_dim);
}

Frequencies Llama3(const RopeConfig& rope, int64_t head_dim) {
  double original = static_cast<double>(rope.original_max_position_embeddings);
  double low_wavelength = original / rope.low_freq_factor;
  double high_wavelength = original / rope.high_freq_factor;
  Frequencies freq = Default(rope.theta, head_dim);
  for (double& f : freq) {
    double wavelength = 2.0 * std::numbers::pi / f;
    if (wavelength < high_wavelength) continue;
    if (wavelength > low_wavelength) {
      f /= rope.factor;
      continue;
    }
    double smooth = (original / wavelength - rope.low_freq_factor) /
                    (rope.high_freq_factor - rope.low_freq_factor);
    f = (1.0 - smooth) * f / rope.factor + smooth * f;
  }
  return freq;
}

// The dimension that turns `rotations` times within the original context.
double YarnCorrectionDim(double rotations, const RopeConfig& rope, int64_t head_dim) {
  double original = static_cast<double>(rope.original_max_position_embeddings);
  return static_cast<double>(head_dim) * std::log(original / (rotations * 2.0 * std::numbers::pi)) /
         (2.0 * std::log(rope.theta));
}

Frequencies Yarn(const RopeConfig& rope, int64_t head_dim) {
  double low = YarnCorrectionDim(rope.beta_fast, rope, head_dim);
  double high = YarnCorrectionDim(rope.beta_slow, rope, head_dim);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(head_dim - 1));
  if (low == high) high += 0.001;  // as in the source: no division by zero
  Frequencies freq = Default(rope.theta, head_dim);
  for (size_t i = 0; i < freq.size(); ++i) {
    double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    freq[i] = freq[i] / rope.factor * ramp + freq[i] * (1.0 - ramp);
  }
  return freq;
}

double YarnMscale(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

double YarnAttentionScaling(const RopeConfig& rope) {
  if (rope.attention_factor) return *rope.attention_factor;
  if (rope.mscale != 0.0 && rope.mscale_all_dim != 0.0) {
    return YarnMscale(rope.factor, rope.mscale) / YarnMscale(rope.factor, rope.mscale_all_dim);
  }
  return YarnMscale(rope.factor, 1.0);
}

Frequencies Longrope(const RopeConfig& rope, int64_t head_dim, int64_t seq_len) {
  const std::vector<double>& factors =
      seq_len > rope.original_max_position_embeddings ? rope.long_factor : rope.short_factor;
  Frequencies freq = Default(rope.theta, head_dim);
  for (size_t i = 0; i < freq.size(); ++i) freq[i] /= factors[i];
  return freq;
}

double LongropeAttentionScaling(const RopeConfig& rope) {
  if (rope.attention_factor) return *rope.attention_factor;
  if (rope.factor <= 1.0) return 1.0;
  double original = static_cast<double>(rope.original_max_position_embeddings);
  return std::sqrt(1.0 + std::log(rope.factor) / std::log(original));
}

RopeFrequencies Compute(const ModelConfig& model, const RopeConfig& rope, int64_t seq_len) {
  const int64_t dim = model.rotary_dim();
  Frequencies freq;
  double scaling = 1.0;
  switch (rope.type) {
    case RopeType::kDefault:
      freq = Default(rope.theta, dim);
      break;
    case RopeType::kLinear:
      freq = Linear(rope, dim);
      break;
    case RopeType::kDynamic:
      freq = Dynamic(rope, dim, model.max_position_embeddings, seq_len);
      break;
    case RopeType::kLlama3:
      freq = Llama3(rope, dim);
      break;
    case RopeType::kYarn:
      freq = Yarn(rope, dim);
      scaling = YarnAttentionScaling(rope);
      break;
    case RopeType::kLongrope:
      freq = Longrope(rope, dim, seq_len);
      scaling = LongropeAttentionScaling(rope);
      break;
  }
  freq.resize(static_cast<size_t>(model.head_dim / 2), 0.0);
  return {std::vector<float>(freq.begin(), freq.end()), static_cast<float>(scaling)};
}

}  // namespace

RopeFrequencies ComputeRope(const ModelConfig& model, int64_t seq_len) {
  return Compute(model, model.rope, seq_len);
}

RopeFrequencies ComputeWindowRope(const ModelConfig& model) {
  return Compute(model, *model.window_rope, 0);
}

}  // namespace tidal
