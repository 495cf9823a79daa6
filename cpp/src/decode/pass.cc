#include "decode/pass.h"

#include <algorithm>
#include <bit>

namespace tidal {

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
           .inv_freq = inputs_.Make(DType::kFloat32, {b, m.head_dim / 2}),
           .hidden = activations_.Make(DType::kFloat32, {t, m.hidden_size}),
           .normed = activations_.Make(act, {t, m.hidden_size}),
           .cos_sin = activations_.Make(DType::kFloat32, {t, m.head_dim}),
           .still_freq = {},
           .still_cos_sin = {},
           .qkv = activations_.Make(act, {t, m.q_size() + 2 * m.kv_size()}),
           .q = activations_.Make(act, {t, m.num_q_heads, m.head_dim}),
           .attention_out = activations_.Make(act, {t, m.num_q_heads, m.head_dim}),
           .gate_up = activations_.Make(act, {t, 2 * m.intermediate_size}),
           .mlp = activations_.Make(act, {t, m.intermediate_size}),
           .branch = {}};
  if (m.branch_norms) full_.branch = activations_.Make(DType::kFloat32, {t, m.hidden_size});
  auto has_rope = [](const LayerConfig& layer) { return layer.has_rope; };
  if (std::all_of(m.layers.begin(), m.layers.end(), has_rope)) return;
  full_.still_freq = inputs_.Make(DType::kFloat32, {b, m.head_dim / 2});
  full_.still_cos_sin = activations_.Make(DType::kFloat32, {t, m.head_dim});
}

Pass PassBuffers::Take(const PassSize& size) const {
  const auto& [num_tokens, batch_size] = size;
  Pass pass = full_;
  for (TensorView* view : {&pass.seq_idx, &pass.hidden, &pass.normed, &pass.cos_sin, &pass.qkv,
                           &pass.q, &pass.attention_out, &pass.gate_up, &pass.mlp}) {
    *view = view->Rows(0, num_tokens);
  }
  for (TensorView* view : {&pass.page_table, &pass.inv_freq}) *view = view->Rows(0, batch_size);
  if (pass.branch) pass.branch = pass.branch.Rows(0, num_tokens);
  if (pass.still_freq) {
    pass.still_freq = pass.still_freq.Rows(0, batch_size);
    pass.still_cos_sin = pass.still_cos_sin.Rows(0, num_tokens);
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
