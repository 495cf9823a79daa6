// Pages that run out: who is paused, that paused requests go on as if they had not been, and that
// everything comes back whatever happens.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "scheduler_rig.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

RigOptions Small(int64_t num_pages, int64_t output_reserve = 0) {
  RigOptions options;
  options.num_pages = num_pages;
  options.limits.output_reserve = output_reserve;
  return options;
}

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
  const SchedulerStats stats = rig.scheduler.stats();
  EXPECT_EQ(stats.pages_held, 0);
  EXPECT_EQ(stats.pages_cached, 39 / 4);
  EXPECT_EQ(stats.pages_free, 64 - 39 / 4);
  EXPECT_EQ(stats.read_tokens, 10);
  EXPECT_EQ(stats.generated_tokens, 30);
  EXPECT_EQ(stats.num_chunks, 1);
  EXPECT_EQ(stats.num_steps, 29);
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
  EXPECT_GE(rig.scheduler.stats().prefixes.evictions, 11);
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
  EXPECT_NE(rig.scheduler.Get(id).ErrorText().find("close sessions"), std::string::npos);
  ASSERT_EQ(rig.events.size(), 2u);
  EXPECT_EQ(rig.events.back().finish_reason, FinishReason::kError);
  EXPECT_EQ(rig.events.back().token_id, -1);
}

// Runs a random life of requests of every kind; adds its counts to `total`.
void RunRandomly(uint32_t seed, int num_requests, SchedulerStats& total) {
  std::mt19937 random(seed);
  const auto chance = [&](uint32_t n) { return random() % n == 0; };
  RigOptions options = Small(24 + random() % 40, static_cast<int64_t>(random() % 12));
  options.caches_prefixes = !chance(5);
  options.limits.max_rows = 1 + static_cast<int64_t>(random() % 6);
  options.limits.max_pass_tokens = 4 + static_cast<int64_t>(random() % 40);
  options.limits.max_pass_draws = 4 + static_cast<int64_t>(random() % 20);
  options.limits.max_chunk_ms = 3.1 + (random() % 10) * 0.1;
  options.limits.max_seq_len = 90;
  Rig rig(options);
  std::vector<RequestId> ids;
  std::vector<Tokens> prompts;
  const auto end_some = [&] {
    std::swap(ids[random() % ids.size()], ids.back());
    const RequestId id = ids.back();
    if (rig.scheduler.Get(id).status == RequestStatus::kFinished) {
      rig.scheduler.Remove(id);
      ids.pop_back();
    } else if (chance(3)) {
      rig.scheduler.Cancel(id, chance(2) ? FinishReason::kAbort : FinishReason::kStop, rig.now_ms);
    }
  };
  for (int submitted = 0; submitted < num_requests || rig.scheduler.HasWork();) {
    if (submitted < num_requests && chance(3)) {
      ++submitted;
      // Often the beginning of a prompt that was there before.
      Tokens prompt = MakePrompt(static_cast<int32_t>(random() % 5), 1 + random() % 50);
      if (chance(3)) prompt.back() = static_cast<int32_t>(random() % kVocabSize);
      if (chance(40)) prompt.back() = kPoison;
      Request request = TidalRequest(1 + random() % 30, chance(2) ? 8 : 30);
      // A plan has one length.
      if (request.decoding.dense_len == 8) request.decoding.plan = kOther;
      if (chance(3)) request.decoding.plan = PlanId::kDense;
      request.decoding.verifies = chance(2);
      request.decoding.draft_tokens = static_cast<int64_t>(random() % 4);
      request.decoding.correction_interval = static_cast<int64_t>(random() % 6);
      request.priority = static_cast<int32_t>(random() % 2);
      request.cache_salt = chance(4) ? "other" : "";
      request.logits = static_cast<LogitsWanted>(chance(4) ? random() % 3 : 0);
      const auto need = static_cast<int64_t>(prompt.size()) + request.sampling.max_new_tokens;
      if (rig.pool.PagesFor(need) > rig.pool.num_pages()) {
        EXPECT_THROW(rig.Submit(prompt, request), CapacityError);
      } else {
        ids.push_back(rig.Submit(prompt, request));
      }
    }
    if (!ids.empty() && chance(4)) end_some();
    if (chance(200)) {
      const Batch batch = rig.scheduler.Next(rig.now_ms);
      if (!batch.rows.empty()) {
        if (chance(2) && !ids.empty()) end_some();  // while the pass runs
        rig.scheduler.Fail(rig.now_ms);
      }
      rig.scheduler.CheckIntegrity();
    } else {
      rig.Step();
    }
    if (::testing::Test::HasFatalFailure()) return;
  }
  for (const RequestId id : ids) {
    EXPECT_EQ(rig.scheduler.Get(id).status, RequestStatus::kFinished);
  }
  const SchedulerStats stats = rig.scheduler.stats();
  EXPECT_EQ(stats.num_reading + stats.num_decoding + stats.num_waiting + stats.num_paused, 0);
  EXPECT_EQ(stats.pages_held, 0);
  EXPECT_EQ(rig.pool.num_free(), options.num_pages);
  EXPECT_EQ(stats.pages_cached, stats.prefixes.pages);
  total.num_pauses += stats.num_pauses;
  total.num_finished += stats.num_finished;
  total.cached_tokens += stats.cached_tokens;
  total.generated_tokens += stats.generated_tokens;
  total.prefixes.evictions += stats.prefixes.evictions;
}

// 100,000 requests of every kind in 1,000 schedulers of every size.
TEST(SchedulerMemory, AllPagesAndRowsComeBackWhateverHappens) {
  SchedulerStats total;
  for (uint32_t seed = 0; seed < 1000; ++seed) {
    RunRandomly(seed, 100, total);
    ASSERT_FALSE(::testing::Test::HasFailure()) << "seed " << seed;
  }
  EXPECT_GT(total.num_finished, 90000);
  EXPECT_GT(total.num_pauses, 5000);
  EXPECT_GT(total.cached_tokens, 100000);
  EXPECT_GT(total.prefixes.evictions, 100000);
}

}  // namespace
}  // namespace tidal::test
