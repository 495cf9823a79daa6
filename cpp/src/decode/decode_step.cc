// The heart: TidalDecode (arXiv 2410.05076, section 3) as one loop over the plan.
#include "decode/decode_step.h"

namespace tidal {
namespace {

// The scores of a scored layer: from its keys, or from their shadows.
void Score(Backend& backend, const Selection& selection, int64_t ordinal, const ShadowKeys* shadow,
           const AttentionArgs& attention, const Pass& pass) {
  if (shadow == nullptr) {
    backend.ScoreKeys(selection.ScoreArgs(ordinal, attention));
    return;
  }
  backend.AppendShadowScoreKeys({.append = {.kv = attention.kv,
                                            .positions = pass.positions,
                                            .seq_idx = pass.seq_idx,
                                            .shadow = *shadow},
                                 .score = selection.ScoreArgs(ordinal, attention, *shadow)});
}

}  // namespace

void DecodeStep(Backend& backend, const Transformer& transformer, const StepAttention& how,
                const Sampler& sampler, const Pass& pass) {
  const auto& [plan, selection, shadow] = how;
  transformer.Begin(pass);
  int64_t ordinal = -1;   // of the last layer passed that chose
  size_t num_scored = 0;  // layers passed
  for (int64_t layer = 0; layer < plan.num_layers(); ++layer) {
    transformer.BeginAttention(layer, pass, Appended::kNewestOfEachRow);
    AttentionArgs attention = {.q = pass.q,
                               .kv = transformer.Cache(layer, pass),
                               .rule = transformer.Rule(layer),
                               .out = pass.attention_out};
    switch (plan.kind(layer)) {
      case LayerKind::kFull:
      case LayerKind::kWindow:  // attention.rule says which
        backend.AttentionFull(attention);
        break;
      case LayerKind::kSelect:
        ++ordinal;
        backend.AttentionSelect(selection.SelectArgs(ordinal, attention));
        backend.SelectTopK(selection.TopKArgs(ordinal, attention));
        break;
      case LayerKind::kScored:
        ++ordinal;
        Score(backend, selection, ordinal, shadow == nullptr ? nullptr : &shadow->Layer(num_scored),
              attention, pass);
        ++num_scored;
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
