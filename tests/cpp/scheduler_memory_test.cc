// Pages that run out: who is paused, that paused requests go on as if they had not been, and that
// everything comes back whatever happens.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <utility>
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
  const DecoderStats stats = rig.scheduler.stats();
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

TEST(SchedulerMemory, APausedRequestIsGivenItsLogitsOnce) {
  Rig rig(Small(16));
  rig.Submit(MakePrompt(1, 12), 36);
  Request request;
  request.sampling.max_new_tokens = 36;
  request.logits = LogitsWanted::kAll;
  const RequestId scored = rig.Submit(MakePrompt(2, 12), request);
  int64_t num_logits = 0;
  while (true) {
    const Batch batch = rig.scheduler.Next(rig.now_ms);
    if (batch.rows.empty()) break;
    const std::vector<RequestId> ids = rig.scheduler.InFlight();
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] == scored) num_logits += batch.rows[i].num_logits;
    }
    rig.scheduler.Commit(batch, rig.model.Run(batch), rig.now_ms += 1.0);
  }
  EXPECT_GE(rig.scheduler.Get(scored).num_pauses, 1);
  EXPECT_EQ(num_logits, 12 + 36 - 1) << "after every token but the last";
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
  request.keeps_pages = true;
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

// A random life of requests and sessions of every kind.
class RandomLife {
 public:
  explicit RandomLife(uint32_t seed) : random_(seed), rig_(Options()) {}

  void Run(int num_requests) {
    for (int submitted = 0; submitted < num_requests || rig_.scheduler.HasWork();) {
      if (submitted < num_requests && Chance(3)) {
        ++submitted;
        Chance(5) ? Talk() : Ask();
      }
      if (!ids_.empty() && Chance(4)) EndSome();
      if (!sessions_.empty() && Chance(30)) sessions_.pop_back();
      Chance(200) ? FailOne() : static_cast<void>(rig_.Step());
      rig_.scheduler.CheckIntegrity();
      if (::testing::Test::HasFatalFailure()) return;
    }
  }

  // Everything has ended and come back.
  void CheckEnd(DecoderStats& total, int64_t& num_evictions) {
    for (const RequestId id : ids_) {
      EXPECT_EQ(rig_.scheduler.Get(id).status, RequestStatus::kFinished);
    }
    sessions_.clear();
    while (!ids_.empty()) {
      rig_.scheduler.Remove(ids_.back());
      ids_.pop_back();
    }
    const DecoderStats stats = rig_.scheduler.stats();
    EXPECT_EQ(stats.num_reading + stats.num_decoding + stats.num_waiting + stats.num_paused, 0);
    EXPECT_EQ(stats.pages_held, 0);
    EXPECT_EQ(rig_.pool.num_free(), rig_.pool.num_pages());
    EXPECT_EQ(stats.pages_cached, rig_.prefixes.stats().pages);
    total.num_pauses += stats.num_pauses;
    total.num_finished += stats.num_finished;
    total.cached_tokens += stats.cached_tokens;
    total.generated_tokens += stats.generated_tokens;
    num_evictions += rig_.prefixes.stats().evictions;
  }

 private:
  bool Chance(uint32_t n) { return random_() % n == 0; }
  int64_t Below(uint32_t n) { return static_cast<int64_t>(random_() % n); }

  RigOptions Options() {
    RigOptions options = Small(24 + Below(40), Below(12));
    options.caches_prefixes = !Chance(5);
    options.limits.max_rows = 1 + Below(6);
    options.limits.max_pass_tokens = 4 + Below(40);
    options.limits.max_pass_draws = 4 + Below(20);
    options.limits.max_check_tokens = 2 + Below(20);
    options.limits.max_chunk_ms = 3.1 + static_cast<double>(Below(10)) * 0.1;
    options.limits.max_seq_len = 90;
    return options;
  }

  // Often the beginning of a prompt that was there before.
  Tokens RandomPrompt() {
    Tokens prompt = MakePrompt(static_cast<int32_t>(Below(5)), 1 + Below(50));
    if (Chance(3)) prompt.back() = static_cast<int32_t>(Below(kVocabSize));
    if (Chance(40)) prompt.back() = kPoison;
    return prompt;
  }

  Request RandomRequest() {
    Request request = TidalRequest(1 + Below(30), Chance(2) ? 8 : 30);
    // A plan has one length.
    if (request.decoding.dense_len == 8) request.decoding.plan = kOther;
    rig_.model.dense_len[request.decoding.plan] = request.decoding.dense_len;
    if (Chance(3)) request.decoding.plan = PlanId::kDense;
    request.decoding.verifies = Chance(2);
    request.decoding.draft_tokens = Below(9);
    request.decoding.correction_interval = Below(6);
    request.priority = static_cast<int32_t>(Below(2));
    request.cache_salt = Chance(4) ? "other" : "";
    request.logits = static_cast<LogitsWanted>(Chance(4) ? Below(3) : 0);
    return request;
  }

  void Ask() {
    const Tokens prompt = RandomPrompt();
    const Request request = RandomRequest();
    const auto need = static_cast<int64_t>(prompt.size()) + request.sampling.max_new_tokens;
    if (rig_.pool.PagesFor(need) > rig_.pool.num_pages()) {
      EXPECT_THROW(rig_.Submit(prompt, request), CapacityError);
    } else {
      ids_.push_back(rig_.Submit(prompt, request));
    }
  }

  // A turn of a session: a new one, one that goes on from where it was or from earlier, or a fork.
  void Talk() {
    auto sequence = std::make_unique<Sequence>(rig_.MakeSequence({}));
    if (!sessions_.empty() && !Chance(4)) {
      std::swap(sessions_[random_() % sessions_.size()], sessions_.back());
      if (Chance(4)) {
        Sequence& other = *sessions_.back();
        sequence = std::make_unique<Sequence>(Sequence{.tokens = other.tokens,
                                                       .cached = other.cached,
                                                       .num_sparse = other.num_sparse,
                                                       .clean_len = other.clean_len,
                                                       .pages = other.pages.Share(other.cached),
                                                       .inv_freq = other.inv_freq,
                                                       .sampling = {}});
      } else {
        sequence = std::move(sessions_.back());
        sessions_.pop_back();
      }
    }
    const int64_t keep = Below(static_cast<uint32_t>(sequence->tokens.size()) + 1);
    Tokens added = RandomPrompt();
    if (keep > 0 && Chance(3)) added.clear();
    const int64_t most = added.empty() ? keep - 1 : keep;
    sequence->tokens.resize(static_cast<size_t>(keep));
    sequence->tokens.insert(sequence->tokens.end(), added.begin(), added.end());
    const auto length = static_cast<int64_t>(sequence->tokens.size());
    sequence->dense_len = added.empty() ? std::min(sequence->dense_len, length) : length;
    const int64_t dropped = std::max<int64_t>(sequence->cached - most, 0);
    sequence->cached -= dropped;
    sequence->num_sparse = added.empty() ? std::max<int64_t>(sequence->num_sparse - dropped, 0) : 0;
    sequence->clean_len = std::min(sequence->clean_len, sequence->cached);

    Request request = RandomRequest();
    request.keeps_pages = true;
    // What was decoded sparsely a session corrects before its turn.
    if (sequence->num_sparse > 0) request.decoding.verifies = false;
    if (sequence->cached + 1 < length && Chance(5)) request.sampling.max_new_tokens = 0;
    const auto need =
        static_cast<int64_t>(sequence->tokens.size()) + request.sampling.max_new_tokens;
    if (need > 90 || rig_.pool.PagesFor(need) > rig_.pool.num_pages()) return;
    ids_.push_back(rig_.scheduler.Add(request, std::move(*sequence), rig_.now_ms));
  }

  void EndSome() {
    std::swap(ids_[random_() % ids_.size()], ids_.back());
    const RequestId id = ids_.back();
    if (rig_.scheduler.Get(id).status == RequestStatus::kFinished) {
      RequestState ended = rig_.scheduler.Remove(id);
      ids_.pop_back();
      if (!ended.request.keeps_pages || ended.failure != RequestFailure::kNone) return;
      sessions_.push_back(std::make_unique<Sequence>(std::move(ended.sequence)));
    } else if (Chance(3)) {
      rig_.scheduler.Cancel(id, Chance(2) ? FinishReason::kAbort : FinishReason::kStop,
                            rig_.now_ms);
    }
  }

  void FailOne() {
    const Batch batch = rig_.scheduler.Next(rig_.now_ms);
    if (batch.rows.empty()) return;
    if (Chance(2) && !ids_.empty()) EndSome();  // while the pass runs
    rig_.scheduler.Fail(rig_.now_ms);
  }

  std::mt19937 random_;
  Rig rig_;
  std::vector<RequestId> ids_;
  std::vector<std::unique_ptr<Sequence>> sessions_;
};

// 100,000 requests of every kind in 1,000 schedulers of every size.
TEST(SchedulerMemory, AllPagesAndRowsComeBackWhateverHappens) {
  DecoderStats total;
  int64_t num_evictions = 0;
  for (uint32_t seed = 0; seed < 1000; ++seed) {
    RandomLife life(seed);
    life.Run(120);
    life.CheckEnd(total, num_evictions);
    ASSERT_FALSE(::testing::Test::HasFailure()) << "seed " << seed;
  }
  EXPECT_GT(total.num_finished, 100000);
  EXPECT_GT(total.num_pauses, 5000);
  EXPECT_GT(total.cached_tokens, 100000);
  EXPECT_GT(num_evictions, 100000);
}

}  // namespace
}  // namespace tidal::test
