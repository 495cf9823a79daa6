// The scheduler before a real runner: whoever joins, leaves, is paused, finds a known prefix or
// names a plan of its own writes what it writes alone.
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "decode/model_runner.h"
#include "engine/scheduler.h"
#include "engine/sequence_maker.h"
#include "kv/prefix_cache.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

class SchedulerRunner : public DecoderTest {
 protected:
  // Draws go by the tokens before them.
  static SamplingParams Params(int64_t max_new_tokens) {
    SamplingParams params = Greedy(max_new_tokens);
    params.repetition_penalty = 1.1;
    params.frequency_penalty = 0.4;
    params.no_repeat_ngram_size = 3;
    params.logit_bias = {{40, 1.5}};
    return params;
  }

  // A decoder as it will be: a runner, the prefixes it knows, and who decides.
  struct Machine {
    Machine(const ModelConfig& model, const DecodeConfig& config, const WeightSource& weights)
        : runner(model, config, weights, nullptr),
          maker(runner),
          prefixes(runner.pool()),
          scheduler(runner.pool(), &prefixes,
                    {.max_rows = runner.config().max_batch_size,
                     .max_pass_tokens = runner.config().prefill_chunk,
                     .max_check_tokens = runner.max_pass_tokens(),
                     .max_seq_len = runner.config().max_seq_len,
                     .output_reserve = 8}) {}

    DecodePolicy PolicyOf(PlanId plan) const {
      const ActivePlan& active = runner.plan(plan);
      return {.plan = plan,
              .dense_len = active.selection.dense_len(),
              .correction_interval = active.config.correction_interval};
    }

    RequestId Submit(const Ints& prompt, int64_t max_new_tokens, const DecodePolicy& policy) {
      Request request;
      request.sampling = Params(max_new_tokens);
      request.decoding = policy;
      Sequence sequence = maker.Make(prompt, 0, runner.ScratchSampling());
      // The slot is the scheduler's choice.
      SetSampling(request.sampling, runner.model().vocab_size, -1, sequence);
      return scheduler.Add(request, std::move(sequence), now_ms);
    }

    bool Step() {
      const Batch batch = scheduler.Next(now_ms);
      if (batch.rows.empty()) return false;
      const Drawn drawn = runner.Run(batch);
      scheduler.Commit(batch, drawn, now_ms += 1.0);
      scheduler.CheckIntegrity();
      return true;
    }

    Ints TokensOf(RequestId id) const {
      const RequestState& state = scheduler.Get(id);
      return Ints(state.sequence.tokens.end() - state.num_new(), state.sequence.tokens.end());
    }

    ModelRunner runner;
    SequenceMaker maker;
    PrefixCache prefixes;
    Scheduler scheduler;
    double now_ms = 0.0;
  };

  void SetUp() override {
    DecoderTest::SetUp();
    if (IsSkipped()) return;
    if (!is_cpu()) GTEST_SKIP() << "on CUDA rows agree to rounding only";
  }

  Ints Alone(const DecodeConfig& config, const Ints& prompt, int64_t max_new_tokens) const {
    return Generate(*Make(config), {prompt}, Params(max_new_tokens))[0].token_ids;
  }

  static Ints Join(Ints one, const Ints& other) {
    one.insert(one.end(), other.begin(), other.end());
    return one;
  }
};

TEST_P(SchedulerRunner, EverybodyWritesWhatItWritesAlone) {
  DecodeConfig config = Tidal();
  config.verify = true;
  Machine machine(model_, config, weights_);
  DecodePolicy tidal = machine.PolicyOf(PlanId::kDecoder), verified = tidal;
  verified.verifies = true;
  DecodePolicy from_text = verified, both = verified;
  from_text.drafts = Drafts::kNgram;
  both.drafts = Drafts::kBoth;
  const DecodePolicy policies[] = {{}, tidal, verified, from_text, both};
  const Prompts prompts = MakePrompts({90, 3, 41, 1, 60, 150, 77, 33, 20, 51});
  std::vector<RequestId> ids;
  for (size_t i = 0; i < prompts.size(); ++i) {
    ids.push_back(machine.Submit(prompts[i], 24, policies[i % 5]));
    for (int step = 0; step < 3; ++step) machine.Step();
  }
  while (machine.Step()) {
  }

  for (size_t i = 0; i < prompts.size(); ++i) {
    EXPECT_EQ(machine.TokensOf(ids[i]), Alone(i % 5 == 1 ? Tidal() : Dense(), prompts[i], 24)) << i;
  }
  EXPECT_EQ(machine.scheduler.stats().pages_held, 0);
}

TEST_P(SchedulerRunner, AKnownPrefixChangesNothing) {
  Machine machine(model_, Tidal(), weights_);
  const DecodePolicy tidal = machine.PolicyOf(PlanId::kDecoder);
  const Ints prefix = MakePrompts({100})[0];
  int64_t cached = 0;
  for (int i = 0; i < 6; ++i) {
    const Ints prompt = Join(prefix, MakePrompts({5 + 9 * i}, 20 + static_cast<uint64_t>(i))[0]);
    const bool is_tidal = i % 2 == 0;
    const RequestId id = machine.Submit(prompt, 20, is_tidal ? tidal : DecodePolicy{});
    while (machine.Step()) {
    }
    EXPECT_EQ(machine.TokensOf(id), Alone(is_tidal ? Tidal() : Dense(), prompt, 20)) << i;
    EXPECT_EQ(machine.scheduler.Get(id).cached_tokens, i == 0 ? 0 : 96);
    cached += machine.scheduler.Get(id).cached_tokens;
  }
  EXPECT_EQ(machine.scheduler.stats().cached_tokens, cached);
}

TEST_P(SchedulerRunner, APausedRequestGoesOnAsIfItHadNotBeen) {
  const std::pair<bool, Drafts> ways[] = {
      {false, Drafts::kTidal}, {true, Drafts::kTidal}, {true, Drafts::kNgram}};
  for (const auto& [verifies, drafts] : ways) {
    DecodeConfig config = verifies ? Tidal() : Dense();
    config.verify = verifies;
    config.num_pages = 14;
    Machine machine(model_, config, weights_);
    DecodePolicy policy = machine.PolicyOf(PlanId::kDecoder);
    policy.verifies = verifies;
    policy.drafts = drafts;
    const Prompts prompts = MakePrompts({60, 41, 20});
    std::vector<RequestId> ids;
    for (const Ints& prompt : prompts) ids.push_back(machine.Submit(prompt, 70, policy));
    while (machine.Step()) {
    }
    for (size_t i = 0; i < prompts.size(); ++i) {
      EXPECT_EQ(machine.TokensOf(ids[i]), Alone(Dense(), prompts[i], 70)) << i;
    }
    EXPECT_GE(machine.scheduler.stats().num_pauses, 1);
    EXPECT_EQ(machine.runner.pool().num_free(), 14);
  }
}

TEST_P(SchedulerRunner, CorrectionsAreThoseOfADecoder) {
  DecodeConfig config = Tidal();
  config.correction_interval = 7;
  Machine machine(model_, config, weights_);
  const Prompts prompts = MakePrompts({90, 41});
  std::vector<RequestId> ids;
  for (const Ints& prompt : prompts) {
    ids.push_back(machine.Submit(prompt, 40, machine.PolicyOf(PlanId::kDecoder)));
  }
  while (machine.Step()) {
  }
  for (size_t i = 0; i < prompts.size(); ++i) {
    EXPECT_EQ(machine.TokensOf(ids[i]), Alone(config, prompts[i], 40)) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, SchedulerRunner, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
