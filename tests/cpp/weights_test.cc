// Loading weights: tensors larger than a piece, read and converted by several threads, arrive
// whole.
#include "model/weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "backend_test.h"
#include "core/float8.h"
#include "tidal/quantized_weights.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

class LoadedWeights : public BackendTest {};

TEST_P(LoadedWeights, OfAnyDtypeAndSizeArriveWhole) {
  ModelConfig model = TinyConfig();
  model.num_layers = 1;
  model.vocab_size = 40'961;  // x 256: two pieces and a bit in float32, one and a bit in 16 bits
  model.hidden_size = 256;
  Open(GetParam(), SmallLimits(GetParam().dtype));
  const int64_t count = model.vocab_size * model.hidden_size;
  const std::string name = "model.embed_tokens.weight";
  for (DType stored : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    SCOPED_TRACE(DTypeName(stored));
    const RandomWeightSource source(model, stored);
    int64_t last_done = 0, last_total = 0;
    const ModelWeights weights =
        LoadWeights(backend(), model, GetParam().dtype, source, [&](int64_t done, int64_t total) {
          EXPECT_GT(done, last_done);
          last_done = done;
          last_total = total;
        });
    EXPECT_EQ(last_done, last_total);
    EXPECT_EQ(last_total, MeasureWeights(backend(), model, GetParam().dtype, source).bytes);
    Bytes raw(count * DTypeBytes(stored));
    source.Read(name, 0, static_cast<int64_t>(raw.size()), raw.data());
    const Bytes want = Encode(Decode(raw, stored), GetParam().dtype);
    EXPECT_TRUE(GetBytes(weights.embedding) == want);
    // Stacked behind q and k, so not at a tensor's begin.
    const int64_t rows = model.kv_size(), first = model.q_size() + model.kv_size();
    raw.resize(rows * model.hidden_size * DTypeBytes(stored));
    source.Read("model.layers.0.self_attn.v_proj.weight", 0, static_cast<int64_t>(raw.size()),
                raw.data());
    EXPECT_TRUE(GetBytes(weights.layers[0].qkv.data.Rows(first, rows)) ==
                Encode(Decode(raw, stored), GetParam().dtype));
  }
}

// Experts work as they are stored, prompts too: what is decoded for those is another matrix.
TEST_P(LoadedWeights, OfExpertsAreNotDecodedForPrompts) {
  ModelConfig model = TinyConfig();
  model.num_experts = 64;
  model.experts_per_token = 2;
  model.expert_intermediate_size = 64;
  model.layers.resize(static_cast<size_t>(model.num_layers), {.has_experts = true});
  Open(GetParam(), SmallLimits(GetParam().dtype));
  const DType dtype = GetParam().dtype;
  const RandomWeightSource source(model, dtype, 0, WeightCodes::kFloat8);
  const int64_t largest = std::max(model.q_size() + 2 * model.kv_size(), model.hidden_size);
  const WeightMemory memory = MeasureWeights(backend(), model, dtype, source);
  EXPECT_LE(memory.decoded_bytes, largest * model.hidden_size * DTypeBytes(dtype));
}

// The embedding table stays as it is beside the codes that are made of it, and the layers' codes
// stay their own.
TEST_P(LoadedWeights, OfATiedOutputMatrixMayBeInCodes) {
  ModelConfig model = TinyConfig();
  model.tie_word_embeddings = true;
  Open(GetParam(), SmallLimits(GetParam().dtype));
  const DType dtype = GetParam().dtype;
  auto layers = std::make_unique<RandomWeightSource>(model, dtype, 0, WeightCodes::kInt4);
  const int64_t without = MeasureWeights(backend(), model, dtype, *layers).bytes;
  const QuantizingWeightSource source(std::move(layers), WeightCodes::kFloat8, CodedPart::kLmHead);
  const ModelWeights weights = LoadWeights(backend(), model, dtype, source, {});
  const WeightMemory memory = MeasureWeights(backend(), model, dtype, source);
  EXPECT_EQ(weights.bytes, memory.bytes);
  const Weight& head = weights.lm_head;
  EXPECT_NE(head.data.ptr, weights.embedding.ptr);
  if (!backend().ReadsCodes(head)) GTEST_SKIP() << "this device's products read no codes";
  EXPECT_EQ(weights.layers[0].down.codes, WeightCodes::kInt4);
  ASSERT_EQ(head.codes, WeightCodes::kFloat8);
  EXPECT_EQ(memory.bytes - without, model.vocab_size * (model.hidden_size + 4));
  const Values scales = Get(head.scales), embedding = Get(weights.embedding);
  const Bytes codes = GetBytes(head.data);
  for (int64_t i = 0; i < model.vocab_size * model.hidden_size; ++i) {
    const double scale = scales[i / model.hidden_size];
    const double step = std::max(std::abs(embedding[i]) / 8, scale / 512);
    const uint8_t code = codes[static_cast<size_t>(i)];
    ASSERT_LE(std::abs(Float8ToFloat(code) * scale - embedding[i]), 0.51 * step) << i;
  }
}

// Rows of q and k go where dim i turns with dim i + head_dim / 2; those of v stay.
TEST_P(LoadedWeights, OfHeadsThatTurnInPartAreInTheEnginesOrder) {
  ModelConfig model = TinyConfig();
  model.num_layers = 1;
  model.qkv_bias = true;
  model.rope.rotary_dim = 8;
  ASSERT_GT(model.head_dim, 8);
  Open(GetParam(), SmallLimits(GetParam().dtype));
  const DType dtype = GetParam().dtype;
  const RandomWeightSource source(model, dtype);
  const ModelWeights weights = LoadWeights(backend(), model, dtype, source, {});
  const int64_t dim = model.head_dim, still = (dim - 8) / 2, width = model.hidden_size;
  const Values loaded = Get(weights.layers[0].qkv.data), biases = Get(weights.layers[0].qkv_bias);
  int64_t first = 0;  // of the stack
  for (const auto& [name, heads] :
       {std::pair("q", model.num_q_heads), std::pair("k", model.num_kv_heads),
        std::pair("v", model.num_kv_heads)}) {
    SCOPED_TRACE(name);
    const std::string prefix = "model.layers.0.self_attn." + std::string(name) + "_proj.";
    Bytes raw(heads * dim * width * DTypeBytes(dtype)), raw_bias(heads * dim * DTypeBytes(dtype));
    source.Read(prefix + "weight", 0, static_cast<int64_t>(raw.size()), raw.data());
    source.Read(prefix + "bias", 0, static_cast<int64_t>(raw_bias.size()), raw_bias.data());
    const Values stored = Decode(raw, dtype), stored_bias = Decode(raw_bias, dtype);
    for (int64_t row = 0; row < heads * dim; ++row) {
      const int64_t i = row % dim, pair = i % (dim / 2), is_second = i / (dim / 2);
      int64_t from = pair < 4 ? is_second * 4 + pair : 8 + is_second * still + pair - 4;
      if (*name == 'v') from = i;
      from += row - i;
      ASSERT_EQ(biases[first + row], stored_bias[from]) << row;
      for (int64_t k = 0; k < width; ++k) {
        ASSERT_EQ(loaded[(first + row) * width + k], stored[from * width + k]) << row;
      }
    }
    first += heads * dim;
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, LoadedWeights, ::testing::ValuesIn(AllBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
