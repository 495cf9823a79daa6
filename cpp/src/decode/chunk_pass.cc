#include "decode/chunk_pass.h"

namespace tidal {

void ChunkPass(Backend& backend, const Transformer& transformer, const Pass& pass,
               const OnQueries& on_queries) {
  transformer.Begin(pass);
  for (int64_t layer = 0; layer < transformer.num_layers(); ++layer) {
    transformer.BeginAttention(layer, pass, Appended::kAnywhere);
    if (on_queries) on_queries(layer);
    backend.AttentionPrefill({.q = pass.q,
                              .q_starts = pass.q_starts,
                              .kv = transformer.Cache(layer, pass),
                              .rule = transformer.Rule(layer),
                              .out = pass.attention_out,
                              .max_q_len = pass.max_q_len,
                              .max_seq_len = pass.max_seq_len});
    transformer.FinishLayer(layer, pass);
  }
}

}  // namespace tidal
