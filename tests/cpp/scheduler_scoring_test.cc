// The scheduler and what is scored: given tokens, of which logits are wanted and nothing is drawn.
#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

#include "scheduler_rig.h"
#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

using Passes = std::vector<std::string>;

// The logits after the last `count` of the tokens, decoded densely.
std::vector<float> LogitsOf(const Tokens& tokens, int64_t count) {
  std::vector<float> logits;
  for (int64_t after = count - 1; after >= 0; --after) {
    const Tokens before(tokens.begin(), tokens.end() - after);
    logits.push_back(static_cast<float>(FakeModel::Continue(before, 1)[0]));
  }
  return logits;
}

Tokens Join(Tokens one, const Tokens& other) {
  one.insert(one.end(), other.begin(), other.end());
  return one;
}

TEST(SchedulerScoring, ForcedTokensAreSteppedAndTheirEndIsTold) {
  Rig rig;
  const Tokens forced = {5, 7, 6};
  const Request request = ScoredRequest(forced, 4);
  const RequestId id = rig.Submit(MakePrompt(1, 5), request);
  rig.StepUntilDone();
  EXPECT_EQ(rig.passes, (Passes{"plan 0: 0 +5 draw 1 logits 1", "plan 0: 5 +1 draw 1 logits 1",
                                "plan 0: 6 +1 draw 1 logits 1", "plan 0: 7 +1 draw 1 logits 1"}));
  EXPECT_EQ(*request.scoring->logits, LogitsOf(Join(MakePrompt(1, 5), forced), 4));
  ASSERT_EQ(rig.events.size(), 1u);
  EXPECT_EQ(rig.events[0].token_id, -1);
  EXPECT_EQ(rig.events[0].finish_reason, FinishReason::kLength);
  const RequestState left = rig.scheduler.Remove(id);
  EXPECT_EQ(left.sequence.cached, 8);
  EXPECT_EQ(left.last_draw, static_cast<int32_t>(request.scoring->logits->back()));
  EXPECT_EQ(rig.prefixes.stats().pages, 0) << "nobody finds what it cached";
  EXPECT_EQ(rig.scheduler.stats().generated_tokens, 0);
}

TEST(SchedulerScoring, APromptIsReadWholeAndByItself) {
  RigOptions options;
  options.limits.max_pass_tokens = 8;
  options.limits.max_chunk_ms = 3.05;  // two tokens at a time beside decoding
  Rig rig(options);
  const Tokens prompt = MakePrompt(3, 18);
  rig.Submit(prompt, 1);
  rig.StepUntilDone();  // it is known, and read all the same
  const RequestId decodes = rig.Submit(MakePrompt(1, 3), 40);
  while (rig.Generated(decodes).empty()) rig.Step();
  rig.passes.clear();
  const Request request = ScoredRequest({}, 11);
  rig.Submit(prompt, request);
  rig.Submit(MakePrompt(2, 2), 1);
  rig.StepUntilDone();
  Passes reading;
  for (const std::string& pass : rig.passes) {
    if (pass.find("logits") != std::string::npos) reading.push_back(pass);
  }
  EXPECT_EQ(reading, (Passes{"plan 0: 0 +8 logits 1", "plan 0: 8 +8 logits 8",
                             "plan 0: 16 +2 draw 1 logits 2"}));
  EXPECT_EQ(*request.scoring->logits, LogitsOf(prompt, 11));
  EXPECT_EQ(rig.Generated(decodes), FakeModel::Continue(MakePrompt(1, 3), 40));
}

// Its steps are those of everybody who goes through the same plan.
TEST(SchedulerScoring, StepsAreShared) {
  Rig rig;
  const Tokens forced = MakePrompt(4, 10);
  const Request request = ScoredRequest(forced, 11);
  rig.Submit(MakePrompt(1, 5), request);
  const RequestId decodes = rig.Submit(MakePrompt(2, 5), 11);
  rig.StepUntilDone();
  EXPECT_EQ(rig.passes.size(), 12u);
  EXPECT_EQ(rig.passes[5], "plan 0: 8 +1 draw 1 logits 1, 8 +1 draw 1");
  EXPECT_EQ(*request.scoring->logits, LogitsOf(Join(MakePrompt(1, 5), forced), 11));
  EXPECT_EQ(rig.Generated(decodes), FakeModel::Continue(MakePrompt(2, 5), 11));
}

TEST(SchedulerScoring, WaitsForAllPagesAndIsNotPaused) {
  Rig rig(Small(20));
  const RequestId older = rig.Submit(MakePrompt(2, 8), 40);
  while (rig.Generated(older).size() < 12) rig.Step();
  const Tokens forced = MakePrompt(4, 52);
  const Request large = ScoredRequest(forced, 53), small = ScoredRequest(MakePrompt(5, 10), 11);
  const RequestId waits = rig.Submit(MakePrompt(1, 10), large);
  const RequestId fits = rig.Submit(MakePrompt(3, 10), small);
  rig.Step();
  rig.Step();
  EXPECT_EQ(rig.scheduler.Get(waits).status, RequestStatus::kQueued);
  while (rig.scheduler.Get(fits).status != RequestStatus::kFinished) ASSERT_TRUE(rig.Step());
  EXPECT_EQ(rig.scheduler.Remove(fits).num_pauses, 0);  // and its pages come back
  rig.StepUntilDone();
  EXPECT_EQ(rig.scheduler.Get(waits).num_pauses, 0);
  EXPECT_EQ(*large.scoring->logits, LogitsOf(Join(MakePrompt(1, 10), forced), 53));
  EXPECT_EQ(*small.scoring->logits, LogitsOf(Join(MakePrompt(3, 10), MakePrompt(5, 10)), 11));
  EXPECT_EQ(rig.Generated(older), FakeModel::Continue(MakePrompt(2, 8), 40));
}

// A replay's prompt is in the cache; the first token of what follows it comes with the request.
TEST(SchedulerScoring, AReplayGoesOnBehindItsPrompt) {
  Rig rig(Small(10));
  Sequence sequence = rig.MakeSequence(MakePrompt(1, 10));
  sequence.pages.Own(32, 0, 0);
  const Request reads = ScoredRequest({}, 1);
  const RequestId reading = rig.scheduler.Add(reads, std::move(sequence), rig.now_ms);
  rig.StepUntilDone();
  std::optional<Sequence> held = rig.scheduler.Remove(reading).sequence;
  EXPECT_EQ(held->cached, 10);
  EXPECT_EQ(held->pages.pages().size(), 8u) << "it keeps the pages that it came with";
  for (const Tokens& tokens : {Tokens{4, 8, 9}, Tokens{3}}) {
    held->tokens.push_back(tokens.front());
    Request request =
        ScoredRequest({tokens.begin() + 1, tokens.end()}, static_cast<int64_t>(tokens.size()) + 1);
    request.scoring->logits->front() = reads.scoring->logits->front();
    rig.passes.clear();
    const RequestId run = rig.scheduler.Add(request, std::move(*held), rig.now_ms);
    rig.StepUntilDone();
    EXPECT_EQ(rig.passes.size(), tokens.size());
    EXPECT_EQ(rig.passes[0], "plan 0: 10 +1 draw 1 logits 1");
    const Tokens all = Join(MakePrompt(1, 10), tokens);
    EXPECT_EQ(*request.scoring->logits, LogitsOf(all, static_cast<int64_t>(tokens.size()) + 1));
    held.emplace(rig.scheduler.Remove(run).sequence);
    held->tokens.resize(10);
    held->Rewind(10);
    EXPECT_EQ(held->pages.pages().size(), 8u);
  }
}

TEST(SchedulerScoring, AFailedPassEndsItAndOnlyWhoWasInIt) {
  RigOptions options;
  options.limits.max_rows = 2;
  Rig rig(options);
  const RequestId beside = rig.Submit(MakePrompt(1, 9), 9);
  const RequestId scored = rig.Submit(MakePrompt(2, 9), ScoredRequest(MakePrompt(4, 20), 21));
  const RequestId later = rig.Submit(MakePrompt(3, 9), 3);
  while (rig.scheduler.Get(scored).num_new() < 3) rig.Step();
  ASSERT_EQ(rig.scheduler.Next(rig.now_ms).rows.size(), 2u);
  rig.scheduler.Fail(rig.now_ms);
  for (const RequestId id : {beside, scored}) {
    EXPECT_EQ(rig.Reason(id), FinishReason::kError);
    EXPECT_EQ(rig.scheduler.Get(id).failure, RequestFailure::kPassFailed);
  }
  rig.StepUntilDone();
  EXPECT_EQ(rig.Generated(later), FakeModel::Continue(MakePrompt(3, 9), 3));
  rig.scheduler.Remove(scored);
  EXPECT_EQ(rig.pool.num_free(), 64);
}

TEST(SchedulerScoring, WhatMakesNoSenseIsRefused) {
  Rig rig;
  auto refused = [&](Request request, std::initializer_list<std::string> parts) {
    return Throws<InvalidArgument>([&] { rig.Submit(MakePrompt(1, 5), request); }, parts);
  };
  Request request = ScoredRequest({1, 2}, 3);
  request.sampling.max_new_tokens = 3;
  EXPECT_TRUE(refused(request, {"forced", "2 tokens", "max_new_tokens 3"}));
  EXPECT_TRUE(refused(ScoredRequest({1, 2}, 8), {"num_logits: got 8", "1 to 7"}));
  request = ScoredRequest({}, 5);
  request.scoring->logits->pop_back();
  EXPECT_TRUE(refused(request, {"room for 4 values"}));
  request = ScoredRequest({}, 5);
  request.owner = SequenceOwner::kRequest;
  EXPECT_TRUE(refused(request, {"scored", "expected a replay's"}));
  EXPECT_FALSE(rig.scheduler.HasWork());
}

}  // namespace
}  // namespace tidal::test
