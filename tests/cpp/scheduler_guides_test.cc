// Guided requests: what is asked of guides, that every draw goes by the mask that was given for its
// very tokens, and that whoever waits for a mask holds nobody up.
#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "engine/guidance.h"
#include "scheduler_rig.h"

namespace tidal::test {
namespace {

constexpr size_t kWords = (kVocabSize + 31) / 32;
const std::vector<uint32_t> kNothing(kWords, 0);

// A mask that nothing but these tokens has: half of all tokens, and `next`.
std::vector<uint32_t> MaskOf(std::span<const int32_t> generated, int32_t next) {
  uint32_t hash = 0x811c9dc5u;
  for (int32_t token : generated) hash = (hash ^ static_cast<uint32_t>(token)) * 0x01000193u;
  std::vector<uint32_t> mask(kWords);
  for (uint32_t& word : mask) word = hash = (hash ^ (hash >> 15)) * 0x85ebca77u + 1;
  mask[static_cast<size_t>(next / 32)] |= 1u << (next % 32);
  return mask;
}

Request Guided(Request request) {
  request.sampling.guide = 7;
  return request;
}

Request Guided(int64_t max_new_tokens) {
  Request request;
  request.sampling.max_new_tokens = max_new_tokens;
  return Guided(request);
}

Request GuidedVerified(int64_t max_new_tokens, int64_t draft_tokens,
                       Drafts drafts = Drafts::kTidal) {
  Request request = TidalRequest(max_new_tokens, 0);
  request.decoding.verifies = true;
  request.decoding.drafts = drafts;
  request.decoding.draft_tokens = draft_tokens;
  return Guided(request);
}

// A rig with somebody who answers.
class GuideRig : public Rig {
 public:
  explicit GuideRig(const RigOptions& options = {})
      : Rig(options), vocab_size_(options.vocab_size) {}

  // Follows the questions, and has their answers ready.
  void Ask() {
    for (const GuideQuestion& question : scheduler.AskGuides(now_ms)) {
      EXPECT_EQ(question.guide, 7);
      Tokens& told = told_[question.request];
      EXPECT_LE(question.keep, static_cast<int64_t>(told.size()));
      told.resize(static_cast<size_t>(question.keep));
      told.insert(told.end(), question.tokens.begin(), question.tokens.end());
      ++num_questions;
      GuideAnswer answer = {.request = question.request, .number = question.number};
      if (told.size() >= end_at) {
        answer.is_complete = true;
        answer.allowed = kNothing;
      } else if (told.size() >= fail_at) {
        answer.error = "guide: it fails";
      } else {
        answer.allowed = MaskOf(question.request, told);
      }
      answers.push_back(std::move(answer));
    }
  }

  void Answer() {
    scheduler.TakeAnswer(std::move(answers.front()));
    answers.pop_front();
  }

  // A pass, whose guided draws have the masks of the tokens before them.
  bool StepGuided() {
    const Batch batch = scheduler.Next(now_ms);
    const std::vector<RequestId> ids = scheduler.InFlight();
    for (size_t i = 0; i < batch.rows.size(); ++i) CheckMasks(batch.rows[i], ids[i]);
    const bool has_rows = !batch.rows.empty();
    if (has_rows || !batch.saves.empty()) {
      Drawn drawn = model.Run(batch);
      for (size_t i = 0; i < batch.rows.size(); ++i) {
        for (size_t j = 0; j < batch.rows[i].allowed.size() / kWords; ++j) {
          if (MaskAt(batch.rows[i], j) == kNothing) drawn.tokens[i][j] = -1;
        }
      }
      now_ms += model.last_ms();
      scheduler.Commit(batch, drawn, now_ms);
    }
    Ask();
    scheduler.CheckIntegrity();
    for (const RequestEvent& event : scheduler.TakeEvents()) events.push_back(event);
    return has_rows;
  }

  void RunToEnd() {
    Ask();
    for (int i = 0; i < 10'000 && scheduler.HasWork(); ++i) {
      while (!answers.empty()) Answer();
      StepGuided();
    }
    EXPECT_FALSE(scheduler.HasWork());
  }

  // What dense decoding writes.
  Tokens Dense(const Tokens& prompt, int64_t count) const {
    return FakeModel::Continue(prompt, count, 1.0f, vocab_size_);
  }

  std::deque<GuideAnswer> answers;
  int64_t num_questions = 0;
  size_t end_at = 1'000, fail_at = 1'000;

  RequestId SubmitGuided(Tokens prompt, Request request) {
    const RequestId id = Submit(prompt, std::move(request));
    prompts_[id] = std::move(prompt);
    Ask();
    return id;
  }

 private:
  std::vector<uint32_t> MaskOf(RequestId id, std::span<const int32_t> generated) const {
    Tokens all = prompts_.at(id);
    all.insert(all.end(), generated.begin(), generated.end());
    return test::MaskOf(generated, Dense(all, 1)[0]);
  }

  static std::vector<uint32_t> MaskAt(const BatchRow& row, size_t draw) {
    const auto mask = row.allowed.begin() + static_cast<std::ptrdiff_t>(draw * kWords);
    return {mask, mask + kWords};
  }

  void CheckMasks(const BatchRow& row, RequestId id) const {
    if (!prompts_.contains(id)) {
      EXPECT_TRUE(row.allowed.empty());
      return;
    }
    ASSERT_EQ(row.allowed.size(), static_cast<size_t>(row.num_draws) * kWords);
    const Sequence& sequence = *row.sequence;
    for (int64_t i = 0; i < row.num_draws; ++i) {
      const int64_t length = sequence.cached + row.num_tokens - row.num_draws + i + 1;
      const auto before = std::span(sequence.tokens)
                              .first(static_cast<size_t>(length))
                              .subspan(prompts_.at(id).size());
      const bool is_past_end = before.size() >= std::min(end_at, fail_at);
      EXPECT_EQ(MaskAt(row, static_cast<size_t>(i)), is_past_end ? kNothing : MaskOf(id, before))
          << "draw " << i << " of request " << id;
    }
  }

  int32_t vocab_size_;
  std::map<RequestId, Tokens> prompts_;
  std::map<RequestId, Tokens> told_;
};

TEST(SchedulerGuides, EveryDrawGoesByTheMaskOfItsTokens) {
  GuideRig rig;
  const RequestId plain = rig.SubmitGuided(MakePrompt(1, 10), Guided(12));
  const RequestId verified = rig.SubmitGuided(MakePrompt(2, 10), GuidedVerified(30, 4));
  const RequestId sparse = rig.SubmitGuided(MakePrompt(3, 70), Guided(TidalRequest(12, 20)));
  const RequestId free = rig.Submit(MakePrompt(4, 10), 12);
  rig.RunToEnd();
  EXPECT_EQ(rig.Generated(plain), FakeModel::Continue(MakePrompt(1, 10), 12));
  EXPECT_EQ(rig.Generated(verified), FakeModel::Continue(MakePrompt(2, 10), 30));
  EXPECT_EQ(rig.Generated(sparse).size(), 12u);
  EXPECT_EQ(rig.Generated(free), FakeModel::Continue(MakePrompt(4, 10), 12));
  const Verification counts = rig.scheduler.Get(verified).verification;
  EXPECT_GT(counts.drafted_tokens, counts.accepted_tokens) << "no draft was taken back";
}

TEST(SchedulerGuides, DraftsFromTheTextThatAGuideForbidsAreNotChecked) {
  RigOptions options;
  options.vocab_size = 3;
  GuideRig rig(options);
  int64_t num_drafted = 0, num_accepted = 0, num_free = 0;
  for (int32_t i = 0; i < 20; ++i) {
    const Tokens prompt = FakeModel::Continue(MakePrompt(i, 5), 30, 1.0f, 3);
    for (const bool is_guided : {true, false}) {
      Request request = GuidedVerified(20, 4, Drafts::kNgram);
      if (!is_guided) request.sampling.guide = 0;
      const RequestId id =
          is_guided ? rig.SubmitGuided(prompt, request) : rig.Submit(prompt, request);
      rig.RunToEnd();
      EXPECT_EQ(rig.Generated(id), rig.Dense(prompt, 20));
      const Verification counts = rig.scheduler.Get(id).verification;
      EXPECT_EQ(counts.accepted_tokens + counts.dense_passes, 19);
      (is_guided ? num_drafted : num_free) += counts.drafted_tokens;
      if (is_guided) num_accepted += counts.accepted_tokens;
    }
  }
  EXPECT_GT(num_accepted, 50);
  EXPECT_LT(num_drafted, num_free) << "no draft was forbidden";
}

TEST(SchedulerGuides, WhoLacksAMaskWaitsAndOthersGoOn) {
  GuideRig rig;
  const RequestId guided = rig.SubmitGuided(MakePrompt(1, 10), Guided(8));
  EXPECT_FALSE(rig.StepGuided()) << "it read before its first mask";
  EXPECT_TRUE(rig.scheduler.MasksAskedAt());
  const RequestId free = rig.Submit(MakePrompt(2, 10), 8);
  for (int i = 0; i < 8; ++i) EXPECT_TRUE(rig.StepGuided());
  EXPECT_EQ(rig.Reason(free), FinishReason::kLength);
  EXPECT_EQ(rig.Generated(guided), Tokens{});
  EXPECT_EQ(rig.num_questions, 1);
  EXPECT_FALSE(rig.StepGuided()) << "nobody is given up while a mask is missing";
  EXPECT_EQ(rig.Reason(guided), FinishReason::kNone);
  rig.Answer();
  EXPECT_FALSE(rig.scheduler.MasksAskedAt());
  EXPECT_TRUE(rig.StepGuided());
  EXPECT_EQ(rig.Generated(guided).size(), 1u);
  rig.RunToEnd();
  EXPECT_EQ(rig.num_questions, 8) << "one for each token";
}

TEST(SchedulerGuides, OthersAreCheckedWhileADraftWaitsForItsMask) {
  GuideRig rig;
  const RequestId guided = rig.SubmitGuided(MakePrompt(1, 10), GuidedVerified(20, 3));
  Request request = TidalRequest(20, 0);
  request.decoding.verifies = true;
  const RequestId free = rig.Submit(MakePrompt(2, 10), request);
  rig.Answer();
  for (int i = 0; i < 200 && rig.Reason(free) == FinishReason::kNone; ++i) rig.StepGuided();
  EXPECT_EQ(rig.Generated(free), FakeModel::Continue(MakePrompt(2, 10), 20));
  EXPECT_EQ(rig.Reason(guided), FinishReason::kNone);
  rig.RunToEnd();
  EXPECT_EQ(rig.Generated(guided), FakeModel::Continue(MakePrompt(1, 10), 20));
}

TEST(SchedulerGuides, NobodyWaitsForPagesOfWhoLacksAMask) {
  GuideRig rig;
  const RequestId guided = rig.SubmitGuided(MakePrompt(1, 40), Guided(5));
  const RequestId free = rig.Submit(MakePrompt(1, 40), 5);  // which would follow it
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(rig.StepGuided());
  EXPECT_EQ(rig.Generated(free), FakeModel::Continue(MakePrompt(1, 40), 5));
  EXPECT_EQ(rig.Reason(guided), FinishReason::kNone);
  rig.RunToEnd();
  EXPECT_EQ(rig.Generated(guided), rig.Generated(free));
}

TEST(SchedulerGuides, AGuideEndsARequest) {
  for (const bool verifies : {false, true}) {
    GuideRig rig;
    rig.end_at = 5;
    const RequestId id =
        rig.SubmitGuided(MakePrompt(1, 10), verifies ? GuidedVerified(20, 3) : Guided(20));
    rig.RunToEnd();
    EXPECT_EQ(rig.Reason(id), FinishReason::kStop);
    EXPECT_EQ(rig.Generated(id), FakeModel::Continue(MakePrompt(1, 10), 5));
    EXPECT_EQ(rig.events.back().finish_reason, FinishReason::kStop);
    EXPECT_EQ(rig.events.back().token_id, -1);
  }
}

TEST(SchedulerGuides, AGuideThatFailsEndsARequestWithItsReason) {
  for (const bool verifies : {false, true}) {
    GuideRig rig;
    rig.fail_at = 5;
    const RequestId id =
        rig.SubmitGuided(MakePrompt(1, 10), verifies ? GuidedVerified(20, 3) : Guided(20));
    rig.RunToEnd();
    EXPECT_EQ(rig.Reason(id), FinishReason::kError);
    EXPECT_EQ(rig.scheduler.Get(id).ErrorText(), "guide: it fails");
    EXPECT_EQ(rig.Generated(id), FakeModel::Continue(MakePrompt(1, 10), 5));
    EXPECT_EQ(rig.scheduler.stats().pages_held, 0);
  }
}

TEST(SchedulerGuides, AnswersThatComeTooLateHaveNoEffect) {
  GuideRig rig;
  const RequestId id = rig.SubmitGuided(MakePrompt(1, 10), Guided(20));
  const GuideAnswer first = rig.answers.front();
  rig.Answer();
  rig.scheduler.TakeAnswer(first);  // twice
  rig.scheduler.TakeAnswer({.request = id, .number = first.number + 1, .allowed = {1}});
  rig.scheduler.TakeAnswer({.request = 99, .number = 1, .allowed = {1}});
  rig.StepGuided();
  rig.scheduler.TakeAnswer(first);
  EXPECT_TRUE(rig.scheduler.MasksAskedAt());
  rig.scheduler.Cancel(id, FinishReason::kAbort, rig.now_ms);
  rig.Answer();
  EXPECT_EQ(rig.Reason(id), FinishReason::kAbort);
  EXPECT_FALSE(rig.scheduler.MasksAskedAt());
  const RequestId free = rig.Submit(MakePrompt(2, 10), 4);
  rig.scheduler.TakeAnswer({.request = free, .number = 1, .allowed = {1}});
  rig.RunToEnd();
}

TEST(SchedulerGuides, WhatAGuideWasToldIsWhatItHasToKnow) {
  Guidance guidance;
  const Tokens tokens = {5, 6, 7, 8};
  const auto all = std::span(tokens);
  auto question = guidance.Ask(all.first(0), 0);
  ASSERT_TRUE(question);
  EXPECT_EQ(question->keep, 0);
  EXPECT_FALSE(guidance.Ask(all.first(0), 0)) << "asked twice";
  guidance.Take({.number = question->number, .allowed = {1}});
  EXPECT_TRUE(guidance.HasMask(0));
  question = guidance.Ask(all.first(2), 2);  // drafts, about one after the other
  ASSERT_TRUE(question);
  EXPECT_EQ(question->tokens, Tokens({5}));
  EXPECT_FALSE(guidance.Ask(all.first(2), 2)) << "asked twice";
  EXPECT_EQ(guidance.NumAllowed(all.first(2)), 0) << "the first mask allows token 0 only";
  guidance.Take({.number = question->number, .allowed = {1 << 6}});
  EXPECT_FALSE(guidance.HasMask(2));
  question = guidance.Ask(all.first(2), 2);
  ASSERT_TRUE(question);
  EXPECT_EQ(question->keep, 1);
  EXPECT_EQ(question->tokens, Tokens({6}));
  const Tokens other = {5, 9};
  question = guidance.Ask(other, 0);  // one of them was kept
  ASSERT_TRUE(question);
  EXPECT_EQ(question->keep, 1);
  EXPECT_EQ(question->tokens, Tokens({9}));
  EXPECT_FALSE(guidance.HasMask(0));
}

// Very many random ones, whose answers come when they come.
TEST(SchedulerGuides, RandomRequestsDrawByTheirMasksAndEnd) {
  int64_t num_pauses = 0;
  for (uint32_t seed = 0; seed < 60; ++seed) {
    std::mt19937 random(seed);
    auto upto = [&](int64_t most) {
      return std::uniform_int_distribution<int64_t>(0, most)(random);
    };
    RigOptions options;
    options.num_pages = 20 + upto(40);
    options.limits.output_reserve = upto(8);
    options.limits.max_host_pages = seed % 2 == 0 ? 0 : upto(30);
    if (seed % 3 > 0) options.vocab_size = static_cast<int32_t>(2 * (seed % 3));
    GuideRig rig(options);
    std::map<RequestId, std::pair<Tokens, int64_t>> exact;
    std::set<RequestId> all;
    for (int turn = 0; turn < 400; ++turn) {
      if (all.size() < 25 && upto(5) == 0) {
        const Tokens prompt = MakePrompt(static_cast<int32_t>(all.size()), 1 + upto(25));
        const int64_t count = 1 + upto(20);
        const int64_t kind = upto(4);
        if (kind == 0) {
          all.insert(rig.Submit(prompt, count));
          continue;
        }
        Request request = Guided(count);
        if (kind == 2) request = GuidedVerified(count, upto(5));
        if (kind == 3)
          request = GuidedVerified(count, upto(5), upto(1) == 0 ? Drafts::kNgram : Drafts::kBoth);
        if (kind == 4) request = Guided(TidalRequest(count, 4));
        if (kind == 4) request.decoding.plan = kOther;
        const RequestId id = rig.SubmitGuided(prompt, request);
        all.insert(id);
        if (kind < 4) exact.emplace(id, std::pair(prompt, count));
      }
      if (!all.empty() && upto(60) == 0) {
        auto cancelled = std::next(all.begin(), upto(static_cast<int64_t>(all.size()) - 1));
        rig.scheduler.Cancel(*cancelled, FinishReason::kAbort, rig.now_ms);
      }
      while (!rig.answers.empty() && upto(2) > 0) rig.Answer();
      rig.StepGuided();
      if (testing::Test::HasFailure()) FAIL() << "seed " << seed;
    }
    rig.RunToEnd();
    for (const auto& [id, asked] : exact) {
      if (rig.Reason(id) == FinishReason::kAbort) continue;
      EXPECT_EQ(rig.Reason(id), FinishReason::kLength);
      EXPECT_EQ(rig.Generated(id), rig.Dense(asked.first, asked.second)) << seed;
    }
    EXPECT_EQ(rig.pool.num_free(), options.num_pages);
    num_pauses += rig.scheduler.stats().num_pauses;
  }
  EXPECT_GT(num_pauses, 20) << "too few to have tried that";
}

}  // namespace
}  // namespace tidal::test
