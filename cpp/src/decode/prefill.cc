#include "decode/prefill.h"

namespace tidal {

void PrefillChunk(Backend& backend, const Transformer& transformer, const TensorView& q_starts,
                  int64_t seq_len, const Pass& pass) {
  transformer.Begin(pass);
  for (int64_t layer = 0; layer < transformer.num_layers(); ++layer) {
    transformer.BeginAttention(layer, pass);
    backend.AttentionPrefill({.q = pass.q,
                              .q_starts = q_starts,
                              .kv = transformer.Cache(layer, pass),
                              .sm_scale = transformer.sm_scale(),
                              .out = pass.attention_out,
                              .max_q_len = pass.token_ids.dim(0),
                              .max_seq_len = seq_len});
    transformer.FinishLayer(layer, pass);
  }
}

}  // namespace tidal
