#include "decode/pass.h"

#include <algorithm>
#include <bit>
#include <vector>

namespace tidal {

PassBuffers::PassBuffers(Backend& backend, const std::string& what, const ModelConfig& model,
                         DType act, int64_t max_tokens, int64_t max_batch_size, int64_t max_pages)
    : tensors_(backend, what) {
  auto tensor = [&](DType dtype, std::initializer_list<int64_t> shape) {
    return tensors_.Make(dtype, shape);
  };
  const ModelConfig& m = model;
  int64_t t = max_tokens, b = max_batch_size;
  full_ = {.inputs = tensor(DType::kInt32, {2 * t + b}),
           .token_ids = {},
           .positions = {},
           .seq_lens = {},
           .seq_idx = tensor(DType::kInt32, {t}),
           .page_table = tensor(DType::kInt32, {b, max_pages}),
           .inv_freq = tensor(DType::kFloat32, {b, m.head_dim / 2}),
           .hidden = tensor(DType::kFloat32, {t, m.hidden_size}),
           .normed = tensor(act, {t, m.hidden_size}),
           .cos_sin = tensor(DType::kFloat32, {t, m.head_dim}),
           .qkv = tensor(act, {t, m.q_size() + 2 * m.kv_size()}),
           .q = tensor(act, {t, m.num_q_heads, m.head_dim}),
           .attention_out = tensor(act, {t, m.num_q_heads, m.head_dim}),
           .gate_up = tensor(act, {t, 2 * m.intermediate_size}),
           .mlp = tensor(act, {t, m.intermediate_size})};
}

Pass PassBuffers::Take(int64_t num_tokens, int64_t batch_size) const {
  Pass pass = full_;
  for (TensorView* view : {&pass.seq_idx, &pass.hidden, &pass.normed, &pass.cos_sin, &pass.qkv,
                           &pass.q, &pass.attention_out, &pass.gate_up, &pass.mlp}) {
    *view = view->Rows(0, num_tokens);
  }
  for (TensorView* view : {&pass.page_table, &pass.inv_freq}) *view = view->Rows(0, batch_size);
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

void UploadSequences(Backend& backend, std::span<Sequence* const> rows, const Pass& pass) {
  int64_t max_pages = pass.page_table.dim(1), half_dim = pass.inv_freq.dim(1);
  std::vector<int32_t> table(static_cast<size_t>(pass.page_table.numel()), 0);
  std::vector<float> inv_freq(static_cast<size_t>(pass.inv_freq.numel()), 0.0f);
  for (size_t i = 0; i < rows.size(); ++i) {
    const Sequence& sequence = *rows[i];
    auto row = static_cast<int64_t>(i);
    std::copy(sequence.pages.pages().begin(), sequence.pages.pages().end(),
              table.begin() + row * max_pages);
    std::copy(sequence.inv_freq.begin(), sequence.inv_freq.end(),
              inv_freq.begin() + row * half_dim);
  }
  backend.Upload(pass.page_table, table.data());
  backend.Upload(pass.inv_freq, inv_freq.data());
}

}  // namespace tidal
