// Replay: the same prompts through one plan after the other, each as a decoder of that plan alone.
#include <gtest/gtest.h>

#include "throws.h"
#include "tidal/decoder.h"
#include "tidal/error.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

class Replays : public DecoderTest {
 protected:
  // Plans that differ in everything that makes one.
  std::vector<DecodeConfig> Plans() const {
    DecodeConfig other = Tidal();
    other.select_layers = {3};
    other.full_layers = 1;
    other.token_budget = 48;
    other.granularity = Granularity::kHead;
    other.sink_tokens = 3;
    other.recent_tokens = 9;
    DecodeConfig pooled = Tidal();
    pooled.granularity = Granularity::kLayer;
    pooled.pooling = Pooling::kMax;
    pooled.token_budget = 16;
    DecodeConfig adaptive = Tidal();
    adaptive.top_p_mass = 0.7;
    adaptive.min_token_budget = 8;
    return {Tidal(), Dense(), other, Corrected(), pooled, adaptive, Tidal()};
  }

  DecodeConfig Corrected() const {
    DecodeConfig config = Tidal();
    config.correction_interval = 5;
    return config;
  }

  // A replay that has read its prompts.
  static std::unique_ptr<Replay> Open(Decoder& decoder, const Prompts& prompts, int64_t room) {
    auto replay = decoder.StartReplay(prompts, room);
    Finish(*replay->Read());
    return replay;
  }
  static std::vector<std::vector<float>> StepLogits(Replay& replay, const PlanConfig& plan,
                                                    const Prompts& continuations) {
    const auto run = replay.StepLogits(plan, continuations);
    Finish(*run);
    std::vector<std::vector<float>> logits;
    for (size_t i = 0; i < continuations.size(); ++i) {
      logits.push_back(run->TakeLogits(static_cast<int64_t>(i)));
    }
    return logits;
  }
  static Prompts Most(Replay& replay, const PlanConfig& plan, int64_t count,
                      const Ints& stop_token_ids = {}) {
    Prompts outputs;
    for (const SequenceResult& result : Finish(*replay.Greedy(plan, count, stop_token_ids))) {
      outputs.push_back(result.token_ids);
    }
    return outputs;
  }
  static double MeanSetSize(Generation& run) {
    ChosenSets all;
    for (const SequenceResult& result : Finish(run)) {
      all.num_sets += result.sets.num_sets;
      all.num_positions += result.sets.num_positions;
    }
    if (all.num_sets == 0) return 0.0;
    return static_cast<double>(all.num_positions) / static_cast<double>(all.num_sets);
  }

  const Prompts prompts_ = MakePrompts({150, 100, 130});
};

TEST_P(Replays, DecodeAsADecoderOfThePlan) {
  if (!is_cpu()) GTEST_SKIP() << "on CUDA rows agree to rounding only";
  for (const DecodeConfig& own : {Dense(), Tidal()}) {
    const auto decoder = Make(own);
    const auto replay = Open(*decoder, prompts_, 40);
    for (const DecodeConfig& plan : Plans()) {
      const auto want = Generate(*Make(plan), prompts_, Greedy(40));
      const auto got = Most(*replay, plan, 40);
      for (size_t i = 0; i < prompts_.size(); ++i) EXPECT_EQ(got[i], want[i].token_ids);
    }
  }
}

// Where steps are recorded, those of plans that come, go and come again are.
TEST_P(Replays, RecordedStepsAreThePlainOnes) {
  const Prompts continuations = MakePrompts({12, 5, 9}, 3);
  for (const DecodeConfig& own : {Dense(), Tidal()}) {
    DecodeConfig plain = own;
    plain.cuda_graphs = false;
    const auto decoder = Make(own), unrecorded = Make(plain);
    const auto replay = Open(*decoder, prompts_, 20);
    const auto want = Open(*unrecorded, prompts_, 20);
    for (const DecodeConfig& plan : Plans()) {
      const auto got_logits = StepLogits(*replay, plan, continuations);
      const auto want_logits = StepLogits(*want, plan, continuations);
      for (size_t i = 0; i < prompts_.size(); ++i) {
        EXPECT_TRUE(SameBits(Bits(got_logits[i]), Bits(want_logits[i]), 4)) << i;
      }
      EXPECT_EQ(Most(*replay, plan, 12), Most(*want, plan, 12));
      // The decoder's own steps between them.
      EXPECT_EQ(Generate(*decoder, {prompts_[1]}, Greedy(6))[0].token_ids,
                Generate(*unrecorded, {prompts_[1]}, Greedy(6))[0].token_ids);
    }
  }
}

TEST_P(Replays, LogitsAreThoseOfADecoderOfThePlan) {
  const auto decoder = Make(Dense());
  const auto replay = Open(*decoder, prompts_, 20);
  const Prompts continuations = MakePrompts({20, 0, 7}, 3);
  for (const DecodeConfig& plan : Plans()) {
    const auto got = StepLogits(*replay, plan, continuations);
    for (size_t i = 0; i < prompts_.size(); ++i) {
      Ints text = prompts_[i];
      text.insert(text.end(), continuations[i].begin(), continuations[i].end());
      const auto want = DecodeLogits(*Make(plan), text, static_cast<int64_t>(prompts_[i].size()));
      ASSERT_EQ(got[i].size(), want.size());
      if (is_cpu()) {
        EXPECT_TRUE(SameBits(Bits(got[i]), Bits(want), 4));
      } else {
        EXPECT_LT(RelativeError(Widen(got[i]), Widen(want)),
                  ToleranceFor(Op::kLogits, GetParam().dtype).rel);
      }
    }
  }
}

// Prompts that begin alike, at and beside the ends of pages, and one that is there twice.
TEST_P(Replays, ReadOnceWhatPromptsBeginWithAlike) {
  Prompts prompts = {prompts_[0]};
  for (size_t kept : {96, 101, 150}) {
    const Ints& longer = prompts[prompts.size() / 2];
    Ints prompt(longer.begin(),
                longer.begin() + static_cast<int64_t>(std::min(kept, longer.size())));
    if (kept < 150) prompt.insert(prompt.end(), prompts_[1].begin(), prompts_[1].begin() + 30);
    prompts.push_back(prompt);
  }
  DecodeConfig scored = Tidal();
  scored.select_layers.clear();
  scored.scored_layers = {1, 3};
  scored.full_layers = 1;
  scored.shadow = Shadow::kInt4;
  const auto decoder = Make(Dense());
  const int64_t num_free = decoder->num_free_pages();
  const auto replay = decoder->StartReplay(prompts, 20);
  const int64_t page_size = decoder->config().page_size;
  const int64_t num_taken = num_free - decoder->num_free_pages();
  EXPECT_LT(num_taken * page_size, 150 + 3 * (50 + 3 * page_size) + 4 * 20);
  replay->Read()->Stop(0, FinishReason::kAbort);  // others read behind it
  const auto reading = replay->Read();
  Finish(*reading);
  EXPECT_EQ(reading->prefill_progress().tokens_done, reading->prefill_progress().tokens_total);
  EXPECT_LT(reading->prefill_progress().tokens_total, 150 + 3 * (30 + page_size) + page_size);
  const Prompts continuations = MakePrompts({20, 0, 7, 20}, 3);
  for (const DecodeConfig& plan : {Dense(), Tidal(), scored, Corrected(), Tidal(), scored}) {
    const auto got = StepLogits(*replay, plan, continuations);
    for (size_t i = 0; i < prompts.size(); ++i) {
      const auto alone = Open(*decoder, {prompts[i]}, 20);
      const auto want = StepLogits(*alone, plan, {continuations[i]})[0];
      // The prompt alone is read in other chunks, which round otherwise; on CUDA that may choose
      // another of two positions that weigh nearly the same.
      const bool chooses =
          !GetParam().is_cpu() && !(plan.select_layers.empty() && plan.scored_layers.empty());
      EXPECT_LT(RelativeError(Widen(got[i]), Widen(want)),
                chooses ? 0.2 : ToleranceFor(Op::kLogits, GetParam().dtype).rel)
          << i;
    }
  }
  replay->Close();
  EXPECT_EQ(decoder->num_free_pages(), num_free);
}

// What a correction changes, and that the next continuation starts without it.
TEST_P(Replays, CorrectTheCacheOfAPlanThatAsksForIt) {
  const auto decoder = Make(Dense());
  const auto replay = Open(*decoder, {prompts_[0]}, 20);
  const Prompts continuation = MakePrompts({20}, 3);
  const auto plain = StepLogits(*replay, Tidal(), continuation)[0];
  const auto corrected = StepLogits(*replay, Corrected(), continuation)[0];
  // Rows 1 to 5 are of steps before the first correction.
  const auto same = 6 * model_.vocab_size;
  EXPECT_TRUE(std::equal(plain.begin(), plain.begin() + same, corrected.begin()));
  EXPECT_FALSE(std::equal(plain.begin() + same, plain.end(), corrected.begin() + same));
  EXPECT_EQ(StepLogits(*replay, Tidal(), continuation)[0], plain);
  DecodeConfig bad = Tidal();
  bad.correction_interval = -1;
  EXPECT_TRUE(Throws<InvalidArgument>([&] { Most(*replay, bad, 4); }, {"correction_interval"}));
}

TEST_P(Replays, TellHowManyPositionsASetHad) {
  const auto decoder = Make(Dense());
  const auto replay = Open(*decoder, prompts_, 20);
  EXPECT_EQ(MeanSetSize(*replay->Greedy(Dense(), 20, {})), 0.0);
  EXPECT_EQ(MeanSetSize(*replay->Greedy(Tidal(), 20, {})),
            static_cast<double>(Tidal().token_budget));
  DecodeConfig adaptive = Tidal();
  adaptive.top_p_mass = 0.7;
  adaptive.min_token_budget = 4;
  const double mean = MeanSetSize(*replay->StepLogits(adaptive, MakePrompts({20, 0, 7}, 3)));
  EXPECT_GE(mean, 4.0);
  EXPECT_LT(mean, static_cast<double>(Tidal().token_budget));
}

TEST_P(Replays, StopAtStopTokens) {
  const auto decoder = Make(Dense());
  const auto replay = Open(*decoder, prompts_, 20);
  const auto all = Most(*replay, Tidal(), 20);
  const int32_t stop = all[0][5];
  const auto stopped = Most(*replay, Tidal(), 20, {stop});
  for (size_t i = 0; i < all.size(); ++i) {
    const auto end = std::find(all[i].begin(), all[i].end(), stop);
    const Ints want(all[i].begin(), end == all[i].end() ? end : end + 1);
    EXPECT_EQ(stopped[i], want);
  }
}

TEST_P(Replays, LeaveTheDecoderAsItWas) {
  const auto decoder = Make(Tidal());
  const int64_t all = decoder->num_free_pages();
  const auto want = Generate(*decoder, {prompts_[0]}, Greedy(20))[0].token_ids;
  const auto chosen = decoder->Selection(0);
  {
    const auto replay = decoder->StartReplay({prompts_[1]}, 20);
    EXPECT_LT(decoder->num_free_pages(), all);
    const auto reading = replay->Read();
    Finish(*reading);
    EXPECT_EQ(reading->prefill_progress().tokens_done, 100);
    EXPECT_EQ(reading->prefill_progress().tokens_total, 100);
    Most(*replay, Plans()[3], 20);
    EXPECT_EQ(decoder->Selection(0)[0].token_idx, chosen[0].token_idx);
  }
  EXPECT_EQ(decoder->num_free_pages(), all);
  EXPECT_EQ(Generate(*decoder, {prompts_[0]}, Greedy(20))[0].token_ids, want);
}

// The pages are a replay's own, all of them; what it decodes densely takes none of them away.
TEST_P(Replays, FitIntoACacheThatTheyFill) {
  DecodeConfig config = Dense();
  config.prefix_cache = true;
  config.num_pages = 10;
  const auto decoder = Make(config);
  const auto replay = Open(*decoder, {prompts_[1]}, 60);
  EXPECT_EQ(decoder->num_free_pages(), 0);
  const Prompts once = Most(*replay, Dense(), 60);
  EXPECT_EQ(Most(*replay, Tidal(), 5)[0].size(), 5u);
  EXPECT_EQ(Most(*replay, Dense(), 60), once);
  EXPECT_EQ(decoder->num_free_pages(), 0);
}

// One call at a time; whoever gives it up leaves the replay as it was.
TEST_P(Replays, GiveACallUp) {
  const auto decoder = Make(Dense());
  auto replay = decoder->StartReplay(prompts_, 40);
  EXPECT_TRUE(Throws<InvalidArgument>([&] { replay->Greedy(Tidal(), 4, {}); },
                                      {"prompt 0", "has not been read"}));
  replay->Read()->Advance();
  Finish(*replay->Read());
  const Prompts want = Most(*replay, Tidal(), 40);
  {
    const auto run = replay->Greedy(Tidal(), 40, {});
    EXPECT_TRUE(Throws<InvalidArgument>([&] { replay->Read(); }, {"a call of it is running"}));
    EXPECT_TRUE(Throws<InvalidArgument>([&] { run->TakeLogits(0); }, {"logits", "not asked"}));
    run->Stop(1, FinishReason::kAbort);
  }
  EXPECT_TRUE(Throws<InvalidArgument>(
      [&] {
        replay->StepLogits(Tidal(), MakePrompts({9, 9, 9}))->TakeLogits(1);
      },
      {"not all"}));
  EXPECT_EQ(Most(*replay, Tidal(), 40), want);
  const auto last = replay->Greedy(Tidal(), 40, {});
  replay->Close();
  EXPECT_TRUE(Throws<InvalidArgument>([&] { replay->Read(); }, {"replay", "closed"}));
  replay.reset();
  EXPECT_EQ(Finish(*last)[0].token_ids, want[0]);
  EXPECT_EQ(decoder->num_free_pages(), decoder->config().num_pages);
}

TEST_P(Replays, RefuseWhatDoesNotFit) {
  const auto decoder = Make(Dense());
  EXPECT_TRUE(
      Throws<CapacityError>([&] { Open(*decoder, {prompts_[0]}, 400); }, {"max_seq_len 512"}));
  EXPECT_TRUE(Throws<InvalidArgument>([&] { decoder->StartReplay({{}}, 4); }, {"prompt 0"}));
  const auto replay = Open(*decoder, {prompts_[0]}, 4);
  EXPECT_TRUE(Throws<InvalidArgument>([&] { StepLogits(*replay, Tidal(), {}); },
                                      {"continuations: got 0", "(1)"}));
  EXPECT_TRUE(
      Throws<InvalidArgument>([&] { StepLogits(*replay, Tidal(), {{-1}}); }, {"token id -1"}));
  EXPECT_TRUE(Throws<CapacityError>([&] { StepLogits(*replay, Tidal(), {Ints(5, 1)}); },
                                    {"5 tokens", "max_new_tokens 4"}));
  EXPECT_TRUE(Throws<CapacityError>([&] { Most(*replay, Tidal(), 5); }, {"got 5"}));
  DecodeConfig bad = Tidal();
  bad.token_budget = 1;
  bad.sink_tokens = 5;
  EXPECT_TRUE(Throws<InvalidArgument>([&] { Most(*replay, bad, 4); }, {"token_budget"}));
}

INSTANTIATE_TEST_SUITE_P(Backends, Replays, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
