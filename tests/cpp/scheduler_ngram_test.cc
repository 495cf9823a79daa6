// Drafts from the text: what is put into passes, and that the tokens stay those of dense decoding.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "engine/scheduler.h"
#include "scheduler_rig.h"

namespace tidal::test {
namespace {

using Passes = std::vector<std::string>;

Request Drafting(Drafts drafts, int64_t max_new_tokens, int64_t draft_tokens = 0) {
  Request request = TidalRequest(max_new_tokens, 4);
  request.decoding.verifies = true;
  request.decoding.drafts = drafts;
  request.decoding.draft_tokens = draft_tokens;
  return request;
}

// A model that only knows so many tokens, and so repeats itself.
RigOptions Repeating(int32_t vocab_size) {
  RigOptions options;
  options.vocab_size = vocab_size;
  return options;
}

// A prompt whose end, with the token that the model draws behind it, has occurred in it before:
// 7 f 8 z 7, and f comes next.
Tokens PromptThatRepeats() {
  for (int32_t z = 0;; ++z) {
    for (int32_t f = 0; f < kVocabSize; ++f) {
      const Tokens prompt = {7, f, 8, z, 7};
      if (FakeModel::Continue(prompt, 1)[0] == f) return prompt;
    }
  }
}

TEST(SchedulerNgrams, AreCheckedWithoutAStepAndMoreAreTriedWhenAllAreKept) {
  Rig rig(Repeating(1));
  const RequestId id = rig.Submit(Tokens(6, 0), Drafting(Drafts::kNgram, 60));
  rig.StepUntilDone();
  EXPECT_EQ(rig.passes,
            (Passes{"plan 0: 0 +6 draw 1", "plan 0: 6 +5 draw 5", "plan 0: 11 +9 draw 9",
                    "plan 0: 20 +17 draw 17", "plan 0: 37 +17 draw 17", "plan 0: 54 +11 draw 11"}));
  EXPECT_EQ(rig.Generated(id), Tokens(60, 0));
  const Verification& counts = rig.scheduler.Get(id).verification;
  EXPECT_EQ(counts.drafted_tokens, 54);
  EXPECT_EQ(counts.ngram_tokens, 54);
  EXPECT_EQ(counts.accepted_tokens, 54);
  EXPECT_EQ(counts.dense_passes, 5);
}

TEST(SchedulerNgrams, WithoutAnyADenseStepDecides) {
  Rig rig;
  const RequestId id = rig.Submit(MakePrompt(1, 6), Drafting(Drafts::kNgram, 4));
  rig.StepUntilDone();
  EXPECT_EQ(rig.passes, (Passes{"plan 0: 0 +6 draw 1", "plan 0: 6 +1 draw 1", "plan 0: 7 +1 draw 1",
                                "plan 0: 8 +1 draw 1"}));
  const Verification& counts = rig.scheduler.Get(id).verification;
  EXPECT_EQ(counts.drafted_tokens, 0);
  EXPECT_EQ(counts.dense_passes, 3);
  EXPECT_EQ(rig.scheduler.stats().num_checks, 0);
}

TEST(SchedulerNgrams, WhoHasNoneSharesThePassOfWhoHas) {
  const Tokens repeats = PromptThatRepeats();
  for (const Drafts drafts : {Drafts::kNgram, Drafts::kBoth}) {
    Rig rig;
    rig.Submit(repeats, Drafting(drafts, 30));
    rig.Submit(MakePrompt(2, 7), Drafting(drafts, 30));
    Request plain;
    plain.sampling.max_new_tokens = 30;
    rig.Submit(MakePrompt(3, 8), plain);
    for (int i = 0; i < 3; ++i) rig.Step();
    // With sparse steps to draft by, the round waits for those.
    const Passes want = drafts == Drafts::kNgram
                            ? Passes{"plan 0: 8 +1 draw 1", "plan 0: 5 +5 draw 5, 7 +1 draw 1"}
                            : Passes{"plan 1: 7 +1 draw 1", "plan 0: 8 +1 draw 1"};
    EXPECT_EQ(Passes(rig.passes.begin() + 1, rig.passes.end()), want);
  }
}

TEST(SchedulerNgrams, WriteWhatDenseDecodingWrites) {
  for (const Drafts drafts : {Drafts::kNgram, Drafts::kBoth}) {
    for (const int64_t draft_tokens : {0, 1, 3, 16}) {
      Verification total;
      for (const int32_t vocab_size : {2, 5, kVocabSize}) {
        Rig rig(Repeating(vocab_size));
        std::vector<RequestId> ids;
        for (int32_t i = 0; i < 4; ++i) {
          Request request = Drafting(drafts, 40 - i, draft_tokens);
          if (i == 3) request.decoding.plan = PlanId::kDense;
          ids.push_back(rig.Submit(MakePrompt(i, 6 + i), request));
        }
        rig.StepUntilDone();
        for (int32_t i = 0; i < 4; ++i) {
          const RequestState& state = rig.scheduler.Get(ids[static_cast<size_t>(i)]);
          EXPECT_EQ(rig.Generated(state.id),
                    FakeModel::Continue(MakePrompt(i, 6 + i), 40 - i, 1.0f, vocab_size));
          const Verification& counts = state.verification;
          EXPECT_EQ(counts.accepted_tokens + counts.dense_passes, 39 - i);
          EXPECT_EQ(state.sequence.clean_len, 0) << "its pages are back";
          total.drafted_tokens += counts.drafted_tokens;
          total.ngram_tokens += counts.ngram_tokens;
          total.accepted_tokens += counts.accepted_tokens;
          const bool by_text_alone = drafts == Drafts::kNgram || i == 3;
          if (by_text_alone) {
            EXPECT_EQ(counts.ngram_tokens, counts.drafted_tokens);
          }
        }
      }
      EXPECT_GT(total.accepted_tokens, 20);
      EXPECT_LT(total.accepted_tokens, total.drafted_tokens);
      EXPECT_GT(total.ngram_tokens, 20);
      EXPECT_EQ(total.ngram_tokens < total.drafted_tokens, drafts == Drafts::kBoth);
    }
  }
}

TEST(SchedulerNgrams, NoDraftComesBehindAStopToken) {
  for (const Drafts drafts : {Drafts::kTidal, Drafts::kNgram}) {
    int64_t num_last = 0;
    for (int32_t i = 0; i < 20; ++i) {
      Rig rig(Repeating(4));
      Request request = Drafting(drafts, 30, 8);
      request.sampling.stop_token_ids = {3};
      // Stop tokens of the prompt, as those between the turns of a conversation, end nothing.
      Tokens prompt = FakeModel::Continue(MakePrompt(i, 5), 40, 1.0f, 4);
      const Tokens all = FakeModel::Continue(prompt, 30, 1.0f, 4);
      const RequestId id = rig.Submit(prompt, request);
      while (true) {
        const Batch batch = rig.scheduler.Next(rig.now_ms);
        if (batch.rows.empty()) break;
        const Sequence& sequence = *batch.rows[0].sequence;
        if (batch.rows[0].num_draws > 1) {
          const auto first = sequence.tokens.begin() + sequence.cached + 1;
          EXPECT_EQ(std::find(first, sequence.tokens.end() - 1, 3), sequence.tokens.end() - 1);
          num_last += sequence.tokens.back() == 3;
        }
        rig.scheduler.Commit(batch, rig.model.Run(batch), rig.now_ms += 1.0);
      }
      for (const RequestEvent& event : rig.scheduler.TakeEvents()) rig.events.push_back(event);
      const auto end = std::find(all.begin(), all.end(), 3);
      EXPECT_EQ(rig.Generated(id), Tokens(all.begin(), end == all.end() ? end : end + 1));
    }
    EXPECT_GT(num_last, 0) << "no stop token was drafted";
  }
}

// Drafts, and passes without any, that a NaN spoils: the token before it is drawn by a step.
TEST(SchedulerNgrams, SpoiltOnesAreForgotten) {
  Rig rig(Repeating(2));
  const RequestId one = rig.Submit(MakePrompt(1, 6), Drafting(Drafts::kNgram, 30));
  const RequestId two = rig.Submit(MakePrompt(2, 7), Drafting(Drafts::kNgram, 30));
  int num_spoilt = 0, num_alone = 0;
  while (true) {
    const Batch batch = rig.scheduler.Next(rig.now_ms);
    if (batch.rows.empty()) break;
    Drawn drawn = rig.model.Run(batch);
    for (size_t i = 0; i < batch.rows.size() && !batch.is_step(); ++i) {
      if (batch.rows[i].sequence->cached < 10 || num_spoilt % 3 == 2) continue;
      num_alone += batch.rows[i].num_draws == 1;
      drawn.tokens[i].assign(drawn.tokens[i].size(), -1);
      ++num_spoilt;
    }
    rig.scheduler.Commit(batch, drawn, rig.now_ms += 1.0);
    rig.scheduler.CheckIntegrity();
  }
  EXPECT_GE(num_spoilt, 2);
  EXPECT_GE(num_alone, 1);
  for (const RequestEvent& event : rig.scheduler.TakeEvents()) rig.events.push_back(event);
  EXPECT_EQ(rig.Generated(one), FakeModel::Continue(MakePrompt(1, 6), 30, 1.0f, 2));
  EXPECT_EQ(rig.Generated(two), FakeModel::Continue(MakePrompt(2, 7), 30, 1.0f, 2));
}

TEST(SchedulerNgrams, PauseNobody) {
  RigOptions options = Small(16);
  options.vocab_size = 2;
  Rig rig(options);
  const RequestId one = rig.Submit(MakePrompt(1, 12), Drafting(Drafts::kNgram, 36, 8));
  const RequestId two = rig.Submit(MakePrompt(2, 12), Drafting(Drafts::kNgram, 36, 8));
  rig.StepUntilDone();
  EXPECT_EQ(rig.Generated(one), FakeModel::Continue(MakePrompt(1, 12), 36, 1.0f, 2));
  EXPECT_EQ(rig.Generated(two), FakeModel::Continue(MakePrompt(2, 12), 36, 1.0f, 2));
  EXPECT_EQ(rig.scheduler.Get(one).num_pauses, 0);
  EXPECT_GT(rig.scheduler.Get(two).num_pauses, 0);
}

TEST(SchedulerNgrams, TheIndexIsThereOnlyWhileItIsUsed) {
  Rig rig(Repeating(2));
  const RequestId tidal = rig.Submit(MakePrompt(1, 6), Drafting(Drafts::kTidal, 30));
  const RequestId ngram = rig.Submit(MakePrompt(2, 6), Drafting(Drafts::kNgram, 30));
  Request unverified = Drafting(Drafts::kNgram, 30);
  unverified.decoding.verifies = false;
  const RequestId plain = rig.Submit(MakePrompt(3, 6), unverified);
  for (int i = 0; i < 8; ++i) rig.Step();
  EXPECT_FALSE(rig.scheduler.Get(tidal).ngrams);
  EXPECT_FALSE(rig.scheduler.Get(plain).ngrams);
  EXPECT_TRUE(rig.scheduler.Get(ngram).ngrams);
  rig.StepUntilDone();
  EXPECT_FALSE(rig.scheduler.Get(ngram).ngrams);
}

}  // namespace
}  // namespace tidal::test
