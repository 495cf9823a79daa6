#include "decode/pass.h"

#include <algorithm>
#include <bit>
#include <set>
#include <vector>

#include "model/rope.h"

namespace tidal {

RotationKind RotationOf(const ModelConfig& model, int64_t layer) {
  const LayerConfig own = model.layer(layer);
  if (!own.has_rope) return RotationKind::kStill;
  return own.window > 0 && model.window_rope ? RotationKind::kWindow : RotationKind::kOfSequence;
}

PassBuffers::PassBuffers(Backend& backend, const ModelConfig& model, DType act,
                         const PassSize& largest, int64_t max_pages)
    : largest_(largest),
      inputs_(backend, "activations of a step"),
      activations_(backend, "activations of a prefill chunk") {
  const ModelConfig& m = model;
  int64_t t = largest.num_tokens, b = largest.batch_size;
  full_ = {.inputs = inputs_.Make(DType::kInt32, {2 * t + b}),
           .token_ids = {},
           .positions = {},
           .seq_lens = {},
           .seq_idx = inputs_.Make(DType::kInt32, {t}),
           .q_starts = inputs_.Make(DType::kInt32, {b + 1}),
           .page_table = inputs_.Make(DType::kInt32, {b, max_pages}),
           .hidden = activations_.Make(DType::kFloat32, {t, m.hidden_size}),
           .normed = activations_.Make(act, {t, m.hidden_size}),
           .qkv = activations_.Make(act, {t, m.q_size() + 2 * m.kv_size()}),
           .q = activations_.Make(act, {t, m.num_q_heads, m.head_dim}),
           .attention_out = activations_.Make(act, {t, m.num_q_heads, m.head_dim}),
           .gate_up = activations_.Make(act, {t, 2 * m.intermediate_size}),
           .mlp = activations_.Make(act, {t, m.intermediate_size}),
           .router_logits = {},
           .expert_ids = {},
           .expert_weights = {},
           .expert_gate_up = {},
           .expert_mlp = {},
           .expert_out = {},
           .shared_gate_up = {},
           .shared_mlp = {},
           .branch = {},
           .rotations = {}};
  if (m.branch_norms) full_.branch = activations_.Make(DType::kFloat32, {t, m.hidden_size});
  if (m.has_experts()) MakeExperts(m, act);
  MakeRotations(model);
}

void PassBuffers::MakeExperts(const ModelConfig& model, DType act) {
  const int64_t t = largest_.num_tokens, k = model.experts_per_token;
  const int64_t inner = model.expert_intermediate_size;
  full_.router_logits = activations_.Make(DType::kFloat32, {t, model.num_experts});
  full_.expert_ids = activations_.Make(DType::kInt32, {t, k});
  full_.expert_weights = activations_.Make(DType::kFloat32, {t, k});
  full_.expert_gate_up = activations_.Make(act, {t * k, 2 * inner});
  full_.expert_mlp = activations_.Make(act, {t * k, inner});
  full_.expert_out = activations_.Make(act, {t * k, model.hidden_size});
  if (model.shared_expert_size == 0) return;
  full_.shared_gate_up = activations_.Make(act, {t, 2 * model.shared_expert_size});
  full_.shared_mlp = activations_.Make(act, {t, model.shared_expert_size});
}

void PassBuffers::MakeRotations(const ModelConfig& model) {
  const int64_t dim = model.head_dim;
  std::set<RotationKind> kinds;
  for (int64_t layer = 0; layer < model.num_layers; ++layer) {
    kinds.insert(RotationOf(model, layer));
  }
  for (RotationKind kind : kinds) {
    Rotation& rotation = full_.rotations[static_cast<size_t>(kind)];
    rotation.inv_freq = inputs_.Make(DType::kFloat32, {largest_.batch_size, dim / 2});
    rotation.cos_sin = activations_.Make(DType::kFloat32, {largest_.num_tokens, dim});
    if (kind == RotationKind::kOfSequence && model.rope.query_scale_beta > 0.0) {
      rotation.q_cos_sin = activations_.Make(DType::kFloat32, {largest_.num_tokens, dim});
    }
  }
}

void PassBuffers::WriteConstants(Backend& backend, const ModelConfig& model) const {
  const TensorView& rows = full_.rotation(RotationKind::kWindow).inv_freq;
  if (!rows) return;
  const std::vector<float> inv_freq = ComputeWindowRope(model).inv_freq;
  for (int64_t row = 0; row < rows.dim(0); ++row) {
    backend.Upload(rows.Rows(row, 1), inv_freq.data());
  }
}

Pass PassBuffers::Take(const PassSize& size) const {
  const auto& [num_tokens, batch_size] = size;
  Pass pass = full_;
  for (TensorView* view : {&pass.seq_idx, &pass.hidden, &pass.normed, &pass.qkv, &pass.q,
                           &pass.attention_out, &pass.gate_up, &pass.mlp}) {
    *view = view->Rows(0, num_tokens);
  }
  pass.page_table = pass.page_table.Rows(0, batch_size);
  if (pass.branch) pass.branch = pass.branch.Rows(0, num_tokens);
  if (pass.router_logits) {
    for (TensorView* view : {&pass.router_logits, &pass.expert_ids, &pass.expert_weights}) {
      *view = view->Rows(0, num_tokens);
    }
    const int64_t choices = num_tokens * pass.expert_ids.dim(1);
    for (TensorView* view : {&pass.expert_gate_up, &pass.expert_mlp, &pass.expert_out}) {
      *view = view->Rows(0, choices);
    }
  }
  if (pass.shared_mlp) {
    pass.shared_gate_up = pass.shared_gate_up.Rows(0, num_tokens);
    pass.shared_mlp = pass.shared_mlp.Rows(0, num_tokens);
  }
  for (Rotation& rotation : pass.rotations) {
    if (rotation.cos_sin.rank == 0) continue;
    rotation.inv_freq = rotation.inv_freq.Rows(0, batch_size);
    rotation.cos_sin = rotation.cos_sin.Rows(0, num_tokens);
    if (rotation.q_cos_sin) rotation.q_cos_sin = rotation.q_cos_sin.Rows(0, num_tokens);
  }
  pass.q_starts = pass.q_starts.Rows(0, batch_size + 1);
  pass.inputs = pass.inputs.Rows(0, 2 * num_tokens + batch_size);
  pass.token_ids = pass.inputs.Rows(0, num_tokens);
  pass.positions = pass.inputs.Rows(num_tokens, num_tokens);
  pass.seq_lens = pass.inputs.Rows(2 * num_tokens, batch_size);
  return pass;
}

int64_t StepSize(DeviceType device, int64_t count, int64_t max_count) {
  if (device == DeviceType::kCpu) return count;
  auto whole = static_cast<uint64_t>(count);
  auto size = static_cast<int64_t>(whole <= 8 ? std::bit_ceil(whole) : (whole + 7) / 8 * 8);
  return std::min(size, max_count);
}

}  // namespace tidal
