// The scheduler without a model: what it puts into passes, what it makes of what they give.
#include "engine/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "scheduler_rig.h"
#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

using Passes = std::vector<std::string>;

Request Verified(int64_t max_new_tokens, int64_t draft_tokens = 0) {
  Request request = TidalRequest(max_new_tokens, 4);
  request.decoding.verifies = true;
  request.decoding.draft_tokens = draft_tokens;
  return request;
}

TEST(Scheduler, ReadsAPromptAndDecodesAfterIt) {
  Rig rig;
  const RequestId id = rig.Submit(MakePrompt(1, 10), 3);
  EXPECT_EQ(rig.scheduler.Get(id).status, RequestStatus::kQueued);
  rig.StepUntilDone();
  EXPECT_EQ(rig.passes,
            (Passes{"plan 0: 0 +10 draw 1", "plan 0: 10 +1 draw 1", "plan 0: 11 +1 draw 1"}));
  EXPECT_EQ(rig.Generated(id), FakeModel::Continue(MakePrompt(1, 10), 3));
  EXPECT_EQ(rig.Reason(id), FinishReason::kLength);
  ASSERT_EQ(rig.events.size(), 3u) << "the last token says that it is the last";
  EXPECT_EQ(rig.events[2].finish_reason, FinishReason::kLength);
  EXPECT_EQ(rig.events[1].row, 0);
  EXPECT_EQ(rig.events[1].draw, 0);
  EXPECT_EQ(rig.pool.num_free(), 64);
  const RequestState removed = rig.scheduler.Remove(id);
  EXPECT_EQ(removed.num_new(), 3);
  EXPECT_THROW(rig.scheduler.Get(id), InvalidArgument);
  EXPECT_GT(removed.first_token_ms, removed.arrived_ms);
  EXPECT_GT(removed.finished_ms, removed.first_token_ms);
}

TEST(Scheduler, NothingToDoIsABatchWithoutRows) {
  Rig rig;
  EXPECT_TRUE(rig.scheduler.Next(0.0).rows.empty());
  EXPECT_TRUE(rig.scheduler.Next(1.0).rows.empty());
  EXPECT_FALSE(rig.scheduler.HasWork());
}

TEST(Scheduler, OneBatchIsInFlight) {
  Rig rig;
  const RequestId id = rig.Submit(MakePrompt(1, 3), 1);
  const Batch batch = rig.scheduler.Next(0.0);
  ASSERT_EQ(batch.rows.size(), 1u);
  EXPECT_EQ(rig.scheduler.InFlight(), std::vector<RequestId>{id});
  EXPECT_TRUE(Throws<InvalidArgument>([&] { rig.scheduler.Next(0.0); }, {"in flight"}));
  rig.scheduler.Commit(batch, rig.model.Run(batch), 1.0);
  EXPECT_EQ(rig.Reason(id), FinishReason::kLength);
}

TEST(Scheduler, ShortPromptsShareAPass) {
  Rig rig;
  for (int32_t i = 0; i < 3; ++i) rig.Submit(MakePrompt(i, 9 + i), 1);
  rig.StepUntilDone();
  EXPECT_EQ(rig.passes, Passes{"plan 0: 0 +9 draw 1, 0 +10 draw 1, 0 +11 draw 1"});
}

TEST(Scheduler, ALongPromptIsReadInChunksThatEndWithPages) {
  RigOptions options;
  options.limits.max_pass_tokens = 30;
  Rig rig(options);
  const RequestId id = rig.Submit(MakePrompt(1, 70), 1);
  rig.StepUntilDone();
  EXPECT_EQ(rig.passes, (Passes{"plan 0: 0 +28", "plan 0: 28 +28", "plan 0: 56 +14 draw 1"}));
  EXPECT_EQ(rig.Generated(id), FakeModel::Continue(MakePrompt(1, 70), 1));
}

TEST(Scheduler, AStopTokenEndsARequest) {
  Rig rig;
  const Tokens all = FakeModel::Continue(MakePrompt(1, 5), 10);
  Request request;
  request.sampling.max_new_tokens = 10;
  request.sampling.stop_token_ids = {all[3]};
  const RequestId id = rig.Submit(MakePrompt(1, 5), request);
  rig.StepUntilDone();
  EXPECT_EQ(rig.Generated(id), Tokens(all.begin(), all.begin() + 4));
  EXPECT_EQ(rig.Reason(id), FinishReason::kStop);
}

TEST(Scheduler, UnusableLogitsEndOneRequest) {
  Rig rig;
  Tokens bad = MakePrompt(3, 9);
  bad.back() = kPoison;
  const RequestId good = rig.Submit(MakePrompt(1, 9), 3);
  const RequestId poisoned = rig.Submit(bad, 3);
  const RequestId also_good = rig.Submit(MakePrompt(2, 9), 3);
  rig.StepUntilDone();
  EXPECT_EQ(rig.Generated(good), FakeModel::Continue(MakePrompt(1, 9), 3));
  EXPECT_EQ(rig.Generated(also_good), FakeModel::Continue(MakePrompt(2, 9), 3));
  EXPECT_EQ(rig.Reason(poisoned), FinishReason::kError);
  EXPECT_TRUE(rig.Generated(poisoned).empty());
  const RequestState& state = rig.scheduler.Get(poisoned);
  EXPECT_EQ(state.failure, RequestFailure::kUnusableLogits);
  EXPECT_NE(state.ErrorText().find("after token 8"), std::string::npos) << state.ErrorText();
  EXPECT_EQ(rig.prefixes.Peek(bad, state.salt).num_pages, 0) << "nothing of it is known";
  EXPECT_EQ(rig.prefixes.stats().pages, 4);
}

TEST(Scheduler, AFailedPassEndsItsRequestsOnly) {
  RigOptions options;
  options.limits.max_rows = 2;
  Rig rig(options);
  const RequestId one = rig.Submit(MakePrompt(1, 9), 3), two = rig.Submit(MakePrompt(2, 9), 3);
  const RequestId waits = rig.Submit(MakePrompt(3, 9), 3);
  ASSERT_EQ(rig.scheduler.Next(0.0).rows.size(), 2u);
  rig.scheduler.Fail(1.0);
  for (const RequestId id : {one, two}) {
    EXPECT_EQ(rig.Reason(id), FinishReason::kError);
    EXPECT_EQ(rig.scheduler.Get(id).failure, RequestFailure::kPassFailed);
  }
  EXPECT_EQ(rig.pool.num_free(), 64);
  EXPECT_EQ(rig.prefixes.stats().pages, 0);
  rig.StepUntilDone();
  EXPECT_EQ(rig.Generated(waits), FakeModel::Continue(MakePrompt(3, 9), 3));
}

TEST(Scheduler, WhatCanNeverFitIsRefused) {
  Rig rig;
  EXPECT_TRUE(Throws<CapacityError>([&] { rig.Submit(MakePrompt(1, 150), 51); },
                                    {"150 tokens", "max_new_tokens 51", "need 201", "have",
                                     "max_seq_len 200", "raise max_seq_len"}));
  EXPECT_TRUE(Throws<CapacityError>([&] { rig.Submit(MakePrompt(1, 1), int64_t{1} << 62); },
                                    {"max_seq_len 200"}));
  RigOptions options;
  options.num_pages = 10;
  Rig small(options);
  EXPECT_TRUE(Throws<CapacityError>([&] { small.Submit(MakePrompt(1, 30), 11); },
                                    {"need 11 pages", "have 10", "raise num_pages"}));
  EXPECT_TRUE(Throws<InvalidArgument>([&] { rig.Submit({}, 1); }, {"no tokens"}));
  EXPECT_TRUE(Throws<InvalidArgument>([&] { rig.Submit({1}, 0); }, {"max_new_tokens", "got 0"}));
  EXPECT_FALSE(rig.scheduler.HasWork());
  EXPECT_EQ(small.Submit(MakePrompt(1, 30), 10), 1u);
}

TEST(Scheduler, ImpossibleLimitsAreRefused) {
  PagePool pool(4, 4);
  const auto make = [&](const SchedulerLimits& limits) { Scheduler(pool, nullptr, limits); };
  EXPECT_THROW(make({.max_seq_len = 0}), InvalidArgument);
  EXPECT_THROW(make({.max_rows = 0, .max_seq_len = 1}), InvalidArgument);
  EXPECT_THROW(make({.max_seq_len = 1, .max_chunk_ms = 0.0}), InvalidArgument);
  EXPECT_THROW(make({.max_seq_len = 1, .decode_share = 1.0}), InvalidArgument);
  EXPECT_THROW(make({.max_seq_len = 1, .output_reserve = -1}), InvalidArgument);
}

TEST(Scheduler, CancellingEndsARequestInAnyState) {
  RigOptions options;
  options.limits.max_rows = 2;
  options.limits.max_pass_tokens = 8;
  Rig rig(options);
  const RequestId decoding = rig.Submit(MakePrompt(1, 6), 9);
  while (rig.Generated(decoding).empty()) rig.Step();
  const RequestId reading = rig.Submit(MakePrompt(2, 30), 9);
  while (rig.scheduler.Get(reading).sequence.cached == 0) rig.Step();
  const RequestId queued = rig.Submit(MakePrompt(3, 6), 9);
  EXPECT_EQ(rig.scheduler.stats().num_decoding, 1);
  EXPECT_EQ(rig.scheduler.stats().num_reading, 1);
  EXPECT_EQ(rig.scheduler.stats().num_waiting, 1);
  EXPECT_TRUE(Throws<InvalidArgument>([&] { rig.scheduler.Remove(queued); }, {"not ended"}));

  rig.scheduler.Cancel(queued, FinishReason::kAbort, rig.now_ms);
  rig.scheduler.Cancel(reading, FinishReason::kAbort, rig.now_ms);
  const Batch batch = rig.scheduler.Next(rig.now_ms);
  ASSERT_EQ(rig.scheduler.InFlight(), std::vector<RequestId>{decoding});
  rig.scheduler.Cancel(decoding, FinishReason::kStop, rig.now_ms);
  EXPECT_EQ(rig.Reason(decoding), FinishReason::kNone) << "its pages are in use";
  rig.scheduler.Commit(batch, rig.model.Run(batch), rig.now_ms);
  EXPECT_EQ(rig.Reason(decoding), FinishReason::kStop);
  EXPECT_EQ(rig.Reason(reading), FinishReason::kAbort);
  EXPECT_EQ(rig.Reason(queued), FinishReason::kAbort);
  EXPECT_EQ(rig.pool.num_free(), 64);
  rig.scheduler.Cancel(queued, FinishReason::kAbort, rig.now_ms);
  std::set<RequestId> ended;
  for (const RequestEvent& event : rig.scheduler.TakeEvents()) {
    if (event.finish_reason == FinishReason::kNone) continue;
    EXPECT_TRUE(ended.insert(event.id).second);
  }
  EXPECT_EQ(ended.size(), 3u) << "each end is told once";
  EXPECT_THROW(rig.scheduler.Cancel(77, FinishReason::kAbort, 0.0), InvalidArgument);
  EXPECT_THROW(rig.scheduler.Cancel(queued, FinishReason::kLength, 0.0), InvalidArgument);
  EXPECT_FALSE(rig.Step());
}

TEST(Scheduler, PlansTakeStepsOfTheirOwnInATurn) {
  Rig rig;
  Request tidal = TidalRequest(3, 8), other = TidalRequest(3, 8), dense;
  other.decoding.plan = kOther;
  dense.sampling.max_new_tokens = 3;
  rig.Submit(MakePrompt(1, 10), tidal);
  rig.Submit(MakePrompt(2, 11), other);
  rig.Submit(MakePrompt(3, 12), dense);
  rig.Submit(MakePrompt(4, 5), tidal);
  rig.StepUntilDone();
  ASSERT_GE(rig.passes.size(), 4u);
  EXPECT_EQ(rig.passes[1], "plan 1: 10 +1 draw 1, 5 +1 draw 1");
  EXPECT_EQ(rig.passes[2], "plan 2: 11 +1 draw 1");
  EXPECT_EQ(rig.passes[3], "plan 0: 12 +1 draw 1");
}

TEST(Scheduler, ShortRowsOfAnyPlanShareTheDenseStep) {
  Rig rig;
  rig.Submit(MakePrompt(1, 10), TidalRequest(2, 50));
  rig.Submit(MakePrompt(2, 10), 2);
  rig.StepUntilDone();
  EXPECT_EQ(rig.passes[1], "plan 0: 10 +1 draw 1, 10 +1 draw 1");
}

TEST(Scheduler, CorrectionsReadAgainWhatWasDecodedSparsely) {
  Rig rig;
  Request request = TidalRequest(8, 4);
  request.decoding.correction_interval = 3;
  const RequestId id = rig.Submit(MakePrompt(1, 8), request);
  rig.StepUntilDone();
  EXPECT_EQ(rig.passes, (Passes{"plan 0: 0 +8 draw 1", "plan 1: 8 +1 draw 1", "plan 1: 9 +1 draw 1",
                                "plan 1: 10 +1 draw 1", "plan 0: 8 +3", "plan 1: 11 +1 draw 1",
                                "plan 1: 12 +1 draw 1", "plan 1: 13 +1 draw 1", "plan 0: 11 +3",
                                "plan 1: 14 +1 draw 1"}));
  EXPECT_EQ(rig.scheduler.Get(id).num_new(), 8);
  EXPECT_EQ(rig.prefixes.stats().pages, 3) << "tokens 0 to 13 became clean";
}

// What does not fit into a pass is corrected turn by turn, and others decode in between.
TEST(Scheduler, ALongCorrectionStopsNobodyElse) {
  RigOptions options;
  options.limits.max_pass_tokens = 8;
  Rig rig(options);
  Request request = TidalRequest(14, 4);
  request.decoding.correction_interval = 12;
  rig.Submit(MakePrompt(1, 8), request);
  rig.Submit(MakePrompt(2, 8), 16);
  rig.StepUntilDone();
  const auto first = std::find(rig.passes.begin(), rig.passes.end(), "plan 0: 8 +8");
  ASSERT_GE(rig.passes.end() - first, 5);
  EXPECT_EQ(Passes(first, first + 5),
            (Passes{"plan 0: 8 +8", "plan 0: 20 +1 draw 1", "plan 0: 16 +4", "plan 1: 20 +1 draw 1",
                    "plan 0: 21 +1 draw 1"}));
}

// Who comes in the middle of a round drafts no longer than the others.
TEST(Scheduler, ALateRequestJoinsTheRound) {
  Rig rig;
  rig.Submit(MakePrompt(1, 6), Verified(30, 5));
  for (int i = 0; i < 4; ++i) rig.Step();
  ASSERT_EQ(rig.passes.back(), "plan 1: 8 +1 draw 1") << "the third draft";
  const RequestId late = rig.Submit(MakePrompt(2, 7), Verified(30, 5));
  for (int i = 0; i < 4; ++i) rig.Step();
  EXPECT_EQ(rig.passes.back(), "plan 0: 6 +6 draw 6, 7 +3 draw 3");
  rig.StepUntilDone();
  EXPECT_EQ(rig.Generated(late), FakeModel::Continue(MakePrompt(2, 7), 30));
}

TEST(Scheduler, VerifiedRoundsWriteWhatDenseDecodingWrites) {
  for (const int64_t draft_tokens : {0, 1, 3, 16}) {
    Rig rig;
    std::vector<RequestId> ids;
    for (int32_t i = 0; i < 4; ++i)
      ids.push_back(rig.Submit(MakePrompt(i, 6 + i), Verified(40 - i, draft_tokens)));
    rig.StepUntilDone();
    for (int32_t i = 0; i < 4; ++i) {
      EXPECT_EQ(rig.Generated(ids[static_cast<size_t>(i)]),
                FakeModel::Continue(MakePrompt(i, 6 + i), 40 - i));
      const RequestState& state = rig.scheduler.Get(ids[static_cast<size_t>(i)]);
      const Verification& verification = state.verification;
      EXPECT_GT(verification.accepted_tokens, 0);
      EXPECT_LT(verification.accepted_tokens, verification.drafted_tokens);
      EXPECT_EQ(verification.accepted_tokens + verification.dense_passes, 39 - i)
          << "all but the first token, which reading drew";
      // Verified tokens are clean: all whole pages are known.
      Tokens all = MakePrompt(i, 6 + i);
      const Tokens generated = rig.Generated(state.id);
      all.insert(all.end(), generated.begin(), generated.end());
      EXPECT_EQ(rig.prefixes.Peek(all, state.salt).num_pages, 45 / 4);
    }
  }
}

TEST(Scheduler, ARoundIsDraftedTogetherAndCheckedTogether) {
  Rig rig;
  rig.Submit(MakePrompt(1, 6), Verified(30, 2));
  rig.Submit(MakePrompt(2, 7), Verified(30, 3));
  for (int i = 0; i < 5; ++i) rig.Step();
  EXPECT_EQ(rig.passes,
            (Passes{"plan 0: 0 +6 draw 1, 0 +7 draw 1", "plan 1: 6 +1 draw 1, 7 +1 draw 1",
                    "plan 1: 7 +1 draw 1, 8 +1 draw 1", "plan 1: 9 +1 draw 1",
                    "plan 0: 6 +3 draw 3, 7 +4 draw 4"}));
}

TEST(Scheduler, AStopTokenInARoundEndsItThere) {
  Rig rig;
  const Tokens all = FakeModel::Continue(MakePrompt(1, 6), 30);
  for (size_t stop = 1; stop < 20; ++stop) {
    Request request = Verified(30, 6);
    request.sampling.stop_token_ids = {all[stop]};
    const RequestId id = rig.Submit(MakePrompt(1, 6), request);
    rig.StepUntilDone();
    EXPECT_EQ(rig.Generated(id), Tokens(all.begin(), all.begin() + stop + 1));
    EXPECT_EQ(rig.Reason(id), FinishReason::kStop);
    EXPECT_EQ(rig.scheduler.Get(id).num_tokens(), 6 + static_cast<int64_t>(stop) + 1);
  }
}

// A draft that poisons the pass: the token before it is drawn by a step without drafts.
TEST(Scheduler, SpoiltDraftsAreForgotten) {
  Rig rig;
  const RequestId id = rig.Submit(MakePrompt(1, 6), Verified(8, 3));
  int num_spoilt = 0;
  while (true) {
    const Batch batch = rig.scheduler.Next(rig.now_ms);
    if (batch.rows.empty()) break;
    Drawn drawn = rig.model.Run(batch);
    if (batch.rows[0].num_draws > 1 && num_spoilt++ < 2) {
      drawn.tokens[0].assign(drawn.tokens[0].size(), -1);
    }
    rig.scheduler.Commit(batch, drawn, rig.now_ms += 1.0);
    rig.scheduler.CheckIntegrity();
  }
  EXPECT_GE(num_spoilt, 2);
  for (const RequestEvent& event : rig.scheduler.TakeEvents()) rig.events.push_back(event);
  EXPECT_EQ(rig.Generated(id), FakeModel::Continue(MakePrompt(1, 6), 8));
  EXPECT_EQ(rig.Reason(id), FinishReason::kLength);
}

// A session's sequence is let in with pages for its turn, is never paused, and has them afterwards.
TEST(Scheduler, ASessionKeepsItsPages) {
  RigOptions options;
  options.num_pages = 20;
  Rig rig(options);
  Sequence sequence = rig.MakeSequence(MakePrompt(1, 10));
  Request request = TidalRequest(20, 4);
  rig.model.dense_len[kTidal] = 4;
  request.owner = SequenceOwner::kSession;
  const RequestId turn = rig.scheduler.Add(request, std::move(sequence), 0.0);
  const RequestId other = rig.Submit(MakePrompt(2, 8), 40);
  rig.StepUntilDone();
  EXPECT_EQ(rig.Generated(other), FakeModel::Continue(MakePrompt(2, 8), 40));
  EXPECT_EQ(rig.scheduler.Get(turn).num_pauses, 0);
  EXPECT_EQ(rig.pool.num_free(), 12);
  RequestState left = rig.scheduler.Remove(turn);
  EXPECT_EQ(left.sequence.pages.pages().size(), 8u);
  EXPECT_EQ(left.sequence.cached, 29);
  EXPECT_EQ(left.sequence.num_sparse, 19);
  EXPECT_EQ(left.sequence.clean_len, 10);

  // A turn without a prompt goes on with a step.
  request.sampling.max_new_tokens = 2;
  rig.passes.clear();
  const RequestId next = rig.scheduler.Add(request, std::move(left.sequence), rig.now_ms);
  rig.StepUntilDone();
  EXPECT_EQ(rig.passes, (Passes{"plan 1: 29 +1 draw 1", "plan 1: 30 +1 draw 1"}));
  EXPECT_EQ(rig.scheduler.Get(next).num_new(), 2);

  // What could never fit is refused.
  request.sampling.max_new_tokens = 71;
  EXPECT_TRUE(Throws<CapacityError>(
      [&] { rig.scheduler.Add(request, rig.MakeSequence(MakePrompt(1, 10)), 0.0); },
      {"21 pages", "have 20"}));
}

// Whoever stops a turn keeps what he has heard, which is not to be read again before.
TEST(Scheduler, ASessionsCorrectionWaitsUntilItsTokensAreHeard) {
  Rig rig;
  Request request = TidalRequest(9, 4);
  request.owner = SequenceOwner::kSession;
  request.decoding.correction_interval = 4;
  rig.model.dense_len[kTidal] = 4;
  const RequestId turn = rig.scheduler.Add(request, rig.MakeSequence(MakePrompt(1, 10)), 0.0);
  request.owner = SequenceOwner::kRequest;
  const RequestId other = rig.Submit(MakePrompt(1, 10), request);
  for (int i = 0; i < 30; ++i) rig.Step();
  EXPECT_EQ(rig.Generated(other).size(), 9u) << "it waits for nobody";
  EXPECT_EQ(rig.scheduler.Get(turn).num_new(), 5);
  EXPECT_EQ(rig.scheduler.Get(turn).sequence.num_sparse, 4);
  rig.scheduler.MarkHeard(turn, 4);
  EXPECT_FALSE(rig.Step());
  rig.scheduler.MarkHeard(turn, 5);
  rig.StepUntilDone();
  EXPECT_EQ(rig.Generated(turn), rig.Generated(other));
}

// Two that began as one write to pages of their own; the copies go with the first pass.
TEST(Scheduler, ForksCopyThePagesThatTheyWriteTo) {
  Rig rig;
  Request request;
  request.sampling.max_new_tokens = 6;
  request.owner = SequenceOwner::kSession;
  const RequestId first =
      rig.scheduler.Add(request, rig.MakeSequence(MakePrompt(1, 10)), rig.now_ms);
  rig.StepUntilDone();
  Sequence one = rig.scheduler.Remove(first).sequence;
  Sequence other = rig.MakeSequence(one.tokens);
  other.dense_len = one.dense_len;
  other.cached = other.clean_len = one.cached;
  {
    SequencePages shared = one.pages.Share(one.cached);
    other.pages.Adopt(shared.pages());
  }
  const RequestId ids[] = {rig.scheduler.Add(request, std::move(one), rig.now_ms),
                           rig.scheduler.Add(request, std::move(other), rig.now_ms)};
  rig.StepUntilDone();
  for (const RequestId id : ids) {
    Tokens tokens = rig.Generated(first);
    const Tokens more = rig.Generated(id);
    tokens.insert(tokens.end(), more.begin(), more.end());
    EXPECT_EQ(tokens, FakeModel::Continue(MakePrompt(1, 10), 12));
  }
}

}  // namespace
}  // namespace tidal::test
