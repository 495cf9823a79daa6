// Scheduler: what prompts have in common is read once.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "scheduler_rig.h"

namespace tidal::test {
namespace {

using Passes = std::vector<std::string>;

TEST(SchedulerPrefixes, OnlyCleanPagesAreShared) {
  Rig rig;
  const RequestId tidal = rig.Submit(MakePrompt(1, 9), TidalRequest(12, 13));
  rig.StepUntilDone();
  Tokens all = MakePrompt(1, 9);
  const Tokens generated = rig.Generated(tidal);
  all.insert(all.end(), generated.begin(), generated.end());
  const std::string salt = rig.scheduler.Get(tidal).salt;
  // 9 tokens of the prompt and 4 that were decoded densely; the sparse ones never.
  EXPECT_EQ(rig.prefixes.Peek(all, salt).num_pages, 3);

  const RequestId dense = rig.Submit(all, 8);
  rig.StepUntilDone();
  EXPECT_EQ(rig.scheduler.Get(dense).cached_tokens, 12);
  EXPECT_EQ(rig.Generated(dense), FakeModel::Continue(all, 8));
  Tokens longer = all;
  const Tokens answer = rig.Generated(dense);
  longer.insert(longer.end(), answer.begin(), answer.end());
  EXPECT_EQ(rig.prefixes.Peek(longer, salt).num_pages, 7) << "21 + 7 cached tokens, all dense";
  EXPECT_EQ(rig.scheduler.stats().cached_tokens, 12);
}

TEST(SchedulerPrefixes, OfPromptsThatBeginAlikeOneIsRead) {
  RigOptions options;
  options.limits.max_pass_tokens = 16;
  Rig rig(options);
  std::vector<int32_t> longer = MakePrompt(1, 32);
  longer.insert(longer.end(), {7, 8, 9});
  const RequestId first = rig.Submit(MakePrompt(1, 32), 2);
  const RequestId same = rig.Submit(MakePrompt(1, 32), 2);
  const RequestId behind = rig.Submit(longer, 1);
  rig.StepUntilDone();
  // Pages are of four tokens; the last of a prompt is read by each, for its logits.
  EXPECT_EQ(rig.passes[0], "plan 0: 0 +16");
  EXPECT_EQ(rig.passes[1], "plan 0: 16 +16 draw 1");
  EXPECT_EQ(rig.scheduler.stats().read_tokens, 32 + 4 + 3);
  EXPECT_EQ(rig.scheduler.Get(same).cached_tokens, 28);
  EXPECT_EQ(rig.Generated(first), FakeModel::Continue(MakePrompt(1, 32), 2));
  EXPECT_EQ(rig.Generated(same), FakeModel::Continue(MakePrompt(1, 32), 2));
  EXPECT_EQ(rig.Generated(behind), FakeModel::Continue(longer, 1));
}

TEST(SchedulerPrefixes, WhoeverWaitsForAPromptReadsItOnceItsReaderIsGone) {
  RigOptions options;
  options.limits.max_pass_tokens = 16;
  Rig rig(options);
  const RequestId first = rig.Submit(MakePrompt(1, 32), 2);
  const RequestId same = rig.Submit(MakePrompt(1, 32), 2);
  ASSERT_TRUE(rig.Step());
  EXPECT_EQ(rig.scheduler.Get(same).status, RequestStatus::kQueued);
  rig.scheduler.Cancel(first, FinishReason::kAbort, rig.now_ms);
  rig.StepUntilDone();
  EXPECT_EQ(rig.passes, (Passes{"plan 0: 0 +16", "plan 0: 16 +16 draw 1", "plan 0: 32 +1 draw 1"}));
  EXPECT_EQ(rig.Generated(same), FakeModel::Continue(MakePrompt(1, 32), 2));
}

TEST(SchedulerPrefixes, AShortPromptDoesNotWaitForALongOneThatIsYetToBegin) {
  Rig rig;
  rig.Submit(MakePrompt(1, 100), 1);
  std::vector<int32_t> shorter = MakePrompt(1, 16);
  shorter.back() = 0;
  rig.Submit(shorter, 1);
  rig.now_ms = 1000.0;  // by then the shorter one is the more urgent
  ASSERT_TRUE(rig.Step());
  EXPECT_TRUE(rig.passes[0].starts_with("plan 0: 0 +16 draw 1")) << rig.passes[0];
}

TEST(SchedulerPrefixes, SaltsAndRotaryFrequenciesShareNothing) {
  Rig rig;
  Request one, two;
  one.sampling.max_new_tokens = two.sampling.max_new_tokens = 1;
  two.cache_salt = "two";
  rig.Submit(MakePrompt(1, 20), one);
  rig.StepUntilDone();
  for (const Request& request : {one, two}) {
    const RequestId id = rig.scheduler.Add(request, rig.MakeSequence(MakePrompt(1, 20), 2.0f), 0.0);
    rig.StepUntilDone();
    EXPECT_EQ(rig.scheduler.Get(id).cached_tokens, 0);
    EXPECT_EQ(rig.Generated(id), FakeModel::Continue(MakePrompt(1, 20), 1, 2.0f));
  }
  const RequestId again = rig.Submit(MakePrompt(1, 20), two);
  rig.StepUntilDone();
  EXPECT_EQ(rig.scheduler.Get(again).cached_tokens, 0);
  const RequestId same = rig.Submit(MakePrompt(1, 20), one);
  rig.StepUntilDone();
  EXPECT_EQ(rig.scheduler.Get(same).cached_tokens, 16);
}

}  // namespace
}  // namespace tidal::test
