// What a Decoder refuses, before any work, and what it says.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "throws.h"
#include "tidal/decoder.h"
#include "tidal/error.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

class DecoderErrors : public DecoderTest {
 protected:
  void SetUp() override {
    DecoderTest::SetUp();
    if (!IsSkipped()) decoder_ = Make(Dense());
  }

  // Start() must fail as told and leave the decoder as it was.
  template <typename Error>
  void ExpectRefused(const Prompts& prompts, const std::vector<SamplingParams>& params,
                     std::initializer_list<std::string> parts) {
    const int64_t free_pages = decoder_->num_free_pages();
    EXPECT_TRUE(Throws<Error>([&] { decoder_->Start(prompts, params); }, parts));
    EXPECT_EQ(decoder_->num_free_pages(), free_pages);
    EXPECT_EQ(Generate(*decoder_, MakePrompts({5}), Greedy(2))[0].token_ids.size(), 2u);
  }

  std::unique_ptr<Decoder> decoder_;
};

TEST_P(DecoderErrors, ASequenceLongerThanMaxSeqLen) {
  ExpectRefused<CapacityError>(MakePrompts({20, 500}), std::vector(2, Greedy(13)),
                               {"prompt 1", "513", "512", "max_seq_len"});
  ExpectRefused<CapacityError>(MakePrompts({600}), {Greedy(1)}, {"601", "512", "max_seq_len"});
  ExpectRefused<CapacityError>(MakePrompts({6}), {Greedy(std::numeric_limits<int64_t>::max())},
                               {"512", "max_seq_len"});
}

TEST_P(DecoderErrors, MoreTokensThanPages) {
  DecodeConfig config = Dense();
  config.num_pages = 10;
  decoder_ = Make(config);
  EXPECT_EQ(decoder_->num_free_pages(), 10);
  ExpectRefused<CapacityError>(MakePrompts({60, 141}), std::vector(2, Greedy(20)),
                               {"prompt 1", "11 pages", "have 10", "num_pages"});
}

// Nobody will give the pages back.
TEST_P(DecoderErrors, PagesThatSessionsHold) {
  DecodeConfig config = Dense();
  config.num_pages = 10;
  decoder_ = Make(config);
  const auto session = decoder_->StartSession();
  Finish(*session->Append(MakePrompts({80})[0]));
  const auto running = decoder_->Start(MakePrompts({60, 90}), {Greedy(10), Greedy(1)});
  EXPECT_TRUE(Throws<CapacityError>([&] { Finish(*running); }, {"90 tokens", "close sessions"}));
  EXPECT_EQ(Finish(*running)[1].finish_reason, FinishReason::kError);
  EXPECT_EQ(running->results()[0].token_ids.size(), 10u);
  EXPECT_EQ(decoder_->num_free_pages(), 5);
}

TEST_P(DecoderErrors, PromptsThatAreNone) {
  ExpectRefused<InvalidArgument>({}, {}, {"prompts", "expected"});
  ExpectRefused<InvalidArgument>({{1}, {}}, std::vector(2, Greedy(1)), {"prompt 1", "expected"});
  ExpectRefused<InvalidArgument>({{1, -1}}, {Greedy(1)}, {"prompt 0", "-1", "319"});
  ExpectRefused<InvalidArgument>({{1}, {5, 320}}, std::vector(2, Greedy(1)),
                                 {"prompt 1", "320", "319"});
  ExpectRefused<InvalidArgument>({{1}, {2}}, {Greedy(1)}, {"params", "got 1"});
}

TEST_P(DecoderErrors, SamplingParametersOutOfRange) {
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  auto refuse = [&](const std::string& field, auto member, auto value) {
    SCOPED_TRACE(::testing::Message() << field << " = " << ::testing::PrintToString(value));
    SamplingParams params = Greedy(1);
    params.*member = value;
    ExpectRefused<InvalidArgument>({{1}}, {params}, {field, "expected"});
  };
  for (int64_t value : {0, -5}) refuse("max_new_tokens", &SamplingParams::max_new_tokens, value);
  for (double value : {-0.1, nan, inf}) {
    refuse("temperature", &SamplingParams::temperature, value);
  }
  refuse("top_k", &SamplingParams::top_k, int64_t{-1});
  for (double value : {0.0, -0.5, 1.1, nan}) refuse("top_p", &SamplingParams::top_p, value);
  for (double value : {-0.1, 1.1, nan}) refuse("min_p", &SamplingParams::min_p, value);
  for (double value : {0.0, -1.0, 5e-324, 9e-7, 1.1e6, nan, inf}) {
    refuse("repetition_penalty", &SamplingParams::repetition_penalty, value);
  }
  for (double value : {-2.1, 2.1, nan, inf}) {
    refuse("frequency_penalty", &SamplingParams::frequency_penalty, value);
    refuse("presence_penalty", &SamplingParams::presence_penalty, value);
  }
  refuse("min_new_tokens", &SamplingParams::min_new_tokens, int64_t{-1});
  refuse("no_repeat_ngram_size", &SamplingParams::no_repeat_ngram_size, int64_t{-1});
  for (int32_t token : {-1, 320}) {
    refuse("logit_bias", &SamplingParams::logit_bias, std::map<int32_t, double>{{token, 1.0}});
    refuse("suppress_tokens", &SamplingParams::suppress_tokens, Ints{3, token});
    refuse("allowed_token_ids", &SamplingParams::allowed_token_ids, Ints{3, token});
    refuse("bad_words", &SamplingParams::bad_words, Prompts{{3}, {3, token}});
  }
  refuse("bad_words", &SamplingParams::bad_words, Prompts{{}});
  for (double value : {-100.1, 101.0, nan, inf}) {
    refuse("logit_bias", &SamplingParams::logit_bias, std::map<int32_t, double>{{5, value}});
  }
  std::map<int32_t, double> many;
  for (int32_t token = 0; token <= kMaxLogitBiases; ++token) many[token] = 1.0;
  refuse("logit_bias", &SamplingParams::logit_bias, many);
}

TEST_P(DecoderErrors, LogitsOfPositionsThatAreNot) {
  const Ints text = MakePrompts({20})[0];
  for (int64_t bad : {0, -1, 21}) {
    EXPECT_TRUE(Throws<InvalidArgument>([&] { PrefillLogits(*decoder_, text, bad); },
                                        {"num_logits", std::to_string(bad)}));
    EXPECT_TRUE(Throws<InvalidArgument>([&] { DecodeLogits(*decoder_, text, bad); },
                                        {"num_prefill", std::to_string(bad)}));
  }
  const Ints long_text = MakePrompts({513})[0];
  EXPECT_TRUE(Throws<CapacityError>([&] { PrefillLogits(*decoder_, long_text, 1); },
                                    {"513", "512", "max_seq_len"}));
  EXPECT_TRUE(Throws<CapacityError>([&] { DecodeLogits(*decoder_, long_text, 1); },
                                    {"513", "512", "max_seq_len"}));
}

TEST_P(DecoderErrors, SettingsOutOfRange) {
  auto refuse = [&](const std::string& field, auto member, auto value) {
    SCOPED_TRACE(field);
    DecodeConfig config = Tidal();
    config.*member = value;
    EXPECT_TRUE(Throws<InvalidArgument>([&] { Make(config); }, {field, "got", "expected"}));
  };
  refuse("token_budget", &DecodeConfig::token_budget, int64_t{0});
  refuse("sink_tokens", &DecodeConfig::sink_tokens, int64_t{-1});
  refuse("recent_tokens", &DecodeConfig::recent_tokens, int64_t{0});
  refuse("token_budget", &DecodeConfig::sink_tokens, int64_t{32});  // 32 + 1 recent > 32
  refuse("sparse_min_context", &DecodeConfig::sparse_min_context, int64_t{-2});
  refuse("correction_interval", &DecodeConfig::correction_interval, int64_t{-1});
  refuse("draft_tokens", &DecodeConfig::draft_tokens, int64_t{-1});
  refuse("draft_tokens", &DecodeConfig::draft_tokens, int64_t{65});
  refuse("max_seq_len", &DecodeConfig::max_seq_len, int64_t{-1});
  refuse("max_batch_size", &DecodeConfig::max_batch_size, int64_t{0});
  refuse("page_size", &DecodeConfig::page_size, int64_t{0});
  refuse("num_pages", &DecodeConfig::num_pages, int64_t{-1});
  refuse("max_seq_len", &DecodeConfig::max_seq_len, int64_t{1} << 31);
  refuse("num_pages", &DecodeConfig::num_pages, int64_t{1} << 31);
  for (double share : {0.0, -0.5, 1.1, std::nan("")}) {
    refuse("gpu_memory_utilization", &DecodeConfig::gpu_memory_utilization, share);
  }
  refuse("prefill_chunk", &DecodeConfig::prefill_chunk, int64_t{-1});
  refuse("num_threads", &DecodeConfig::num_threads, int32_t{-1});
  refuse("full_layers", &DecodeConfig::full_layers, int64_t{0});
  refuse("select_layers", &DecodeConfig::select_layers, std::vector<int64_t>{6});
  refuse("select_layers", &DecodeConfig::select_layers, std::vector<int64_t>{1});
  refuse("shadow", &DecodeConfig::shadow, Shadow::kInt4);
  refuse("scored_layers", &DecodeConfig::scored_layers, std::vector<int64_t>{6});
  refuse("scored_layers", &DecodeConfig::scored_layers, std::vector<int64_t>{2});
}

TEST_P(DecoderErrors, CorrectionOfWhatIsVerified) {
  DecodeConfig config = Tidal();
  config.verify = true;
  config.correction_interval = 8;
  EXPECT_TRUE(Throws<InvalidArgument>([&] { Make(config); },
                                      {"correction_interval", "got 8", "verify", "expected 0"}));
}

TEST_P(DecoderErrors, ImpossibleModels) {
  const ModelConfig good = model_;
  auto refuse = [&](const std::string& field, auto member, auto value) {
    SCOPED_TRACE(field);
    model_ = good;
    model_.*member = value;
    EXPECT_TRUE(Throws<ConfigError>([&] { Make(Dense()); }, {field, "got", "expected"}));
  };
  refuse("vocab_size", &ModelConfig::vocab_size, int64_t{0});
  refuse("hidden_size", &ModelConfig::hidden_size, int64_t{-1});
  refuse("intermediate_size", &ModelConfig::intermediate_size, int64_t{0});
  refuse("num_layers", &ModelConfig::num_layers, int64_t{0});
  refuse("num_kv_heads", &ModelConfig::num_kv_heads, int64_t{3});
  refuse("num_q_heads", &ModelConfig::num_q_heads, int64_t{0});
  refuse("head_dim", &ModelConfig::head_dim, int64_t{63});
  refuse("rms_norm_eps", &ModelConfig::rms_norm_eps, 0.0);
  refuse("max_position_embeddings", &ModelConfig::max_position_embeddings, int64_t{0});
}

TEST_P(DecoderErrors, WeightsThatDoNotFit) {
  const std::string name = "model.layers.3.self_attn.k_proj.weight";
  TinyModel::Tensor& k_proj = weights_.tensor(name);
  k_proj.info.shape = {64, 128};
  EXPECT_TRUE(Throws<WeightsError>([&] { Make(Dense()); },
                                   {name, "[64, 128]", "[128, 128]", "num_kv_heads 2"}));
  k_proj.info.shape = {128, 128};
  k_proj.info.dtype = DType::kInt32;
  EXPECT_TRUE(Throws<WeightsError>([&] { Make(Dense()); }, {name, "int32", "expected"}));
  weights_.Erase(name);
  EXPECT_TRUE(Throws<WeightsError>([&] { Make(Dense()); }, {name, "missing"}));
}

TEST_P(DecoderErrors, OtherCacheDtypeOnCuda) {
  if (is_cpu()) GTEST_SKIP() << "the CPU takes any pair of dtypes";
  DecodeConfig config = Dense();
  config.kv_dtype = GetParam().dtype == DType::kBFloat16 ? DType::kFloat16 : DType::kBFloat16;
  EXPECT_TRUE(Throws<UnsupportedError>([&] { Make(config); }, {"float16", "or fp8"}));
}

TEST_P(DecoderErrors, ShapesCudaDoesNotRun) {
  if (is_cpu()) GTEST_SKIP() << "the CPU runs any shape";
  DecodeConfig config = Dense();
  config.page_size = 7;
  EXPECT_TRUE(Throws<UnsupportedError>([&] { Make(config); }, {"page_size", "7"}));
  model_ = OddConfig();
  weights_ = TinyModel(model_, 1);
  EXPECT_TRUE(
      Throws<UnsupportedError>([&] { Make(Dense()); }, {"head_dim 20", "64, 80, 96, 128 or 256"}));
  model_ = TinyConfig();
  model_.head_dim = 256;
  weights_ = TinyModel(model_, 1);
  config = Dense();
  config.dtype = config.kv_dtype = DType::kFloat16;
  EXPECT_TRUE(Throws<UnsupportedError>([&] { Make(config); },
                                       {"head_dim 256 in float16", "dtype=\"bfloat16\""}));
}

INSTANTIATE_TEST_SUITE_P(Backends, DecoderErrors,
                         ::testing::ValuesIn(std::vector<BackendCase>{
                             {DeviceType::kCpu, DType::kFloat32},
                             {DeviceType::kCuda, DType::kBFloat16}}),
                         CaseNameOf<BackendCase>);

class DecoderState : public DecoderTest {};

TEST_P(DecoderState, ShowsItsPlanAndSettings) {
  const auto decoder = Make(Tidal());
  EXPECT_EQ(decoder->plan().ToString(), "FFSsSs");
  EXPECT_EQ(Make(Dense())->plan().ToString(), "FFFFFF");
  EXPECT_EQ(decoder->model().hidden_size, 128);
  EXPECT_EQ(decoder->config().num_pages, 4 * 512 / 16);
  EXPECT_EQ(decoder->num_free_pages(), decoder->config().num_pages);
}

TEST_P(DecoderState, FillsInAutomaticSettings) {
  DecodeConfig config = Tidal();
  config.max_seq_len = config.prefill_chunk = 0;
  config.token_budget = 100000;
  const auto decoder = Make(config);
  EXPECT_EQ(decoder->config().max_seq_len, model_.max_position_embeddings);
  EXPECT_GT(decoder->config().prefill_chunk, 0);
  EXPECT_LE(decoder->config().token_budget, model_.max_position_embeddings);
  EXPECT_EQ(Generate(*decoder, MakePrompts({300}), Greedy(4))[0].token_ids.size(), 4u);
}

TEST_P(DecoderState, CountsItsMemory) {
  const auto decoder = Make(Tidal());
  const MemoryPlan& plan = decoder->memory_plan();
  const int64_t element = DTypeBytes(GetParam().dtype);
  EXPECT_EQ(plan.weight_bytes, weights_.num_elements() * element);
  // K and V of 4 x 512 tokens in 6 layers.
  EXPECT_EQ(plan.kv_bytes, 2 * 4 * 512 * 6 * model_.kv_size() * element);
  EXPECT_GT(plan.scratch_bytes(), 0);
}

TEST_P(DecoderState, LoadingReportsItsProgress) {
  std::vector<int64_t> done;
  int64_t total = 0;
  const Decoder decoder(model_, Dense(), weights_, [&](int64_t bytes_done, int64_t bytes_total) {
    done.push_back(bytes_done);
    total = bytes_total;
  });
  ASSERT_FALSE(done.empty());
  EXPECT_TRUE(std::is_sorted(done.begin(), done.end()));
  EXPECT_EQ(done.back(), total);
  EXPECT_EQ(total, decoder.memory_plan().weight_bytes);
}

INSTANTIATE_TEST_SUITE_P(Backends, DecoderState, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
