// The plan of an engine's memory: that it is what is allocated, that it is held, and what is said
// when it does not fit.
#include <gtest/gtest.h>

#include "backend/memory_meter.h"
#include "decode/memory_plan.h"
#include "decode/model_runner.h"
#include "engine/sequence_maker.h"
#include "reading.h"
#include "throws.h"
#include "tidal/error.h"
#include "tidal/quantized_weights.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

class MemoryPlanTest : public DecoderTest {
 protected:
  DecodeConfig Verifying() const {
    DecodeConfig config = Tidal();
    config.verify = true;
    return config;
  }

  // Every kind of decoder.
  std::vector<DecodeConfig> Configs() const {
    DecodeConfig automatic = Tidal();
    automatic.max_seq_len = automatic.prefill_chunk = 0;
    DecodeConfig few_pages = Tidal();
    few_pages.num_pages = 7;
    few_pages.granularity = Granularity::kHead;
    DecodeConfig drafts = Verifying();
    drafts.draft_tokens = 33;
    drafts.max_batch_size = 2;
    DecodeConfig ngrams = Dense();
    ngrams.verify = true;
    ngrams.drafts = Drafts::kNgram;
    DecodeConfig corrected = Tidal();
    corrected.correction_interval = 4;
    corrected.granularity = Granularity::kLayer;
    DecodeConfig scored = Tidal();
    scored.select_layers = {};
    scored.scored_layers = {2, 4};
    DecodeConfig coded = drafts;
    coded.kv_dtype = DType::kFloat8;
    std::vector<DecodeConfig> configs = {Dense(), Tidal(), Verifying(), automatic, few_pages,
                                         drafts,  ngrams,  corrected,   scored,    coded};
    if (GetParam().is_cpu()) {
      scored.shadow = Shadow::kInt4;
      configs.push_back(scored);
    }
    return configs;
  }
};

void ExpectAllocatedAsPlanned(const ModelRunner& runner) {
  const MemoryPlan& plan = runner.memory_plan();
  std::vector<MemoryItem> planned = plan.scratch;
  AddItem(planned, {"the model's weights", plan.weight_bytes});
  AddItem(planned, {"the KV cache", plan.kv_bytes});
  for (const MemoryItem& item : runner.allocated()) {
    AddItem(planned, {item.purpose, -item.bytes});
  }
  for (const MemoryItem& left : planned) EXPECT_EQ(left.bytes, 0) << left.purpose;
  EXPECT_EQ(plan.num_pages, runner.config().num_pages);
  EXPECT_EQ(plan.max_seq_len, runner.config().max_seq_len);
  EXPECT_LE(plan.total_bytes(), plan.usable_bytes);
}

TEST_P(MemoryPlanTest, IsWhatIsAllocated) {
  for (const DecodeConfig& config : Configs()) {
    ExpectAllocatedAsPlanned(ModelRunner(model_, config, weights_, nullptr));
  }
}

TEST_P(MemoryPlanTest, CountsTheCodesOfWeightsThatStayInThem) {
  model_.hidden_size = 256;
  model_.intermediate_size = 512;
  const ModelConfig& m = model_;
  const DecodeConfig config = Tidal();
  const std::vector<std::pair<int64_t, int64_t>> matrices = {
      {m.q_size() + 2 * m.kv_size(), m.hidden_size},
      {m.hidden_size, m.q_size()},
      {2 * m.intermediate_size, m.hidden_size},
      {m.hidden_size, m.intermediate_size}};
  const auto weight_bytes = [&](WeightCodes codes) {
    const RandomWeightSource source(m, config.dtype, 0, codes);
    const ModelRunner runner(m, config, source, nullptr);
    ExpectAllocatedAsPlanned(runner);
    return runner.memory_plan().weight_bytes;
  };
  int64_t elements = 0, float8 = 0, int4 = 0;  // of a layer; random codes have scales of 16 bits
  for (const auto& [rows, in] : matrices) {
    elements += rows * in;
    float8 += rows * (in + 2);
    int4 += rows * (in / 2 + in / 128 * 2);
  }
  const int64_t plain = weight_bytes(WeightCodes::kNone);
  const int64_t numbers = elements * DTypeBytes(config.dtype);
  EXPECT_EQ(weight_bytes(WeightCodes::kFloat8), plain - m.num_layers * (numbers - float8));
  EXPECT_EQ(weight_bytes(WeightCodes::kInt4), plain - m.num_layers * (numbers - int4));
}

// Half a byte, and a byte for 32: 4.25 bits. What all tokens have stays as it is.
TEST_P(MemoryPlanTest, CountsTheCodesOfExperts) {
  model_.num_experts = 6;
  model_.experts_per_token = 2;
  model_.expert_intermediate_size = 96;
  model_.shared_expert_size = 1100;
  model_.shared_expert_gate = model_.router_correction = true;
  model_.mlp_bias = true;
  model_.layers.resize(static_cast<size_t>(model_.num_layers), {.has_experts = true});
  const DecodeConfig config = Dense();
  const auto weight_bytes = [&](WeightCodes codes) {
    const RandomWeightSource source(model_, config.dtype, 0, codes);
    const ModelRunner runner(model_, config, source, nullptr);
    ExpectAllocatedAsPlanned(runner);
    return runner.memory_plan().weight_bytes;
  };
  const int64_t numbers = model_.num_layers * 6 * 3 * 96 * model_.hidden_size;
  EXPECT_EQ(
      weight_bytes(WeightCodes::kMxfp4),
      weight_bytes(WeightCodes::kNone) - numbers * DTypeBytes(config.dtype) + numbers * 17 / 32);
}

TEST_P(MemoryPlanTest, IsTheSameWithoutLoading) {
  for (const DecodeConfig& config : Configs()) {
    const MemoryPlan plan = PlanMemory(model_, config, RandomWeightSource(model_, config.dtype));
    const std::unique_ptr<Decoder> decoder = Make(config);
    const MemoryPlan& held = decoder->memory_plan();
    EXPECT_TRUE(plan.problem.empty()) << plan.problem;
    EXPECT_EQ(plan.total_bytes(), held.total_bytes());
    EXPECT_EQ(plan.num_pages, held.num_pages);
    ASSERT_EQ(plan.scratch.size(), held.scratch.size());
    for (size_t i = 0; i < plan.scratch.size(); ++i) {
      EXPECT_EQ(plan.scratch[i].purpose, held.scratch[i].purpose);
      EXPECT_EQ(plan.scratch[i].bytes, held.scratch[i].bytes) << held.scratch[i].purpose;
    }
  }
}

int64_t AllBytes(const std::vector<MemoryItem>& items) {
  int64_t bytes = 0;
  for (const MemoryItem& item : items) bytes += item.bytes;
  return bytes;
}

// Decodes a batch with a ModelRunner, which shows what it has allocated: prompts in chunks, steps,
// corrections, checks of drafts, at the largest sizes there are.
void Exercise(ModelRunner& runner, const Prompts& prompts, int64_t steps) {
  SequenceMaker maker(runner);
  std::vector<Sequence> sequences;
  Batch step = {.rows = {}, .plan = PlanId::kDecoder};
  sequences.reserve(prompts.size());
  SamplingParams params;
  params.repetition_penalty = 1.1;
  params.logit_bias = {{1, 0.5}};
  params.no_repeat_ngram_size = 40;
  for (const Ints& prompt : prompts) {
    const auto slot = static_cast<int32_t>(sequences.size());
    sequences.push_back(maker.Make(prompt, runner.config().max_seq_len, runner.ScratchSampling()));
    Sequence& sequence = sequences.back();
    SetSampling(params, runner.model().vocab_size, slot, sequence);
    step.rows.push_back({.sequence = &sequence, .num_logprobs = kMaxLogprobs});
    Drawn drawn;
    std::vector<float> logits;
    while (!sequence.prefilled()) {
      BatchRow row = NextChunk(runner, sequence, sequence.dense_len);
      row.num_draws = row.num_logits = row.num_tokens;
      logits.resize(static_cast<size_t>(row.num_logits * runner.model().vocab_size));
      row.logits = logits.data();
      drawn = runner.Run({.rows = {row}, .is_reading = true});
    }
    sequence.tokens.push_back(drawn.tokens[0].back());
  }
  for (int64_t i = 0; i < steps; ++i) {
    for (Sequence& sequence : sequences) {
      CorrectCache(runner, sequence, runner.config().correction_interval);
    }
    const Drawn drawn = runner.Run(step);
    for (size_t row = 0; row < sequences.size(); ++row) {
      sequences[row].tokens.push_back(drawn.tokens[row][0]);
    }
  }
  for (const Sequence& sequence : sequences) runner.ReadSelection(PlanId::kDecoder, sequence.id);
  if (!runner.verifies()) return;
  // As many tokens a row as a check takes.
  const int64_t drafts =
      runner.config().draft_tokens == 0 ? kMaxAutomaticDrafts : runner.config().draft_tokens;
  Batch check;
  for (Sequence& sequence : sequences) {
    for (int64_t i = 0; i < drafts; ++i) sequence.tokens.push_back(3);
    check.rows.push_back({&sequence, drafts + 1, drafts + 1, 0, kMaxLogprobs});
  }
  runner.Run(check);
}

TEST_P(MemoryPlanTest, IsHeldWhateverRuns) {
  for (const DecodeConfig& config : Configs()) {
    if (config.num_pages != 0) continue;  // has no room for sequences of max_seq_len
    ModelRunner runner(model_, config, weights_, nullptr);
    const int64_t before = AllBytes(runner.allocated());
    // A row's prompt is longer than a chunk; together with what follows it fills max_seq_len.
    const auto longest = static_cast<int32_t>(runner.config().max_seq_len);
    Ints lengths = {longest - 90, 1};
    for (int64_t row = 2; row < config.max_batch_size; ++row) lengths.push_back(100);
    Exercise(runner, MakePrompts(lengths), 40);
    Exercise(runner, MakePrompts({70}), 10);
    EXPECT_EQ(AllBytes(runner.allocated()), before);
  }
}

TEST_P(MemoryPlanTest, IsHeldWhileInputsOfPromptsAreRounded) {
  model_.hidden_size = 256;
  model_.intermediate_size = 512;
  const DecodeConfig config = Verifying();
  const ActivationsSource source(
      std::make_unique<RandomWeightSource>(model_, config.dtype, 0, WeightCodes::kFloat8), true);
  ModelRunner runner(model_, config, source, nullptr);
  if (!runner.quantizes_prompts()) GTEST_SKIP() << "this device's products read no codes";
  ExpectAllocatedAsPlanned(runner);
  const int64_t before = AllBytes(runner.allocated());
  const auto longest = static_cast<int32_t>(runner.config().max_seq_len);
  Exercise(runner, MakePrompts({longest - 90, 1, 100}), 40);
  EXPECT_EQ(AllBytes(runner.allocated()), before);
  const ActivationsSource plain(
      std::make_unique<RandomWeightSource>(model_, config.dtype, 0, WeightCodes::kFloat8), false);
  EXPECT_LT(AllBytes(PlanMemory(model_, config, plain).scratch),
            AllBytes(runner.memory_plan().scratch));
}

// The largest max_seq_len is one more page's cache and scratch away from not fitting.
TEST_P(MemoryPlanTest, AnAutomaticLengthIsTheLongestThatFits) {
  DecodeConfig config = Tidal();
  config.max_batch_size = 1;
  const MemoryPlan whole = PlanMemory(model_, config, RandomWeightSource(model_, config.dtype));
  config.max_seq_len = 0;
  model_.max_position_embeddings = int64_t{1} << 30;
  // So that some thousand tokens fit beside the rest.
  const int64_t all = whole.device.rfind("cpu", 0) == 0 ? whole.free_bytes : whole.device_bytes;
  const int64_t wanted = whole.total_bytes() + (int64_t{64} << 20);
  config.gpu_memory_utilization = static_cast<double>(wanted) / static_cast<double>(all);
  const MemoryPlan fitted = PlanMemory(model_, config, RandomWeightSource(model_, config.dtype));
  EXPECT_TRUE(fitted.problem.empty()) << fitted.problem;
  EXPECT_GT(fitted.max_seq_len, 512);
  EXPECT_LT(fitted.max_seq_len, model_.max_position_embeddings);
  EXPECT_EQ(fitted.max_seq_len % config.page_size, 0);
  EXPECT_LE(fitted.total_bytes(), fitted.usable_bytes);
  // Free memory of a machine in use moves; a tenth more must not fit all the same.
  config.max_seq_len = fitted.max_seq_len + fitted.max_seq_len / 10 + 64;
  EXPECT_FALSE(
      PlanMemory(model_, config, RandomWeightSource(model_, config.dtype)).problem.empty());
}

class MemoryProblem : public MemoryPlanTest {
 protected:
  // Refused without a look at the weights, of which there are none.
  void ExpectRefused(const DecodeConfig& config, std::initializer_list<std::string> parts) {
    class NoWeights final : public WeightSource {
     public:
      const WeightInfo* Find(const std::string& name) const override {
        throw WeightsError(name + ": was looked for");
      }
      void Read(const std::string&, int64_t, int64_t, void*) const override {}
    };
    const NoWeights none;
    EXPECT_TRUE(Throws<OutOfMemoryError>([&] { Decoder(model_, config, none); }, parts));
    const std::string problem =
        PlanMemory(model_, config, RandomWeightSource(model_, config.dtype)).problem;
    for (const std::string& part : parts) EXPECT_NE(problem.find(part), std::string::npos);
  }
};

TEST_P(MemoryProblem, ACacheThatIsTooLong) {
  DecodeConfig config = Tidal();
  config.max_seq_len = int64_t{1} << 30;
  ExpectRefused(config, {"need ", " GiB", "have ", "KV cache", "max_seq_len 1073741824",
                         is_cpu() ? "a share of 0.9" : "gpu_memory_utilization 0.9",
                         "lower max_seq_len to "});
}

TEST_P(MemoryProblem, ALengthThatIsTakenAsAdvisedFits) {
  DecodeConfig config = Tidal();
  config.max_seq_len = int64_t{1} << 30;
  const std::string problem =
      PlanMemory(model_, config, RandomWeightSource(model_, config.dtype)).problem;
  const std::string words = "lower max_seq_len to ";
  const size_t at = problem.find(words);
  ASSERT_NE(at, std::string::npos) << problem;
  // Less a tenth: free memory moves.
  config.max_seq_len = std::stoll(problem.substr(at + words.size())) / 10 * 9;
  EXPECT_GT(config.max_seq_len, 512);
  EXPECT_EQ(PlanMemory(model_, config, RandomWeightSource(model_, config.dtype)).problem, "");
}

TEST_P(MemoryProblem, TooManyPages) {
  DecodeConfig config = Dense();
  config.num_pages = int64_t{1} << 30;
  ExpectRefused(config, {"num_pages 1073741824", "lower num_pages to "});
}

TEST_P(MemoryProblem, TooManyRows) {
  DecodeConfig config = Tidal();
  config.max_seq_len = int64_t{1} << 17;
  config.max_batch_size = int64_t{1} << 20;
  ExpectRefused(config, {"scratch", "max_batch_size 1048576", "lower max_batch_size to "});
}

TEST_P(MemoryProblem, TooSmallAShare) {
  DecodeConfig config = Dense();
  config.gpu_memory_utilization = 1e-9;
  ExpectRefused(config, {"need ", "have 0.0 MiB", "raise gpu_memory_utilization to "});
}

TEST_P(MemoryProblem, AModelThatIsTooLarge) {
  model_.num_layers = 4000;
  model_.hidden_size = 1 << 17;
  ExpectRefused(Dense(), {"weights ", "use a smaller dtype, a smaller model or another device"});
}

// A device that records steps, on any machine.
class RecordingDevice final : public MemoryMeter {
 public:
  using MemoryMeter::MemoryMeter;
  BackendInfo info() const override {
    BackendInfo info = MemoryMeter::info();
    info.max_recorded_steps = 10;
    return info;
  }
  BackendMemory PlanReserve(const StepLimits& limits) const override {
    BackendMemory memory = MemoryMeter::PlanReserve(limits);
    memory.reserve_bytes = kCode + limits.num_recorded_steps * kStep;
    return memory;
  }

  static constexpr int64_t kCode = 1000, kStep = 1 << 20;
};

TEST(RecordedStepsTest, OfAnAddedPlanAreCountedWithItsSets) {
  const std::unique_ptr<Backend> cpu = MakeBackend(BackendOptions{});
  const RecordingDevice backend(*cpu);
  const ModelConfig model = TinyConfig();
  DecodeConfig config;
  config.device.type = DeviceType::kCuda;
  config.max_seq_len = 512;
  config.num_pages = 8;
  config.dtype = config.kv_dtype = DType::kFloat32;
  config.token_budget = 32;
  EXPECT_EQ(AddedPlanBytes(backend, model, config, DecodePlan::Dense(6)), 0);
  const DecodePlan tidal = DecodePlan::Tidal(6, 2, {2, 4});
  config.max_batch_size = 1;
  const int64_t one = AddedPlanBytes(backend, model, config, tidal);
  config.max_batch_size = 8;
  // Steps of 1, 2, 4 and 8 rows.
  const int64_t sets = one - RecordingDevice::kStep;
  EXPECT_EQ(AddedPlanBytes(backend, model, config, tidal), 8 * sets + 4 * RecordingDevice::kStep);
  EXPECT_GE(sets, 512 * 4 * model.num_q_heads);
}

TEST(RecordedStepsTest, AreTheFirstOfAnyNumberOfRows) {
  const std::unique_ptr<Backend> cpu = MakeBackend(BackendOptions{});
  const RecordingDevice backend(*cpu);
  DecodeConfig config;
  config.device.type = DeviceType::kCuda;
  for (int64_t max_batch_size : {int64_t{50}, int64_t{1} << 60}) {
    config.max_batch_size = max_batch_size;
    std::vector<int64_t> dense, sparse;
    for (const StepKey& key : RecordedSteps(backend, config, DecodePlan::Dense(3))) {
      EXPECT_EQ(key.plan, PlanId::kDense);
      dense.push_back(key.batch_size);
    }
    const std::vector<int64_t> every = {1, 2, 4, 8, 16, 24, 32, 40, 48};
    EXPECT_EQ(std::vector(dense.begin(), dense.begin() + 9), every);
    EXPECT_EQ(dense.back(), max_batch_size == 50 ? 50 : 56);
    EXPECT_EQ(dense.size(), 10u);
    for (const StepKey& key : RecordedSteps(backend, config, DecodePlan::Tidal(4, 2, {2}))) {
      if (key.plan == PlanId::kDecoder) sparse.push_back(key.batch_size);
    }
    EXPECT_EQ(sparse, (std::vector<int64_t>{1, 2, 4, 8, 16}));
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, MemoryPlanTest, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);
INSTANTIATE_TEST_SUITE_P(Backends, MemoryProblem,
                         ::testing::ValuesIn(std::vector<BackendCase>{
                             {DeviceType::kCpu, DType::kFloat32},
                             {DeviceType::kCuda, DType::kBFloat16}}),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
