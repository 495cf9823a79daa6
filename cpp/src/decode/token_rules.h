// TokenRules: which tokens may follow others. What a request asks of its text that no penalty
// expresses: computed on the host from the tokens so far, drawn by on the device as a mask.
//
// Meaning of each rule: SamplingParams (tidal/config.h) and the logits processors of the same names
// in transformers (generation/logits_process.py).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/op_args.h"
#include "tidal/config.h"

namespace tidal {

class TokenRules {
 public:
  // `params`: ValidateSamplingParams has passed them.
  TokenRules(const SamplingParams& params, int64_t vocab_size);

  // Returns the mask of the token that follows `tokens`, of which the first num_given were not
  // generated: [NumMaskWords(vocab_size)]; empty if every token may.
  std::vector<uint32_t> MaskAfter(std::span<const int32_t> tokens, int64_t num_given) const;

  const std::vector<TokenBias>& biases() const { return biases_; }

 private:
  void Ban(int32_t token_id, std::vector<uint32_t>& mask) const;
  void BanRepeats(std::span<const int32_t> tokens, std::vector<uint32_t>& mask) const;

  int64_t vocab_size_;
  std::vector<TokenBias> biases_;
  std::vector<uint32_t> always_;  // the mask of what holds at every token; empty: nothing does
  std::vector<std::vector<int32_t>> phrases_;  // bad words of several tokens
  std::vector<int32_t> ending_ids_;
  int64_t min_new_tokens_;
  int64_t ngram_size_;  // 0 = off
};

// Returns null where the parameters have no biases and ban nothing.
std::shared_ptr<const TokenRules> MakeTokenRules(const SamplingParams& params, int64_t vocab_size);

}  // namespace tidal
