#include "engine/chunk_cost.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace tidal {
namespace {

constexpr int64_t kFirstTokens = 256;  // of the first chunk: some ms on a GPU, a second on a CPU
constexpr double kFirstSpread = 2.0;   // of each cost, relative: nothing is known of their ratios
constexpr double kNoise = 0.1;         // of a measurement, relative
// How far the costs may drift from one pass to the next, relative: about fifty passes count.
constexpr double kDrift = 0.02;

}  // namespace

void ChunkWork::Add(int64_t count, int64_t begin) {
  auto c = static_cast<double>(count);
  num_tokens += count;
  num_pairs += c * (static_cast<double>(begin) + c / 2);
}

ChunkCost::Vector ChunkCost::Features(const ChunkWork& work) {
  return {1.0, static_cast<double>(work.num_tokens), work.num_pairs};
}

double ChunkCost::Predict(const ChunkWork& work) const {
  Vector x = Features(work);
  double ms = cost_[0] * x[0] + cost_[1] * x[1] + cost_[2] * x[2];
  return std::max(ms, std::numeric_limits<double>::min());
}

void ChunkCost::Scale(double factor) {
  for (size_t i = 0; i < cost_.size(); ++i) {
    cost_[i] *= factor;
    covariance_[i] = {};
    covariance_[i][i] = cost_[i] * cost_[i] * kFirstSpread * kFirstSpread;
  }
}

void ChunkCost::Observe(const ChunkWork& work, double ms) {
  if (!(ms > 0.0) || !std::isfinite(ms) || work.num_tokens <= 0) return;
  most_tokens_ = std::max(most_tokens_, work.num_tokens);
  double expected = Predict(work);
  if (num_measured_++ == 0) return Scale(ms / expected);

  Vector x = Features(work), gain{};
  for (size_t i = 0; i < x.size(); ++i) {
    covariance_[i][i] += cost_[i] * cost_[i] * kDrift * kDrift;
  }
  // Relative to what was measured: a hiccup of the machine, many times too long, counts for little.
  double variance = ms * ms * kNoise * kNoise;
  for (size_t i = 0; i < x.size(); ++i) {
    for (size_t j = 0; j < x.size(); ++j) gain[i] += covariance_[i][j] * x[j];
    variance += x[i] * gain[i];
  }
  for (size_t i = 0; i < x.size(); ++i) {
    // No cost is negative, nor ever quite forgotten.
    cost_[i] = std::max(cost_[i] + gain[i] / variance * (ms - expected), cost_[i] / 16);
  }
  for (size_t i = 0; i < x.size(); ++i) {
    for (size_t j = 0; j < x.size(); ++j) covariance_[i][j] -= gain[i] * gain[j] / variance;
  }
}

int64_t ChunkCost::TokensWithin(double ms, const ChunkWork& work, int64_t begin) const {
  double left = ms - Predict(work);
  if (left <= 0.0) return 0;
  // c tokens cost: linear * c + quadratic * c^2.
  double linear = cost_[1] + cost_[2] * static_cast<double>(begin);
  double quadratic = cost_[2] / 2;
  double root = std::sqrt(linear * linear + 4 * quadratic * left);
  double tokens = 2 * left / (linear + root);
  int64_t most = num_measured_ == 0 ? kFirstTokens : std::max(2 * most_tokens_, kFirstTokens);
  most = std::max<int64_t>(most - work.num_tokens, 0);
  return tokens < static_cast<double>(most) ? static_cast<int64_t>(tokens) : most;
}

}  // namespace tidal
