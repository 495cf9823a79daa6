#include "decode/prefill.h"

namespace tidal {

void PrefillChunk(Backend& backend, const Transformer& transformer, const ChunkRows& rows,
                  const Pass& pass) {
  transformer.Begin(pass);
  for (int64_t layer = 0; layer < transformer.num_layers(); ++layer) {
    transformer.BeginAttention(layer, pass);
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
