// Sequence: tokens with the memory they own: a prompt and what was generated after it, in a session
// perhaps several times in turn.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "backend/op_args.h"
#include "kv/sequence_pages.h"
#include "tidal/plan.h"

namespace tidal {

class TokenRules;  // decode/token_rules.h

struct Sequence {
  uint64_t id = 0;  // unique in the decoder's life, another one for each turn of a session
  std::vector<int32_t> tokens;
  int64_t dense_len = 0;   // tokens up to here are read densely, those behind were generated
  int64_t cached = 0;      // tokens whose K and V are in the cache
  int64_t num_sparse = 0;  // the last of those: K and V are from sparse steps
  int64_t clean_len = 0;   // tokens from the first on whose K and V are those of dense reading
  // Tokens from the first on whose keys are in the shadow of this plan as they are in the cache.
  PlanId shadow_plan = PlanId::kDense;  // a dense plan has no shadow
  int64_t shadowed = 0;
  SequencePages pages;          // for the longest the sequence, or its turn, can become
  std::vector<float> inv_freq;  // [head_dim / 2]; stays as it is
  // How its next tokens are drawn: SetSampling (decode/sampler.h).
  SamplingRow sampling;
  std::shared_ptr<const TokenRules> rules{};  // null: none
  int64_t num_given = 0;  // tokens that do not count as generated, the first ones

  bool prefilled() const { return cached >= dense_len; }

  // Forgets what is cached of the tokens from `length` on. The tokens stay, and so do the pages.
  void Rewind(int64_t length) {
    const int64_t dropped = std::max<int64_t>(cached - length, 0);
    cached -= dropped;
    num_sparse = std::max<int64_t>(num_sparse - dropped, 0);
    clean_len = std::min(clean_len, cached);
    shadowed = std::min(shadowed, cached);
  }
};

}  // namespace tidal
