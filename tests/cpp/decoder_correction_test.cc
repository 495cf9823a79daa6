// Cache correction: after it the cache is as if what was decoded had been prefilled.
#include <gtest/gtest.h>

#include <algorithm>

#include "tidal/decoder.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

class Corrections : public DecoderTest {
 protected:
  DecodeConfig Corrected(int64_t interval) const {
    DecodeConfig config = Tidal();
    config.correction_interval = interval;
    return config;
  }

  std::vector<float> LastRow(const std::vector<float>& logits) const {
    return {logits.end() - model_.vocab_size, logits.end()};
  }
  std::vector<float> Row(const std::vector<float>& logits, int64_t row) const {
    const auto begin = logits.begin() + row * model_.vocab_size;
    return {begin, begin + model_.vocab_size};
  }
};

// With the interval T, token i of those decoded sees tokens that were decoded sparsely since the
// last multiple of T, and before them the cache of a prefill: as in a call whose prompt ends there.
TEST_P(Corrections, LeaveTheCacheOfAPrefill) {
  const Ints text = MakePrompts({240})[0];
  constexpr int64_t kPrefill = 90;
  const auto plain = Make(Tidal());
  const double tolerance = ToleranceFor(Op::kLogits, GetParam().dtype).rel;
  const auto uncorrected = DecodeLogits(*plain, text, kPrefill);
  Values errors;
  for (int64_t interval : {1, 5, 9, 70}) {  // prefill_chunk is 64
    const auto corrected = DecodeLogits(*Make(Corrected(interval)), text, kPrefill);
    for (int64_t decoded : {1, 5, 6, 10, 70, 71, 75, 150}) {
      SCOPED_TRACE(::testing::Message() << "interval " << interval << ", token " << decoded);
      const int64_t since = (decoded - 1) % interval + 1;
      const Ints seen(text.begin(), text.begin() + kPrefill + decoded);
      const auto want = LastRow(DecodeLogits(*plain, seen, kPrefill + decoded - since));
      errors.push_back(RelativeError(Widen(Row(corrected, decoded)), Widen(want)));
      if (GetParam().dtype != DType::kFloat32) continue;
      EXPECT_LT(errors.back(), tolerance);
      if (since < decoded) {
        EXPECT_GT(RelativeError(Widen(Row(uncorrected, decoded)), Widen(want)), tolerance)
            << "there was nothing to correct";
      }
    }
  }
  // In 16 bits rounding swaps positions at the edge of a set now and then, which moves that step's
  // logits by more than rounding: the median is free of it.
  std::nth_element(errors.begin(), errors.begin() + errors.size() / 2, errors.end());
  EXPECT_LT(errors[errors.size() / 2], tolerance);
}

TEST_P(Corrections, AreNotMadeBeforeTheIntervalIsFull) {
  const Ints text = MakePrompts({240})[0];
  const auto want = DecodeLogits(*Make(Tidal()), text, 200);
  const auto late = DecodeLogits(*Make(Corrected(39)), text, 200);
  EXPECT_TRUE(SameBits(Bits({late.begin(), late.end() - model_.vocab_size}),
                       Bits({want.begin(), want.end() - model_.vocab_size}), 4));
  EXPECT_NE(LastRow(late), LastRow(want));
  EXPECT_TRUE(SameBits(Bits(DecodeLogits(*Make(Corrected(40)), text, 200)), Bits(want), 4));
}

TEST_P(Corrections, LeaveDenseStepsAlone) {
  const Ints text = MakePrompts({240})[0];
  DecodeConfig dense = Dense();
  dense.correction_interval = 1;
  EXPECT_TRUE(SameBits(Bits(DecodeLogits(*Make(dense), text, 200)),
                       Bits(DecodeLogits(*Make(Dense()), text, 200)), 4));
  // Up to 220 tokens steps are dense; the interval counts the sparse ones after them.
  DecodeConfig config = Tidal();
  config.sparse_min_context = 220;
  const auto want = DecodeLogits(*Make(config), text, 200);
  config.correction_interval = 20;
  EXPECT_TRUE(SameBits(Bits(DecodeLogits(*Make(config), text, 200)), Bits(want), 4));
  config.correction_interval = 19;
  EXPECT_NE(LastRow(DecodeLogits(*Make(config), text, 200)), LastRow(want));
}

// Generate and DecodeLogits take the same steps.
TEST_P(Corrections, AreMadeWhileGenerating) {
  const auto decoder = Make(Corrected(4));
  const Ints prompt = MakePrompts({120})[0];
  const Ints tokens = Generate(*decoder, {prompt}, Greedy(30))[0].token_ids;
  Ints text = prompt;
  text.insert(text.end(), tokens.begin(), tokens.end() - 1);
  const auto logits = DecodeLogits(*decoder, text, 120);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const auto row = Row(logits, static_cast<int64_t>(i));
    EXPECT_EQ(std::max_element(row.begin(), row.end()) - row.begin(), tokens[i]) << i;
  }
  EXPECT_NE(tokens, Generate(*Make(Tidal()), {prompt}, Greedy(30))[0].token_ids)
      << "choose another seed";
}

TEST_P(Corrections, DoNotMixTheRowsOfABatch) {
  if (!is_cpu()) GTEST_SKIP() << "compares batch rows with rows alone, bitwise only on the CPU";
  // One row within the budget, one that grows out of it, two that are corrected at other steps and
  // end while others go on.
  const Prompts prompts = MakePrompts({2, 25, 90, 131});
  const auto decoder = Make(Corrected(6));
  std::vector<SamplingParams> params = {Greedy(25), Greedy(40), Greedy(33), Greedy(17)};
  params[2].stop_token_ids = {Generate(*decoder, {prompts[2]}, params[2])[0].token_ids[20]};
  const auto together = Finish(*decoder->Start(prompts, params));
  for (size_t i = 0; i < prompts.size(); ++i) {
    EXPECT_EQ(Generate(*decoder, {prompts[i]}, params[i])[0].token_ids, together[i].token_ids);
  }
  EXPECT_EQ(together[2].finish_reason, FinishReason::kStop);
}

TEST_P(Corrections, FitWhereTheSequenceFits) {
  for (int64_t interval : {1, 3, 11, 12}) {
    const auto decoder = Make(Corrected(interval));
    const int64_t all = decoder->num_free_pages();
    EXPECT_EQ(Generate(*decoder, MakePrompts({500}), Greedy(12))[0].token_ids.size(), 12u);
    EXPECT_EQ(decoder->num_free_pages(), all);
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, Corrections, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
