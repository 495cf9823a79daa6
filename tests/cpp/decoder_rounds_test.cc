// Verified decoding, what holds on every device: rounds are the same each time, and everything is
// counted and comes back.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tidal/decoder.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

class Verifications : public DecoderTest {
 protected:
  DecodeConfig Verified(Drafts drafts = Drafts::kTidal) const {
    DecodeConfig config = drafts == Drafts::kNgram ? Dense() : Tidal();
    config.verify = true;
    config.drafts = drafts;
    return config;
  }
};

TEST_P(Verifications, AreDeterministicWithGraphsAndWithout) {
  const Prompts prompts = MakePrompts({150, 40, 90, 3});
  for (const Drafts drafts : {Drafts::kTidal, Drafts::kNgram, Drafts::kBoth}) {
    DecodeConfig config = Verified(drafts);
    const auto decoder = Make(config);
    const auto want = Generate(*decoder, prompts, Greedy(60));
    const auto again = Generate(*decoder, prompts, Greedy(60));
    config.cuda_graphs = false;
    const auto eager = Generate(*Make(config), prompts, Greedy(60));
    for (size_t i = 0; i < prompts.size(); ++i) {
      EXPECT_EQ(want[i].token_ids.size(), 60u);
      EXPECT_EQ(again[i].token_ids, want[i].token_ids);
      EXPECT_EQ(eager[i].token_ids, want[i].token_ids);
      EXPECT_EQ(eager[i].verification.drafted_tokens, want[i].verification.drafted_tokens);
    }
  }
}

TEST_P(Verifications, SampleTheSameTokensForTheSameSeeds) {
  const Prompts prompts = MakePrompts({150, 40, 90, 3});
  std::vector<SamplingParams> params(4, Greedy(40));
  for (size_t i = 0; i < 4; ++i) {
    params[i].temperature = 0.7 + 0.1 * static_cast<double>(i);
    params[i].top_p = 0.9;
    params[i].seed = i;
  }
  const auto decoder = Make(Verified());
  const auto first = Finish(*decoder->Start(prompts, params));
  const auto again = Finish(*decoder->Start(prompts, params));
  for (SamplingParams& each : params) each.seed += 100;
  const auto other = Finish(*decoder->Start(prompts, params));
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(first[i].token_ids.size(), 40u);
    EXPECT_EQ(first[i].token_ids, again[i].token_ids);
    EXPECT_NE(first[i].token_ids, other[i].token_ids);
  }
}

// A text that turns in circles is drafted from itself.
TEST_P(Verifications, TellWhereDraftsCameFrom) {
  const Prompts prompts = KnowFewTokens(MakePrompts({150}));
  Verification counts[3];
  for (const Drafts drafts : {Drafts::kTidal, Drafts::kNgram, Drafts::kBoth}) {
    DecodeConfig config = Verified(drafts);
    config.token_budget = 4;
    const auto result = Generate(*Make(config), prompts, Greedy(200))[0];
    counts[static_cast<size_t>(drafts)] = result.verification;
    EXPECT_EQ(result.verification.accepted_tokens + result.verification.dense_passes, 199);
  }
  const auto& [tidal, ngram, both] = counts;
  EXPECT_EQ(tidal.ngram_tokens, 0);
  EXPECT_EQ(ngram.ngram_tokens, ngram.drafted_tokens);
  EXPECT_GT(ngram.accepted_tokens, 20) << "the text does not repeat itself: choose another";
  EXPECT_LT(ngram.accepted_tokens, ngram.drafted_tokens);
  EXPECT_GT(both.ngram_tokens, 0);
  EXPECT_LT(both.ngram_tokens, both.drafted_tokens);
}

// Rows keep drafts at their own pace, own what they need, and give it back whenever they end.
TEST_P(Verifications, CountForEachRowAndFreeAllOfThem) {
  const auto decoder = Make(Verified());
  const int64_t pages = decoder->num_free_pages(), rows = decoder->num_free_rows();
  const Prompts prompts = MakePrompts({150, 40, 90, 250});
  {
    const auto generation = decoder->Start(prompts, std::vector(4, Greedy(60)));
    while (!generation->done()) generation->Advance();
    std::vector<int64_t> kept;
    for (const SequenceResult& result : generation->results()) {
      const Verification& counts = result.verification;
      EXPECT_EQ(counts.accepted_tokens + counts.dense_passes, 59);
      EXPECT_LE(counts.accepted_tokens, counts.drafted_tokens);
      EXPECT_LE(counts.drafted_tokens, 16 * counts.dense_passes);
      kept.push_back(counts.accepted_tokens);
    }
    std::sort(kept.begin(), kept.end());
    EXPECT_LT(kept.front(), kept.back()) << "the rows kept as many: choose other prompts";
    // Ended sequences hold nothing, even while their call lives.
    EXPECT_EQ(decoder->num_free_pages(), pages);
    EXPECT_EQ(decoder->num_free_rows(), rows);
  }
  {
    const auto left = decoder->Start(prompts, std::vector(4, Greedy(60)));
    while (left->results()[3].token_ids.size() < 7) left->Advance();
    EXPECT_LT(decoder->num_free_pages(), pages);
  }
  EXPECT_EQ(decoder->num_free_pages(), pages);
  EXPECT_EQ(decoder->num_free_rows(), rows);
}

// Teacher forcing dense steps with the tokens: each is the best, or as good to rounding.
TEST_P(Verifications, DrawTheBestTokensOfDenseDecoding) {
  const Ints prompt = MakePrompts({150})[0];
  const Ints tokens = Generate(*Make(Verified()), {prompt}, Greedy(60))[0].token_ids;
  Ints text = prompt;
  text.insert(text.end(), tokens.begin(), tokens.end() - 1);
  const auto logits = DecodeLogits(*Make(Dense()), text, 150);
  double size = 0.0;
  for (float logit : logits) size = std::max(size, std::abs(static_cast<double>(logit)));
  for (size_t i = 0; i < tokens.size(); ++i) {
    const auto row = logits.begin() + static_cast<int64_t>(i) * model_.vocab_size;
    const double best = *std::max_element(row, row + model_.vocab_size);
    EXPECT_LE(best - row[tokens[i]], size * ToleranceFor(Op::kLogits, GetParam().dtype).rel) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, Verifications, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
