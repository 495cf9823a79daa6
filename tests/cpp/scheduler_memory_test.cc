// Pages that run out: who is paused, and that paused requests go on as if they had not been.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "scheduler_rig.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

TEST(SchedulerMemory, PagesAreTakenAsTokensCome) {
  Rig rig(Small(64));
  const RequestId id = rig.Submit(MakePrompt(1, 10), 30);
  EXPECT_EQ(rig.pool.num_free(), 64);
  rig.Step();
  EXPECT_EQ(rig.pool.num_free(), 61);
  while (rig.Generated(id).size() < 10) rig.Step();
  EXPECT_EQ(rig.pool.num_free(), 59) << "19 cached tokens";
  EXPECT_EQ(rig.scheduler.stats().pages_held, 5);
  rig.StepUntilDone();
  const DecoderStats stats = rig.scheduler.stats();
  EXPECT_EQ(stats.pages_held, 0);
  EXPECT_EQ(stats.pages_cached, 39 / 4);
  EXPECT_EQ(stats.pages_free, 64 - 39 / 4);
  EXPECT_EQ(stats.read_tokens, 10);
  EXPECT_EQ(stats.generated_tokens, 30);
  EXPECT_EQ(stats.num_chunks, 1);
  EXPECT_EQ(stats.num_steps, 29);
  EXPECT_EQ(stats.num_dense_steps, 29);
}

TEST(SchedulerMemory, TheNewestIsPausedWhileDecodingAndGoesOn) {
  Rig rig(Small(16));
  const RequestId one = rig.Submit(MakePrompt(1, 12), 36);
  const RequestId two = rig.Submit(MakePrompt(2, 12), 36);
  bool was_paused = false;
  while (rig.Step()) {
    was_paused = was_paused || rig.scheduler.Get(two).status == RequestStatus::kPaused;
  }
  EXPECT_TRUE(was_paused);
  EXPECT_EQ(rig.scheduler.Get(one).num_pauses, 0) << "the older one goes on";
  EXPECT_GE(rig.scheduler.stats().num_pauses, 1);
  EXPECT_EQ(rig.Generated(one), FakeModel::Continue(MakePrompt(1, 12), 36));
  EXPECT_EQ(rig.Generated(two), FakeModel::Continue(MakePrompt(2, 12), 36));
  EXPECT_EQ(rig.pool.num_free(), 16);
}

TEST(SchedulerMemory, TheNewestIsPausedWhileReadingToo) {
  RigOptions options = Small(22);
  options.limits.max_pass_tokens = 8;
  options.limits.max_chunk_ms = 3.05;  // a page at a time beside decoding
  Rig rig(options);
  const RequestId one = rig.Submit(MakePrompt(1, 16), 60);
  while (rig.Generated(one).size() < 4) rig.Step();
  const RequestId two = rig.Submit(MakePrompt(2, 64), 4);
  bool was_paused = false;
  while (rig.Step()) {
    const RequestState& state = rig.scheduler.Get(two);
    was_paused = was_paused || (state.status == RequestStatus::kPaused && state.num_new() == 0);
  }
  EXPECT_TRUE(was_paused);
  EXPECT_EQ(rig.Generated(one), FakeModel::Continue(MakePrompt(1, 16), 60));
  EXPECT_EQ(rig.Generated(two), FakeModel::Continue(MakePrompt(2, 64), 4));
}

TEST(SchedulerMemory, KnownPrefixesMakeRoomBeforeAnybodyIsPaused) {
  Rig rig(Small(16));
  for (int32_t i = 0; i < 4; ++i) {
    rig.Submit(MakePrompt(10 + i, 12), 1);
    rig.StepUntilDone();
  }
  EXPECT_EQ(rig.scheduler.stats().pages_cached, 12);
  const RequestId id = rig.Submit(MakePrompt(1, 12), 50);
  rig.StepUntilDone();
  EXPECT_EQ(rig.scheduler.stats().num_pauses, 0);
  EXPECT_GE(rig.prefixes.stats().evictions, 11);
  EXPECT_EQ(rig.Generated(id), FakeModel::Continue(MakePrompt(1, 12), 50));
}

TEST(SchedulerMemory, ARequestIsLetInWithRoomForItsOutput) {
  Rig rig(Small(16, 20));
  rig.Submit(MakePrompt(1, 12), 20);
  const RequestId two = rig.Submit(MakePrompt(2, 12), 20);
  const RequestId three = rig.Submit(MakePrompt(3, 12), 20);
  rig.Step();
  EXPECT_EQ(rig.scheduler.stats().num_waiting, 1) << "8 pages are promised to each";
  EXPECT_EQ(rig.scheduler.Get(three).status, RequestStatus::kQueued);
  rig.StepUntilDone();
  EXPECT_EQ(rig.scheduler.stats().num_pauses, 0);
  EXPECT_EQ(rig.Reason(two), FinishReason::kLength);
  EXPECT_EQ(rig.Reason(three), FinishReason::kLength);
}

TEST(SchedulerMemory, KnownPagesThatNobodyOwnsTakeRoom) {
  Rig rig(Small(10, 12));
  rig.Submit(MakePrompt(1, 13), 1);
  rig.StepUntilDone();
  rig.Submit(MakePrompt(2, 12), 12);
  rig.Step();
  ASSERT_EQ(rig.scheduler.stats().pages_cached, 3);
  // 6 pages, 3 of them known; 3 are held, and 3 promised.
  const RequestId known = rig.Submit(MakePrompt(1, 13), 11);
  rig.Step();
  EXPECT_EQ(rig.scheduler.Get(known).status, RequestStatus::kQueued);
  rig.StepUntilDone();
  EXPECT_EQ(rig.scheduler.stats().num_pauses, 0);
  EXPECT_EQ(rig.Generated(known), FakeModel::Continue(MakePrompt(1, 13), 11));
}

// The newer of two prompts is shorter, so it comes first in their pass; when there is no page for
// the older one then, it is not the newer one that makes room.
TEST(SchedulerMemory, WhoIsInThePassIsNotPaused) {
  RigOptions options = Small(20);
  options.limits.max_pass_tokens = 16;
  Rig rig(options);
  const RequestId older = rig.Submit(MakePrompt(1, 24), 2);
  const RequestId newer = rig.Submit(MakePrompt(2, 20), 2);
  rig.Step();
  rig.Step();
  ASSERT_EQ(rig.passes, (std::vector<std::string>{"plan 0: 0 +16", "plan 0: 0 +16"}));
  SequencePages session(rig.pool, 4 * (rig.pool.num_free() - 1));
  rig.Step();
  EXPECT_EQ(rig.passes.back(), "plan 0: 16 +4 draw 1");
  EXPECT_EQ(rig.scheduler.Get(older).status, RequestStatus::kPaused);
  session.Release();
  rig.StepUntilDone();
  EXPECT_EQ(rig.Generated(older), FakeModel::Continue(MakePrompt(1, 24), 2));
  EXPECT_EQ(rig.Generated(newer), FakeModel::Continue(MakePrompt(2, 20), 2));
}

TEST(SchedulerMemory, ASessionsTurnIsNotPaused) {
  Rig rig(Small(20));
  const RequestId older = rig.Submit(MakePrompt(2, 8), 40);
  rig.Step();
  Sequence sequence = rig.MakeSequence(MakePrompt(1, 10));
  Request request;
  request.sampling.max_new_tokens = 20;
  request.owner = SequenceOwner::kSession;
  const RequestId turn = rig.scheduler.Add(request, std::move(sequence), rig.now_ms);
  SequencePages session(rig.pool, 4 * 6);
  while (rig.scheduler.Get(older).num_pauses == 0) ASSERT_TRUE(rig.Step());
  EXPECT_EQ(rig.scheduler.Get(turn).status, RequestStatus::kDecoding);
  session.Release();
  rig.StepUntilDone();
  EXPECT_EQ(rig.scheduler.Get(turn).num_pauses, 0);
  EXPECT_EQ(rig.Generated(turn), FakeModel::Continue(MakePrompt(1, 10), 20));
  EXPECT_EQ(rig.Generated(older), FakeModel::Continue(MakePrompt(2, 8), 40));
}

// Whoever holds the pages is given a while to let go of them.
TEST(SchedulerMemory, TheFirstInLineWaitsAWhileForOthersPages) {
  RigOptions options = Small(8);
  options.limits.max_stuck_ms = 100.0;
  for (const bool comes : {true, false}) {
    Rig rig(options);
    SequencePages session(rig.pool, 4 * 6);
    const RequestId id = rig.Submit(MakePrompt(1, 10), 4);
    EXPECT_FALSE(rig.Step());
    rig.now_ms += 90.0;
    EXPECT_FALSE(rig.Step());
    EXPECT_EQ(rig.scheduler.Get(id).status, RequestStatus::kQueued);
    if (comes) session.Release();
    rig.now_ms += 20.0;
    rig.StepUntilDone();
    EXPECT_EQ(rig.Reason(id), comes ? FinishReason::kLength : FinishReason::kError);
  }
}

TEST(SchedulerMemory, ALowerPriorityMakesRoom) {
  Rig rig(Small(16));
  Request low, high;
  low.sampling.max_new_tokens = high.sampling.max_new_tokens = 36;
  low.priority = 1;
  const RequestId early = rig.Submit(MakePrompt(1, 12), low);
  rig.Step();
  const RequestId late = rig.Submit(MakePrompt(2, 12), high);
  rig.StepUntilDone();
  EXPECT_GE(rig.scheduler.Get(early).num_pauses, 1);
  EXPECT_EQ(rig.scheduler.Get(late).num_pauses, 0);
  EXPECT_EQ(rig.Generated(early), FakeModel::Continue(MakePrompt(1, 12), 36));
}

TEST(SchedulerMemory, DraftsPauseNobody) {
  Rig rig(Small(16));
  Request request = TidalRequest(36, 4);
  request.decoding.verifies = true;
  request.decoding.draft_tokens = 8;
  const RequestId one = rig.Submit(MakePrompt(1, 12), request);
  const RequestId two = rig.Submit(MakePrompt(2, 12), request);
  rig.StepUntilDone();
  EXPECT_EQ(rig.Generated(one), FakeModel::Continue(MakePrompt(1, 12), 36));
  EXPECT_EQ(rig.Generated(two), FakeModel::Continue(MakePrompt(2, 12), 36));
  EXPECT_EQ(rig.scheduler.Get(one).num_pauses, 0);
}

// What a paused tidal request decoded sparsely is read densely when it goes on: clean then.
TEST(SchedulerMemory, APausedTidalRequestIsReadAgain) {
  Rig rig(Small(16));
  const RequestId one = rig.Submit(MakePrompt(1, 12), TidalRequest(36, 4));
  const RequestId two = rig.Submit(MakePrompt(2, 12), TidalRequest(36, 4));
  rig.StepUntilDone();
  EXPECT_GE(rig.scheduler.Get(two).num_pauses, 1);
  EXPECT_EQ(rig.Generated(two).size(), 36u);
  Tokens all = MakePrompt(1, 12);
  const Tokens generated = rig.Generated(one);
  all.insert(all.end(), generated.begin(), generated.end());
  EXPECT_LE(rig.prefixes.Peek(all, rig.scheduler.Get(one).salt).num_pages, 3);
}

// With room in host memory nobody sees that a request was paused, sparse ones included.
TEST(SchedulerMemory, APausedRequestGoesOnFromHostMemory) {
  for (const bool is_sparse : {false, true}) {
    auto request = [&] { return is_sparse ? TidalRequest(36, 4) : TidalRequest(36, 1000); };
    std::vector<Tokens> alone;
    for (int32_t i = 1; i <= 3; ++i) {
      Rig rig(Small(64));
      const RequestId id = rig.Submit(MakePrompt(i, 12), request());
      rig.StepUntilDone();
      alone.push_back(rig.Generated(id));
    }
    RigOptions options = Small(20);
    options.limits.max_host_pages = 40;
    Rig rig(options);
    std::vector<RequestId> ids;
    for (int32_t i = 1; i <= 3; ++i) ids.push_back(rig.Submit(MakePrompt(i, 12), request()));
    int64_t most_on_host = 0;
    while (rig.Step()) {
      most_on_host = std::max(most_on_host, rig.scheduler.stats().pages_on_host);
    }
    EXPECT_GT(most_on_host, 0);
    EXPECT_EQ(rig.scheduler.stats().pages_on_host, 0);
    EXPECT_GE(rig.scheduler.stats().num_pauses, 1);
    EXPECT_EQ(rig.scheduler.stats().read_tokens, 3 * 12) << "nothing is read twice";
    for (size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(rig.Generated(ids[i]), alone[i]);
  }
}

TEST(SchedulerMemory, WhatHasNoRoomInHostMemoryIsReadAgain) {
  RigOptions options = Small(16);
  options.limits.max_host_pages = 2;
  Rig rig(options);
  const RequestId one = rig.Submit(MakePrompt(1, 12), 36);
  const RequestId two = rig.Submit(MakePrompt(2, 12), 36);
  rig.StepUntilDone();
  EXPECT_GE(rig.scheduler.stats().num_pauses, 1);
  EXPECT_GT(rig.scheduler.stats().read_tokens, 2 * 12);
  EXPECT_EQ(rig.Generated(one), FakeModel::Continue(MakePrompt(1, 12), 36));
  EXPECT_EQ(rig.Generated(two), FakeModel::Continue(MakePrompt(2, 12), 36));
}

TEST(SchedulerMemory, WhatAFailedPassShouldHaveSavedIsReadAgain) {
  RigOptions options = Small(16);
  options.limits.max_host_pages = 40;
  Rig rig(options);
  rig.Submit(MakePrompt(1, 12), 36);
  const RequestId two = rig.Submit(MakePrompt(2, 12), 36);
  while (true) {
    const Batch batch = rig.scheduler.Next(rig.now_ms);
    ASSERT_FALSE(batch.rows.empty());
    if (!batch.saves.empty()) break;
    rig.scheduler.Commit(batch, rig.model.Run(batch), rig.now_ms += 1.0);
  }
  rig.scheduler.Fail(rig.now_ms);
  EXPECT_EQ(rig.scheduler.stats().pages_on_host, 0);
  EXPECT_EQ(rig.scheduler.Get(two).status, RequestStatus::kPaused);
  rig.scheduler.TakeEvents();
  rig.StepUntilDone();
  EXPECT_EQ(rig.Reason(two), FinishReason::kLength);
}

TEST(SchedulerMemory, WhoWaitsIsLetInOnceThereIsRoom) {
  Rig rig(Small(16));
  SequencePages session(rig.pool, 4 * 8);
  const RequestId runs = rig.Submit(MakePrompt(1, 4), 28);
  rig.Step();
  const RequestId waits = rig.Submit(MakePrompt(2, 30), 1);
  rig.Step();
  rig.Step();
  EXPECT_EQ(rig.scheduler.Get(waits).status, RequestStatus::kQueued);
  session.Release();
  for (int i = 0; i < 2; ++i) rig.Step();
  EXPECT_EQ(rig.Reason(waits), FinishReason::kLength);
  EXPECT_EQ(rig.scheduler.Get(runs).status, RequestStatus::kDecoding);
}

TEST(SchedulerMemory, WhoWaitsIsLetInOnceItsPrefixIsKnown) {
  Rig rig(Small(10));
  const RequestId first = rig.Submit(MakePrompt(1, 25), 10);
  const RequestId second = rig.Submit(MakePrompt(1, 25), 1);
  rig.Step();
  EXPECT_EQ(rig.scheduler.Get(second).status, RequestStatus::kQueued);
  for (int i = 0; i < 3; ++i) rig.Step();
  EXPECT_EQ(rig.Reason(second), FinishReason::kLength);
  EXPECT_EQ(rig.scheduler.Get(second).cached_tokens, 24);
  EXPECT_EQ(rig.scheduler.Get(first).status, RequestStatus::kDecoding);
}

// Whoever is not read stops, holds up nobody, and goes on where it was.
TEST(SchedulerMemory, WhoeverIsNotReadWaits) {
  for (const bool verifies : {false, true}) {
    Rig rig;
    Request request = TidalRequest(20, 4);
    request.max_unread = 5;
    request.decoding.verifies = verifies;
    request.decoding.plan = verifies ? kTidal : PlanId::kDense;
    const RequestId slow = rig.Submit(MakePrompt(1, 10), request);
    const RequestId other = rig.Submit(MakePrompt(2, 10), 30);
    while (rig.Step()) {
    }
    EXPECT_EQ(rig.Generated(other), FakeModel::Continue(MakePrompt(2, 10), 30));
    const auto num_new = static_cast<int64_t>(rig.Generated(slow).size());
    EXPECT_GE(num_new, 5);
    EXPECT_LE(num_new, verifies ? 5 + 8 : 5) << "a round of drafts that all were kept, at most";
    EXPECT_EQ(rig.scheduler.stats().num_unread, 1);
    EXPECT_EQ(rig.scheduler.stats().num_decoding, 1);
    rig.scheduler.MarkHeard(slow, num_new);
    EXPECT_EQ(rig.scheduler.stats().num_unread, 0);
    EXPECT_TRUE(rig.Step());
    while (rig.scheduler.HasWork()) {
      rig.Step();
      rig.scheduler.MarkHeard(slow, rig.scheduler.Get(slow).num_new());
    }
    EXPECT_EQ(rig.Generated(slow), FakeModel::Continue(MakePrompt(1, 10), 20));
  }
}

// Its row and its pages are for those who wait; for want of a reader alone nobody is stuck.
TEST(SchedulerMemory, WhoeverIsNotReadMakesWay) {
  RigOptions options = Small(12, 4);
  options.limits.max_rows = 1;
  for (const int64_t max_rows : {1, 4}) {
    options.limits.max_rows = max_rows;
    Rig rig(options);
    Request request;
    request.sampling.max_new_tokens = 12;
    request.max_unread = 3;
    const RequestId slow = rig.Submit(MakePrompt(1, 20), request);
    while (rig.Step()) {
    }
    const RequestId other = rig.Submit(MakePrompt(2, 30), 10);  // ten pages of twelve
    while (rig.Step()) {
    }
    EXPECT_EQ(rig.Generated(other), FakeModel::Continue(MakePrompt(2, 30), 10));
    EXPECT_EQ(rig.scheduler.Get(slow).status, RequestStatus::kPaused);
    EXPECT_EQ(rig.scheduler.Get(slow).failure, RequestFailure::kNone);
    while (rig.scheduler.HasWork()) {
      rig.scheduler.MarkHeard(slow, rig.scheduler.Get(slow).num_new());
      ASSERT_TRUE(rig.Step());
    }
    EXPECT_EQ(rig.Generated(slow), FakeModel::Continue(MakePrompt(1, 20), 12));
  }
}

// Sessions hold all pages and nothing runs: a request would wait without end.
TEST(SchedulerMemory, WhatNothingCanMakeRoomForEnds) {
  Rig rig(Small(16));
  SequencePages session(rig.pool, 4 * 14);
  const RequestId id = rig.Submit(MakePrompt(1, 12), 4);
  const RequestId fits = rig.Submit(MakePrompt(2, 6), 1);
  EXPECT_TRUE(rig.Step());
  EXPECT_EQ(rig.Reason(fits), FinishReason::kLength);
  EXPECT_FALSE(rig.Step());
  EXPECT_EQ(rig.Reason(id), FinishReason::kError);
  EXPECT_EQ(rig.scheduler.Get(id).failure, RequestFailure::kNoRoom);
  EXPECT_NE(rig.scheduler.Get(id).ErrorText().find("pages, have 2 free of 16"), std::string::npos);
  ASSERT_EQ(rig.events.size(), 2u);
  EXPECT_EQ(rig.events.back().finish_reason, FinishReason::kError);
  EXPECT_EQ(rig.events.back().token_id, -1);
}

}  // namespace
}  // namespace tidal::test
