// ChunkCost: what reading tokens of prompts costs in time, learnt from the passes that did.
//
// A pass costs `base`, which reads the weights, `per_token` for its products, and `per_pair` for
// each pair of a token and one that it attends to. The three are estimated by a Kalman filter whose
// measurements are the times of passes: new ones count more, none is ever needed twice.
#pragma once

#include <array>
#include <cstdint>

namespace tidal {

// How much a pass reads.
struct ChunkWork {
  int64_t num_tokens = 0;
  double num_pairs = 0.0;

  // Adds `count` tokens of one sequence that follow `begin` cached ones.
  void Add(int64_t count, int64_t begin);
};

class ChunkCost {
 public:
  // Tells what a pass took. Times that are not above 0 are no measurement.
  void Observe(const ChunkWork& work, double ms);

  // Returns the milliseconds that a pass over this much would take, > 0.
  double Predict(const ChunkWork& work) const;

  // Returns how many tokens behind `begin` cached ones may join a pass that reads `work` already,
  // so that it takes at most `ms`; >= 0. Before anything has been measured these are few, and never
  // are there more than twice as many as in the largest pass so far: what lies beyond is a guess.
  int64_t TokensWithin(double ms, const ChunkWork& work, int64_t begin) const;

 private:
  using Vector = std::array<double, 3>;  // base, per token, per pair

  static Vector Features(const ChunkWork& work);
  void Scale(double factor);

  // Llama-3.1-8B in bf16 on an H200, in ms; the first measurement scales them.
  Vector cost_ = {1.0, 21.7e-3, 0.868e-6};
  std::array<Vector, 3> covariance_ = {};  // of cost_
  int64_t num_measured_ = 0;
  int64_t most_tokens_ = 0;  // of a measured pass
};

}  // namespace tidal
