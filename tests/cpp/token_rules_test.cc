// TokenRules: which tokens may follow others. No device.
#include "decode/token_rules.h"

#include <gtest/gtest.h>

#include "reference.h"

namespace tidal::test {
namespace {

constexpr int64_t kVocab = 70;  // of three words, the last not whole

// The ids that may not follow, of those of the vocabulary.
Ints BannedAfter(const SamplingParams& params, const Ints& tokens, int64_t num_given = 0) {
  const std::vector<uint32_t> mask = TokenRules(params, kVocab).MaskAfter(tokens, num_given);
  Ints banned;
  if (mask.empty()) return banned;
  EXPECT_EQ(mask.size(), static_cast<size_t>(NumMaskWords(kVocab)));
  for (int32_t id = 0; id < kVocab; ++id) {
    if ((mask[static_cast<size_t>(id / 32)] >> (id % 32) & 1) == 0) banned.push_back(id);
  }
  return banned;
}

TEST(TokenRules, ThereAreNoneForParametersThatBanNothing) {
  SamplingParams params;
  params.repetition_penalty = 1.3;
  params.presence_penalty = 1.0;
  params.stop_token_ids = {3};
  EXPECT_EQ(MakeTokenRules(params, kVocab), nullptr);
  params.min_new_tokens = 1;
  EXPECT_NE(MakeTokenRules(params, kVocab), nullptr);
}

TEST(TokenRules, EndingIdsMayNotComeBeforeSoManyNewTokens) {
  SamplingParams params;
  params.stop_token_ids = {5, 69, 70, -1};  // the last two are no tokens of the vocabulary
  params.min_new_tokens = 2;
  EXPECT_EQ(BannedAfter(params, {1, 2, 3}, 3), (Ints{5, 69}));
  EXPECT_EQ(BannedAfter(params, {1, 2, 3}, 2), (Ints{5, 69}));
  EXPECT_EQ(BannedAfter(params, {1, 2, 3}, 1), Ints{});
}

TEST(TokenRules, NoRowOfTokensOccursTwice) {
  SamplingParams params;
  params.no_repeat_ngram_size = 3;
  EXPECT_EQ(BannedAfter(params, {1, 2}), Ints{});
  EXPECT_EQ(BannedAfter(params, {1, 2, 7, 1, 2, 40, 1, 2}, 8), (Ints{7, 40})) << "the prompt's too";
  EXPECT_EQ(BannedAfter(params, {4, 4, 4}), (Ints{4}));
  params.no_repeat_ngram_size = 1;
  EXPECT_EQ(BannedAfter(params, {6, 33, 6}), (Ints{6, 33}));
  params.no_repeat_ngram_size = 9;
  EXPECT_EQ(BannedAfter(params, {1, 2, 3}), Ints{});
}

TEST(TokenRules, ABadWordIsNotCompleted) {
  SamplingParams params;
  params.bad_words = {{9}, {1, 2}, {3, 1, 4}};
  EXPECT_EQ(BannedAfter(params, {5}), (Ints{9}));
  EXPECT_EQ(BannedAfter(params, {5, 1}), (Ints{2, 9}));
  EXPECT_EQ(BannedAfter(params, {3, 1}), (Ints{2, 4, 9}));
  EXPECT_EQ(BannedAfter(params, {}), (Ints{9}));
}

TEST(TokenRules, SuppressedAndAllowedTokensComeTogether) {
  SamplingParams params;
  params.suppress_tokens = {0, 31, 32, 69};
  EXPECT_EQ(BannedAfter(params, {1}), (Ints{0, 31, 32, 69}));
  params.allowed_token_ids = {31, 33, 68};
  const Ints banned = BannedAfter(params, {1});
  EXPECT_EQ(banned.size(), kVocab - 2u);
  for (int32_t id : {33, 68}) EXPECT_EQ(std::count(banned.begin(), banned.end(), id), 0);
}

TEST(TokenRules, BiasesAreThoseGiven) {
  SamplingParams params;
  params.logit_bias = {{4, -100.0}, {69, 1.5}};
  const auto rules = MakeTokenRules(params, kVocab);
  ASSERT_EQ(rules->biases().size(), 2u);
  EXPECT_EQ(rules->biases()[1].token_id, 69);
  EXPECT_EQ(rules->biases()[1].bias, 1.5f);
  EXPECT_TRUE(rules->MaskAfter(Ints{1}, 1).empty());
}

}  // namespace
}  // namespace tidal::test
