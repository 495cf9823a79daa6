// Decoder::Score: given tokens go through the model as a request beside others, for their logits.
#include <gtest/gtest.h>

#include "session_test.h"
#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

class Scores : public SessionTest {};

// Prompts of several chunks, steps and corrections, while others read and decode.
TEST_P(Scores, AreTheSameWhateverElseRuns) {
  if (!is_cpu()) GTEST_SKIP() << "on CUDA rows agree to rounding only";
  const Prompts prompts = MakePrompts({150, 70, 20});
  for (DecodeConfig config : {Dense(), Tidal(), Corrected(5)}) {
    config.max_chunk_ms = 1e-3;  // others read a page at a time beside them
    config.prefix_cache = true;
    std::vector<std::vector<float>> want;
    std::vector<Ints> texts;
    for (const Ints& prompt : prompts) {
      const auto alone = Make(config);
      want.push_back(DecodeLogits(*alone, prompt, static_cast<int64_t>(prompt.size()) - 15));
      texts.push_back(One(*alone, prompt, Greedy(30)));
    }
    const auto decoder = Make(config);
    for (size_t i = 0; i < prompts.size(); ++i) {
      const auto length = static_cast<int64_t>(prompts[i].size());
      const auto text = decoder->Start({prompts[i], prompts[0]}, {Greedy(30), Greedy(9)});
      const auto scored = decoder->Score(prompts[i], length - 15, 16);
      const auto other = decoder->Score(prompts[0], 100, 51);
      for (Generation* call : {text.get(), scored.get(), other.get()}) Finish(*call);
      EXPECT_TRUE(SameBits(Bits(scored->TakeLogits(0)), Bits(want[i]), 4)) << i;
      EXPECT_TRUE(scored->results()[0].token_ids.empty());
      EXPECT_EQ(scored->results()[0].finish_reason, FinishReason::kLength);
      EXPECT_EQ(text->results()[0].token_ids.size(), texts[i].size());
    }
    EXPECT_EQ(decoder->num_free_pages(), decoder->config().num_pages);
  }
}

TEST_P(Scores, GoThroughThePlanOfADecoderThatVerifies) {
  const Ints text = MakePrompts({120})[0];
  const auto decoder = Make(Verified());
  const auto got = DecodeLogits(*decoder, text, 100);
  EXPECT_TRUE(SameBits(Bits(got), Bits(DecodeLogits(*Make(Tidal()), text, 100)), 4));
  EXPECT_THROW(decoder->Selection(0), InvalidArgument) << "it is no call of prompts";
}

TEST_P(Scores, TellHowFarTheyHaveRead) {
  const Ints text = MakePrompts({200})[0];
  const auto decoder = Make(Dense());
  const auto call = decoder->Score(text, 190, 1);
  EXPECT_EQ(call->prefill_progress().tokens_total, 190);
  int64_t done = 0;
  while (!call->done()) {
    EXPECT_TRUE(call->Advance().empty());
    EXPECT_GE(call->prefill_progress().tokens_done, done);
    done = call->prefill_progress().tokens_done;
  }
  EXPECT_EQ(done, 190);
  const auto want = DecodeLogits(*decoder, text, 190);
  const std::vector<float> last(want.end() - model_.vocab_size, want.end());
  EXPECT_EQ(call->TakeLogits(0), last);
  EXPECT_TRUE(Throws<InvalidArgument>([&] { call->TakeLogits(0); }, {"have been taken"}));
}

TEST_P(Scores, LeaveNothingBehindWhenTheyAreGivenUp) {
  const Ints text = MakePrompts({300})[0];
  const auto decoder = Make(Tidal());
  const Ints want = One(*decoder, text, Greedy(9));
  const auto running = decoder->Start({text}, {Greedy(9)});
  for (int passes = 0; passes < 4; ++passes) {
    const auto call = decoder->Score(text, 200, 101);
    for (int i = 0; i < passes; ++i) call->Advance();
    EXPECT_TRUE(Throws<InvalidArgument>([&] { call->TakeLogits(0); }, {"not all there"}));
    if (passes % 2 == 0) call->Close();
  }
  EXPECT_EQ(Finish(*running)[0].token_ids.size(), want.size());
  EXPECT_EQ(decoder->num_free_pages(), decoder->config().num_pages);
  EXPECT_EQ(decoder->num_free_rows(), 4);
}

// It waits in line for a row and for pages; what nobody gives back it says.
TEST_P(Scores, WaitForPages) {
  DecodeConfig config = Dense();
  config.num_pages = 10;
  const auto decoder = Make(config);
  const Ints text = MakePrompts({100})[0];
  const auto want = DecodeLogits(*decoder, text, 90);
  const auto running = decoder->Start({MakePrompts({60})[0]}, {Greedy(60)});
  const auto waits = decoder->Score(text, 90, 11);
  Finish(*waits);
  EXPECT_TRUE(SameBits(Bits(waits->TakeLogits(0)), Bits(want), 4));
  Finish(*running);

  auto session = decoder->StartSession();
  Read(*session, MakePrompts({80})[0]);
  const auto stuck = decoder->Score(text, 90, 11);
  EXPECT_TRUE(Throws<CapacityError>([&] { Finish(*stuck); }, {"7 pages", "close sessions"}));
  EXPECT_TRUE(Throws<InvalidArgument>([&] { stuck->TakeLogits(0); }, {"not all there"}));
  session->Close();
  EXPECT_TRUE(SameBits(Bits(DecodeLogits(*decoder, text, 90)), Bits(want), 4));
  EXPECT_TRUE(Throws<CapacityError>([&] { decoder->Score(MakePrompts({161})[0], 9, 1); },
                                    {"11 pages", "have 10"}));
}

TEST_P(Scores, EndWithTheirDecoder) {
  const Ints text = MakePrompts({300})[0];
  const auto decoder = Make(Dense());
  const auto call = decoder->Score(text, 10, 1);
  call->Advance();
  decoder->Close();
  EXPECT_TRUE(Throws<InvalidArgument>([&] { Finish(*call); }, {"decoder", "closed"}));
  EXPECT_TRUE(Throws<InvalidArgument>([&] { decoder->Score(text, 1, 1); }, {"closed"}));
}

INSTANTIATE_TEST_SUITE_P(Backends, Scores, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
