// Transformer: what all layer kinds, and prefill and decode, share. Everything but the attention
// itself.
#pragma once

#include <array>
#include <cstdint>

#include "backend/backend.h"
#include "decode/pass.h"
#include "kv/paged_kv_cache.h"
#include "model/weights.h"

namespace tidal {

class Transformer {
 public:
  // All referenced objects must outlive this one. `rope_scaling`: attention_scaling of the
  // sequences' RopeFrequencies.
  Transformer(Backend& backend, const ModelConfig& model, const ModelWeights& weights,
              const PagedKvCache& cache, float rope_scaling);

  // Token ids to hidden states, positions to rotations.
  void Begin(const Pass& pass) const;

  // Norm, qkv, rotation; appends the pass's K and V to the layer's pages. Leaves pass.q.
  void BeginAttention(int64_t layer, const Pass& pass, Appended appended) const;

  // pass.attention_out through the output projection and the MLP into the residual stream.
  void FinishLayer(int64_t layer, const Pass& pass) const;

  // Final norm and lm_head of `hidden` [R, H] float32 into `logits` [R, V] float32; `normed` [R, H]
  // act is scratch.
  void Logits(const TensorView& hidden, const TensorView& normed, const TensorView& logits) const;

  PagedKv Cache(int64_t layer, const Pass& pass) const {
    return cache_.Layer(layer, pass.page_table, pass.seq_lens);
  }
  // How a layer's scores become weights.
  AttentionRule Rule(int64_t layer) const;
  int64_t num_layers() const { return model_.num_layers; }

 private:
  // The MLP of a layer into the residual stream.
  void AddMlp(const LayerWeights& w, const Pass& pass) const;
  void AddExperts(const LayerWeights& w, const Pass& pass) const;
  // The first half of the expert that all tokens have.
  void BeginSharedExpert(const LayerWeights& w, const Pass& pass) const;
  GateMulArgs GateMul(const TensorView& gate_up, const TensorView& out) const;
  RmsNormArgs InputNorm(const TensorView& weight, const Pass& pass) const;
  // A product into the residual stream, normalised on the way if there is a norm.
  void AddBranch(LinearArgs product, const TensorView& norm, const Pass& pass) const;

  Backend& backend_;
  const ModelConfig& model_;
  const ModelWeights& weights_;
  const PagedKvCache& cache_;
  std::array<float, kNumRotations> rope_scaling_;  // by RotationKind
  float sm_scale_;
  // The residual stream is kept divided by residual_scale: then what the layers add needs no
  // factor, and norms undo the division, with eps divided by its square.
  float embedding_scale_;
  float norm_eps_;
};

}  // namespace tidal
