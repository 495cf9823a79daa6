// A round of verified decoding: sparse steps draft, one dense pass decides.
//
// Speculative decoding (arXiv 2211.17192) where the model drafts for itself, with its sparse plan,
// and shared noise takes the place of rejection sampling (arXiv 2408.07978). A draft is kept if it
// is the token that the dense logits draw. A draw depends on logits, parameters, seed and position
// alone (core/philox.h), so what is kept, and the token drawn after it, is what dense decoding
// would have written, greedy or sampled.
#pragma once

#include <cstdint>
#include <vector>

#include "decode/model_runner.h"
#include "kv/sequence.h"

namespace tidal {

// One sequence of a round.
struct DraftRow {
  Sequence* sequence = nullptr;  // exactly one token not yet cached, before and after
  int64_t num_drafts = 0;        // most to draft; afterwards: drafts that were checked
  int64_t begin = 0;             // out: tokens cached before the round
  std::vector<int32_t> tokens;   // out: the kept drafts, and the token drawn after them

  int64_t num_kept() const { return static_cast<int64_t>(tokens.size()) - 1; }
};

// Appends its `tokens` to each sequence; if the last is -1 (unusable logits), all but that one.
// Rows without drafts take a dense step.
void RunVerifiedRound(ModelRunner& runner, std::vector<DraftRow>& rows);

// How many tokens to draft after a round with drafts: one more if all were kept, else as many as
// were. The number follows the text, without a model of what a pass costs.
int64_t NextDraftTokens(const DraftRow& row);

}  // namespace tidal
