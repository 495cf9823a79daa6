// Decoder: what the model computes, and what must never change it.
#include "tidal/decoder.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "reference_model.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

class DecoderResults : public DecoderTest {
 protected:
  // 200 prompt tokens, 40 decoded ones.
  static constexpr int64_t kPrefill = 200;
  const Ints text_ = MakePrompts({240})[0];

  std::vector<float> Logits(const DecodeConfig& config) const {
    return DecodeLogits(*Make(config), text_, kPrefill);
  }
};

TEST_P(DecoderResults, PrefillAndDecodeGiveTheSameLogits) {
  const auto decoder = Make(Dense());
  const auto decoded = DecodeLogits(*decoder, text_, 1);
  const auto prefilled = PrefillLogits(*decoder, text_, static_cast<int64_t>(text_.size()));
  ASSERT_EQ(decoded.size(), text_.size() * static_cast<size_t>(model_.vocab_size));
  EXPECT_LT(RelativeError(Widen(prefilled), Widen(decoded)),
            ToleranceFor(Op::kLogits, GetParam().dtype).rel);
}

// With a hidden size like this one a GPU's decode steps take the norm into the product behind it.
TEST_P(DecoderResults, WideModelsToo) {
  model_.hidden_size = 1024;
  weights_ = TinyModel(model_, 5);
  const auto decoded = DecodeLogits(*Make(Dense()), text_, kPrefill);
  auto prefilled = PrefillLogits(*Make(Dense()), text_, 240 - kPrefill + 1);
  EXPECT_LT(RelativeError(Widen(decoded), Widen(prefilled)),
            ToleranceFor(Op::kLogits, GetParam().dtype).rel);
  DecodeConfig eager = Dense();
  eager.cuda_graphs = false;
  EXPECT_TRUE(SameBits(Bits(DecodeLogits(*Make(eager), text_, kPrefill)), Bits(decoded), 4));
}

TEST_P(DecoderResults, PrefillLogitsOfTheLastPositionsAreTheTail) {
  const auto decoder = Make(Dense());
  const auto all = PrefillLogits(*decoder, text_, static_cast<int64_t>(text_.size()));
  const auto tail = PrefillLogits(*decoder, text_, 70);  // reaches back over a chunk
  const std::vector<float> want(all.end() - 70 * model_.vocab_size, all.end());
  EXPECT_LT(RelativeError(Widen(tail), Widen(want)),
            ToleranceFor(Op::kLogits, GetParam().dtype).rel);
}

TEST_P(DecoderResults, GreedyIsDeterministic) {
  const Prompts prompts = MakePrompts({5, 130, 64, 1});
  for (const DecodeConfig& config : {Dense(), Tidal()}) {
    const auto first = Make(config), second = Make(config);
    const auto want = Generate(*first, prompts, Greedy(40));
    const auto fresh = Generate(*second, prompts, Greedy(40));
    const auto again = Generate(*first, prompts, Greedy(40));  // over used pages
    for (size_t i = 0; i < prompts.size(); ++i) {
      EXPECT_EQ(want[i].token_ids.size(), 40u);
      EXPECT_EQ(fresh[i].token_ids, want[i].token_ids);
      EXPECT_EQ(again[i].token_ids, want[i].token_ids);
    }
  }
}

TEST_P(DecoderResults, BatchRowEqualsRowAlone) {
  if (!is_cpu()) GTEST_SKIP() << "on CUDA rows agree to rounding only (the op tests check that)";
  const Prompts prompts = MakePrompts({5, 130, 64, 1});
  for (const DecodeConfig& config : {Dense(), Tidal()}) {
    const auto decoder = Make(config);
    const auto together = Generate(*decoder, prompts, Greedy(40));
    for (size_t i = 0; i < prompts.size(); ++i) {
      EXPECT_EQ(Generate(*decoder, {prompts[i]}, Greedy(40))[0].token_ids, together[i].token_ids);
    }
  }
}

TEST_P(DecoderResults, PageSizeDoesNotChangeBits) {
  Ints page_sizes = {16, 8, 64, 256};
  if (is_cpu()) page_sizes.insert(page_sizes.end(), {1, 7, 512});
  for (DecodeConfig config : {Dense(), Tidal()}) {
    const auto want = Logits(config);
    for (int32_t page_size : page_sizes) {
      SCOPED_TRACE(page_size);
      config.page_size = page_size;
      EXPECT_TRUE(SameBits(Bits(Logits(config)), Bits(want), 4));
    }
  }
}

TEST_P(DecoderResults, PrefillChunkChangesRoundingOnly) {
  const auto want = Logits(Dense());
  const auto tokens = Generate(*Make(Dense()), {text_}, Greedy(30))[0].token_ids;
  for (int64_t chunk : {200, 65, 7, 1}) {
    SCOPED_TRACE(chunk);
    DecodeConfig config = Dense();
    config.prefill_chunk = chunk;
    EXPECT_LT(RelativeError(Widen(Logits(config)), Widen(want)),
              ToleranceFor(Op::kLogits, GetParam().dtype).rel);
    if (GetParam().dtype != DType::kFloat32) continue;  // a rounded cache may tip a close decision
    EXPECT_EQ(Generate(*Make(config), {text_}, Greedy(30))[0].token_ids, tokens);
  }
}

TEST_P(DecoderResults, BudgetThatCoversTheContextIsDenseBitwise) {
  const auto want = Logits(Dense());
  for (Granularity granularity : {Granularity::kKvHead, Granularity::kHead, Granularity::kLayer}) {
    DecodeConfig config = Tidal();
    config.granularity = granularity;
    config.token_budget = 240;
    EXPECT_TRUE(SameBits(Bits(Logits(config)), Bits(want), 4));
  }
}

TEST_P(DecoderResults, SparseMinContextIsDenseBitwiseUpToIt) {
  const auto want = Logits(Dense());
  DecodeConfig config = Tidal();
  config.sparse_min_context = 240;
  EXPECT_TRUE(SameBits(Bits(Logits(config)), Bits(want), 4));
  config.sparse_min_context = 220;
  auto got = Logits(config);
  // Row i is computed with 200 + i tokens in the cache.
  const size_t dense_rows = 21 * static_cast<size_t>(model_.vocab_size);
  EXPECT_NE(got, want);
  got.resize(dense_rows);
  EXPECT_TRUE(SameBits(Bits(got), Bits({want.begin(), want.begin() + dense_rows}), 4));
}

TEST_P(DecoderResults, SparseMinContextIsFilledIn) {
  DecodeConfig config = Tidal();
  config.sparse_min_context = kAutomatic;
  const auto decoder = Make(config);
  EXPECT_GE(decoder->config().sparse_min_context, config.token_budget);
  const bool always_dense = decoder->config().sparse_min_context >= config.max_seq_len;
  EXPECT_EQ(SameBits(Bits(Logits(config)), Bits(Logits(Dense())), 4), always_dense);
}

TEST_P(DecoderResults, TidalReallyAttendsToLess) {
  const auto dense = Logits(Dense()), tidal = Logits(Tidal());
  const auto vocab = static_cast<size_t>(model_.vocab_size);
  const std::vector<float> dense_first(dense.begin(), dense.begin() + vocab);
  EXPECT_EQ(std::vector<float>(tidal.begin(), tidal.begin() + vocab), dense_first)
      << "the first row comes from the dense prefill";
  EXPECT_GT(RelativeError(Widen(tidal), Widen(dense)), 1e-3);
}

TEST_P(DecoderResults, ThreadsDoNotChangeBits) {
  if (!is_cpu()) GTEST_SKIP() << "num_threads is the CPU's";
  for (DecodeConfig config : {Dense(), Tidal()}) {
    config.num_threads = 1;
    const auto want = DecodeLogits(*Make(config), text_, 235);
    for (int32_t num_threads : {2, 3}) {
      SCOPED_TRACE(num_threads);
      config.num_threads = num_threads;
      EXPECT_TRUE(SameBits(Bits(DecodeLogits(*Make(config), text_, 235)), Bits(want), 4));
    }
  }
}

TEST_P(DecoderResults, GraphsDoNotChangeBits) {
  for (DecodeConfig config : {Dense(), Tidal()}) {
    config.cuda_graphs = true;
    const auto with_graphs = Logits(config);
    config.cuda_graphs = false;
    EXPECT_TRUE(SameBits(Bits(Logits(config)), Bits(with_graphs), 4));
  }
}

TEST_P(DecoderResults, EqualTheFloat32Cpu) {
  if (is_cpu()) GTEST_SKIP() << "compares another device with the CPU";
  DecodeConfig cpu = Dense();
  cpu.device = {DeviceType::kCpu, 0};
  cpu.dtype = cpu.kv_dtype = DType::kFloat32;
  EXPECT_LT(RelativeError(Widen(Logits(Dense())), Widen(Logits(cpu))),
            ToleranceFor(Op::kLogits, GetParam().dtype).rel);
}

TEST_P(DecoderResults, WeightsOfAnyStoredDtypeAreConverted) {
  weights_.StoreAs(DType::kBFloat16);  // exact in float32 and bfloat16
  const auto want = Logits(Dense());
  for (const auto& name : {"model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"}) {
    weights_.tensor(name).info.dtype = DType::kFloat32;
  }
  EXPECT_TRUE(SameBits(Bits(Logits(Dense())), Bits(want), 4));
}

TEST_P(DecoderResults, TiedEmbeddingsAreTheLmHead) {
  weights_.tensor("lm_head.weight").values = weights_.tensor("model.embed_tokens.weight").values;
  const auto untied = Logits(Dense());
  model_.tie_word_embeddings = true;
  weights_.Erase("lm_head.weight");
  EXPECT_TRUE(SameBits(Bits(Logits(Dense())), Bits(untied), 4));
}

INSTANTIATE_TEST_SUITE_P(Backends, DecoderResults, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

// The whole decoder against the same model in double precision, for every kind of plan.
struct PlanShape {
  std::string name;
  std::vector<int64_t> select_layers;
  std::vector<int64_t> scored_layers = {};
  Granularity granularity = Granularity::kKvHead;
  Pooling pooling = Pooling::kSum;
  int64_t token_budget = 24;
  int64_t sink_tokens = 1;
  int64_t recent_tokens = 1;
};

// Sizes that pages, chunks and texts do not share.
DecodeConfig SmallPages() {
  DecodeConfig config;
  config.dtype = config.kv_dtype = DType::kFloat32;
  config.max_seq_len = 100;
  config.page_size = 7;
  config.prefill_chunk = 40;
  config.num_threads = 1;
  return config;
}

class DecoderAgainstReference : public ::testing::TestWithParam<PlanShape> {};

TEST_P(DecoderAgainstReference, LogitsMatch) {
  const PlanShape& plan = GetParam();
  DecodeConfig config = SmallPages();
  config.select_layers = plan.select_layers;
  config.scored_layers = plan.scored_layers;
  config.granularity = plan.granularity;
  config.pooling = plan.pooling;
  config.token_budget = plan.token_budget;
  config.sink_tokens = plan.sink_tokens;
  config.recent_tokens = plan.recent_tokens;
  for (const ModelConfig& model : {TinyConfig(), OddConfig()}) {
    SCOPED_TRACE(model.hidden_size);
    const TinyModel weights(model, 9);
    const Ints text = Random(3).Below(100, static_cast<int32_t>(model.vocab_size));
    Decoder decoder(model, config, weights);
    const Values got = Widen(DecodeLogits(decoder, text, 75));
    const Values want = ReferenceModel(model, weights, config).DecodeLogits(text, 75);
    EXPECT_TRUE(Close(got, want, ToleranceFor(Op::kLogits, DType::kFloat32)));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Plans, DecoderAgainstReference,
    ::testing::Values(
        PlanShape{"dense", {}}, PlanShape{"kv_head_sum", {2, 4}},
        PlanShape{"kv_head_max", {2}, {}, Granularity::kKvHead, Pooling::kMax},
        PlanShape{"head", {2, 4}, {}, Granularity::kHead},
        PlanShape{"layer_sum", {3}, {}, Granularity::kLayer},
        PlanShape{"layer_max", {2, 3}, {}, Granularity::kLayer, Pooling::kMax},
        PlanShape{"sinks_and_recents", {2, 4}, {}, Granularity::kKvHead, Pooling::kSum, 24, 4, 16},
        PlanShape{"newest_only", {2, 4}, {}, Granularity::kKvHead, Pooling::kSum, 1, 0, 1},
        PlanShape{"scored", {}, {2, 4}},
        PlanShape{"all_scored", {}, {2, 3, 4, 5}, Granularity::kLayer},
        PlanShape{"scored_head", {}, {2, 3}, Granularity::kHead},
        PlanShape{"scored_layer_max", {}, {3}, Granularity::kLayer, Pooling::kMax},
        PlanShape{"select_and_scored", {2}, {4}, Granularity::kLayer},
        PlanShape{"scored_and_select", {3}, {2, 5}, Granularity::kKvHead, Pooling::kSum, 24, 4, 8}),
    [](const auto& plan) { return plan.param.name; });

}  // namespace
}  // namespace tidal::test
