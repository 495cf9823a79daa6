#include "decode/prefill.h"

#include <vector>

namespace tidal {

void UploadChunk(Backend& backend, Sequence& sequence, int64_t begin, int64_t end,
                 const TensorView& q_starts, const Pass& pass) {
  // token_ids, positions, seq_lens
  std::vector<int32_t> inputs(sequence.tokens.begin() + begin, sequence.tokens.begin() + end);
  for (int64_t i = begin; i < end; ++i) inputs.push_back(static_cast<int32_t>(i));
  inputs.push_back(static_cast<int32_t>(end));
  std::vector<int32_t> zeros(static_cast<size_t>(end - begin), 0);
  std::vector<int32_t> starts = {0, static_cast<int32_t>(end - begin)};
  Sequence* row = &sequence;
  backend.Upload(pass.inputs, inputs.data());
  backend.Upload(pass.seq_idx, zeros.data());
  backend.Upload(q_starts, starts.data());
  UploadSequences(backend, {&row, 1}, pass);
}

void PrefillChunk(Backend& backend, const Transformer& transformer, const ChunkRows& rows,
                  const Pass& pass, const OnQueries& on_queries) {
  transformer.Begin(pass);
  for (int64_t layer = 0; layer < transformer.num_layers(); ++layer) {
    transformer.BeginAttention(layer, pass);
    if (on_queries) on_queries(layer);
    backend.AttentionPrefill({.q = pass.q,
                              .q_starts = rows.q_starts,
                              .kv = transformer.Cache(layer, pass),
                              .sm_scale = transformer.sm_scale(),
                              .out = pass.attention_out,
                              .max_q_len = rows.max_q_len,
                              .max_seq_len = rows.max_seq_len});
    transformer.FinishLayer(layer, pass);
  }
}

}  // namespace tidal
