// What positions are ranked by: the scores of the query heads that share a set, pooled
// (backend/op_args.h, SelectTopKArgs). Used by select_top_k.cu, pool_scores.cu and trim_to_mass.cu,
// which so rank alike bit for bit.
#pragma once

#include <cstdint>

#include "common/vec.cuh"

namespace tidal {

constexpr float kLog2E = 1.44269504f;

// kPooledKeys: keys that were made before (pool_scores.h).
enum class KeySource { kRawScores, kSumOfWeights, kMaxOfWeights, kPooledKeys };

// The scores of one set. Score: float, or __half (of shadow keys).
template <typename Score>
struct SetScores {
  const Score* scores;  // [num_heads, max_len]
  const float* lse;     // [num_heads]
  int64_t max_len;
  int num_heads;
};

template <int kWidth>
using Scores = Vec<float, kWidth>;  // of adjacent positions

__device__ __forceinline__ float Log2Lse(float lse) {
  return __fmul_rn(lse, kLog2E);
}

// exp(score - lse). log2_lse: lse in units of log 2.
__device__ __forceinline__ float Weight(float score, float log2_lse) {
  return exp2f(__fmaf_rn(score, kLog2E, -log2_lse));
}

// Takes the next head's score into a position's pooled one.
template <KeySource kSource>
__device__ __forceinline__ float Pool(float pooled, float score, float log2_lse) {
  float weight = Weight(score, log2_lse);
  // fmaxf drops a NaN: for the maximum it ranks below every score.
  return kSource == KeySource::kSumOfWeights ? __fadd_rn(pooled, weight) : fmaxf(pooled, weight);
}

// What the kWidth positions from `position` on are ranked by.
template <KeySource kSource, int kWidth, typename Score>
__device__ __forceinline__ Scores<kWidth> PoolHeads(const SetScores<Score>& set, int64_t position) {
  auto load = [&](int head) {
    Scores<kWidth> scores;
    LoadFloats<kWidth>(set.scores + head * set.max_len + position, scores.elements);
    return scores;
  };
  if constexpr (kSource == KeySource::kRawScores) {
    return load(0);
  } else {
    constexpr int kBatch = 4;  // heads whose loads overlap
    Scores<kWidth> pooled;
#pragma unroll
    for (float& score : pooled.elements) {
      score = kSource == KeySource::kSumOfWeights ? 0.0f : -INFINITY;
    }
#pragma unroll 1
    for (int begin = 0; begin < set.num_heads; begin += kBatch) {
      Scores<kWidth> batch[kBatch];
      float log2_lse[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (begin + j >= set.num_heads) break;
        batch[j] = load(begin + j);
        log2_lse[j] = Log2Lse(set.lse[begin + j]);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (begin + j >= set.num_heads) break;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          pooled.elements[i] = Pool<kSource>(pooled.elements[i], batch[j].elements[i], log2_lse[j]);
        }
      }
    }
    return pooled;
  }
}

}  // namespace tidal
