#include "decode/token_rules.h"

#include <algorithm>

namespace tidal {
namespace {

constexpr uint32_t kAllAllowed = ~uint32_t{0};

size_t WordOf(int32_t token_id) {
  return static_cast<size_t>(token_id / kMaskWordBits);
}
uint32_t BitOf(int32_t token_id) {
  return uint32_t{1} << (token_id % kMaskWordBits);
}

}  // namespace

TokenRules::TokenRules(const SamplingParams& params, int64_t vocab_size)
    : vocab_size_(vocab_size),
      ending_ids_(params.stop_token_ids),
      min_new_tokens_(params.min_new_tokens),
      ngram_size_(params.no_repeat_ngram_size) {
  for (const auto& [token_id, bias] : params.logit_bias) {
    biases_.push_back({token_id, static_cast<float>(bias)});
  }
  if (!params.allowed_token_ids.empty()) {
    always_.assign(static_cast<size_t>(NumMaskWords(vocab_size)), 0);
    for (int32_t token_id : params.allowed_token_ids) always_[WordOf(token_id)] |= BitOf(token_id);
  }
  for (int32_t token_id : params.suppress_tokens) Ban(token_id, always_);
  for (const std::vector<int32_t>& word : params.bad_words) {
    if (word.size() == 1) {
      Ban(word[0], always_);
    } else {
      phrases_.push_back(word);
    }
  }
  // An ending id that no row of the vocabulary has is never drawn.
  std::erase_if(ending_ids_, [&](int32_t id) { return id < 0 || id >= vocab_size; });
}

void TokenRules::Ban(int32_t token_id, std::vector<uint32_t>& mask) const {
  if (mask.empty()) mask.assign(static_cast<size_t>(NumMaskWords(vocab_size_)), kAllAllowed);
  mask[WordOf(token_id)] &= ~BitOf(token_id);
}

// Bans what would end a row of ngram_size_ tokens that has occurred.
void TokenRules::BanRepeats(std::span<const int32_t> tokens, std::vector<uint32_t>& mask) const {
  const auto prefix_len = static_cast<size_t>(ngram_size_ - 1);
  if (prefix_len >= tokens.size()) return;
  const auto prefix = tokens.last(prefix_len);
  for (size_t end = prefix_len; end < tokens.size(); ++end) {
    const auto other = tokens.subspan(end - prefix_len, prefix_len);
    if (std::equal(prefix.rbegin(), prefix.rend(), other.rbegin())) Ban(tokens[end], mask);
  }
}

std::vector<uint32_t> TokenRules::MaskAfter(std::span<const int32_t> tokens,
                                            int64_t num_given) const {
  std::vector<uint32_t> mask = always_;
  if (static_cast<int64_t>(tokens.size()) - num_given < min_new_tokens_) {
    for (int32_t token_id : ending_ids_) Ban(token_id, mask);
  }
  if (ngram_size_ > 0) BanRepeats(tokens, mask);
  for (const std::vector<int32_t>& phrase : phrases_) {
    const size_t prefix_len = phrase.size() - 1;
    if (prefix_len > tokens.size()) continue;
    if (std::equal(phrase.begin(), phrase.end() - 1, tokens.last(prefix_len).begin())) {
      Ban(phrase.back(), mask);
    }
  }
  return mask;
}

std::shared_ptr<const TokenRules> MakeTokenRules(const SamplingParams& p, int64_t vocab_size) {
  const bool has_rules = !p.logit_bias.empty() || !p.suppress_tokens.empty() ||
                         !p.bad_words.empty() || !p.allowed_token_ids.empty() ||
                         p.min_new_tokens > 0 || p.no_repeat_ngram_size > 0;
  if (!has_rules) return nullptr;
  return std::make_shared<const TokenRules>(p, vocab_size);
}

}  // namespace tidal
