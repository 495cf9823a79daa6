// The heart: TidalDecode (arXiv 2410.05076, section 3) as one loop over the plan.
#include "decode/decode_step.h"

namespace tidal {

void DecodeStep(Backend& backend, const Transformer& transformer, const DecodePlan& plan,
                const Selection& selection, const Sampler& sampler, const Pass& pass) {
  transformer.Begin(pass);
  int64_t ordinal = -1;  // of the last layer passed that chose
  for (int64_t layer = 0; layer < plan.num_layers(); ++layer) {
    transformer.BeginAttention(layer, pass);
    AttentionArgs attention = {.q = pass.q,
                               .kv = transformer.Cache(layer, pass),
                               .sm_scale = transformer.sm_scale(),
                               .out = pass.attention_out};
    switch (plan.kind(layer)) {
      case LayerKind::kFull:
        backend.AttentionFull(attention);
        break;
      case LayerKind::kSelect:
        ++ordinal;
        backend.AttentionSelect(selection.SelectArgs(attention));
        backend.SelectTopK(selection.TopKArgs(ordinal, attention));
        break;
      case LayerKind::kScored:
        ++ordinal;
        backend.ScoreKeys(selection.ScoreArgs(attention));
        backend.SelectTopK(selection.TopKArgs(ordinal, attention));
        backend.AttentionSparse(selection.SparseArgs(ordinal, attention));
        break;
      case LayerKind::kSparse:
        backend.AttentionSparse(selection.SparseArgs(ordinal, attention));
        break;
    }
    transformer.FinishLayer(layer, pass);
  }
  transformer.Logits(pass.hidden, pass.normed, sampler.logits(pass.seq_lens.dim(0)));
  sampler.Sample(pass.seq_lens);
}

}  // namespace tidal
