// Decoder::MeasureSteps, and models of random weights, which it is mostly used with.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "throws.h"
#include "tidal/decoder.h"
#include "tidal/error.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

class Measurements : public DecoderTest {};

TEST_P(Measurements, GiveOneTimePerStepAndAllPagesBack) {
  const auto decoder = Make(Tidal());
  const int64_t all = decoder->num_free_pages();
  for (PlanId plan : {PlanId::kDecoder, PlanId::kDense}) {
    for (const std::vector<int64_t>& seq_lens :
         std::vector<std::vector<int64_t>>{{1}, {512}, {40, 512, 1, 33}}) {
      const std::vector<double> seconds =
          decoder->MeasureSteps({.seq_lens = seq_lens, .steps = 7, .warmup = 3, .plan = plan});
      EXPECT_EQ(seconds.size(), 7u);
      for (double value : seconds) EXPECT_TRUE(value > 0.0 && value < 60.0) << value;
      EXPECT_EQ(decoder->num_free_pages(), all);
    }
  }
  EXPECT_EQ(decoder->MeasureSteps({.seq_lens = {9}, .steps = 1, .warmup = 0}).size(), 1u);
}

TEST_P(Measurements, LeaveTheDecoderAsItWas) {
  const Prompts prompts = MakePrompts({100, 7, 150});
  const auto want = Generate(*Make(Tidal()), prompts, Greedy(30));
  const auto decoder = Make(Tidal());
  const StepBenchmark benchmark = {.seq_lens = {300}, .steps = 2, .warmup = 0};
  decoder->MeasureSteps({.seq_lens = {512, 512, 512, 512}, .steps = 2, .warmup = 0});
  for (size_t i = 0; i < prompts.size(); ++i) {
    EXPECT_EQ(Generate(*decoder, {prompts[i]}, Greedy(30))[0].token_ids,
              Generate(*Make(Tidal()), {prompts[i]}, Greedy(30))[0].token_ids);
  }
  // Between the steps of a running call, in the pages that it leaves.
  const auto generation = decoder->Start(prompts, std::vector(3, Greedy(30)));
  for (int i = 0; !generation->done(); ++i) {
    generation->Advance();
    if (i % 5 == 3) decoder->MeasureSteps(benchmark);
  }
  for (size_t i = 0; i < prompts.size(); ++i) {
    EXPECT_EQ(generation->results()[i].token_ids, want[i].token_ids);
  }
}

TEST_P(Measurements, TheDecodersPlanIsSparseAndTheDensePlanIsNot) {
  const auto decoder = Make(Tidal());
  const Prompts prompts = MakePrompts({100});
  Generate(*decoder, prompts, Greedy(30));
  const auto chosen = decoder->Selection(0);
  ASSERT_EQ(chosen.size(), 2u);
  // What a call chose last stays, whoever steps after it.
  for (const PlanId plan : {PlanId::kDense, PlanId::kDecoder}) {
    decoder->MeasureSteps({.seq_lens = {300}, .steps = 1, .warmup = 0, .plan = plan});
    EXPECT_EQ(decoder->Selection(0)[1].token_idx, chosen[1].token_idx);
  }
}

TEST_P(Measurements, RefuseWhatDoesNotFit) {
  DecodeConfig config = Dense();
  config.num_pages = 10;
  const auto decoder = Make(config);
  auto refused = [&](const StepBenchmark& benchmark, auto error,
                     std::initializer_list<std::string> parts) {
    EXPECT_TRUE(Throws<decltype(error)>([&] { decoder->MeasureSteps(benchmark); }, parts));
    EXPECT_EQ(decoder->num_free_pages(), 10);
  };
  const InvalidArgument bad("");
  const CapacityError full("");
  refused({.seq_lens = {}}, bad, {"seq_lens"});
  refused({.seq_lens = {5, 0}}, bad, {"seq_lens", "got 0"});
  refused({.seq_lens = {5}, .steps = 0}, bad, {"steps", "got 0"});
  refused({.seq_lens = {5}, .steps = 1, .warmup = -1}, bad, {"warmup", "got -1"});
  refused({.seq_lens = {513}}, full, {"513", "max_seq_len 512"});
  refused({.seq_lens = {1, 1, 1, 1, 1}}, full, {"need 5", "max_batch_size 4"});
  refused({.seq_lens = {100, 100}}, full, {"need 7 pages", "have 3"});
}

TEST_P(Measurements, ANanIsAnError) {
  Values& head = weights_.tensor("lm_head.weight").values;
  std::fill(head.begin(), head.end(), std::nan(""));
  const auto decoder = Make(Tidal());
  EXPECT_TRUE(Throws<WeightsError>([&] { decoder->MeasureSteps({.seq_lens = {90}}); },
                                   {"90 tokens", "NaN"}));
  EXPECT_EQ(decoder->num_free_pages(), 4 * 32);
}

// The depth, width ratio and head sizes of a real model, a sixteenth as wide.
ModelConfig DeepConfig() {
  ModelConfig config;
  config.vocab_size = 1000;
  config.hidden_size = 256;
  config.intermediate_size = 896;
  config.num_layers = 32;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 64;
  config.max_position_embeddings = 1024;
  return config;
}

TEST_P(Measurements, RandomWeightsStayFiniteThroughManyLayers) {
  const ModelConfig model = DeepConfig();
  DecodeConfig config = Tidal();
  config.select_layers = {2, 13};
  Decoder decoder(model, config, RandomWeightSource(model, config.dtype));
  const Ints text = Random(1).Below(200, 1000);
  const std::vector<float> logits = DecodeLogits(decoder, text, 190);
  double squares = 0.0;
  for (float logit : logits) squares += static_cast<double>(logit) * logit;
  const double size = std::sqrt(squares / static_cast<double>(logits.size()));
  EXPECT_TRUE(size > 0.05 && size < 20.0) << size;  // NaN fails too
  EXPECT_EQ(decoder.MeasureSteps({.seq_lens = {512, 512}, .steps = 2}).size(), 2u);
}

INSTANTIATE_TEST_SUITE_P(Backends, Measurements, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
