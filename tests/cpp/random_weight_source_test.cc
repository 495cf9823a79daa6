// RandomWeightSource: every tensor of a config, without a file.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "model/weights.h"
#include "throws.h"
#include "tidal/error.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

Values ReadAll(const RandomWeightSource& source, const std::string& name) {
  const WeightInfo* info = source.Find(name);
  int64_t bytes = DTypeBytes(info->dtype);
  for (int64_t size : info->shape) bytes *= size;
  Bytes data(static_cast<size_t>(bytes));
  source.Read(name, 0, bytes, data.data());
  return Decode(data, info->dtype);
}

TEST(RandomWeights, KnowsEveryTensorOfAConfig) {
  for (ModelConfig model : {TinyConfig(), OddConfig()}) {
    for (bool tied : {false, true}) {
      model.tie_word_embeddings = tied;
      const RandomWeightSource source(model, DType::kFloat16);
      const TinyModel checkpoint(model, 1);
      const std::vector<WeightShape> expected = ExpectedWeights(model);
      int64_t elements = 0;
      for (const WeightShape& weight : expected) {
        SCOPED_TRACE(weight.name);
        const WeightInfo* info = source.Find(weight.name);
        ASSERT_NE(info, nullptr);
        EXPECT_EQ(info->dtype, DType::kFloat16);
        EXPECT_EQ(info->shape, checkpoint.tensor(weight.name).info.shape);
        int64_t count = 1;
        for (int64_t size : info->shape) count *= size;
        elements += count;
      }
      EXPECT_EQ(elements, checkpoint.num_elements());
      EXPECT_EQ(source.Find("lm_head.weight") == nullptr, tied);
    }
  }
}

TEST(RandomWeights, MatricesAreSmallAndNormsAboutOne) {
  const RandomWeightSource source(OddConfig(), DType::kFloat32);
  double largest_difference = 0.0;
  for (double value : ReadAll(source, "model.layers.3.self_attn.q_norm.weight")) {
    largest_difference = std::max(largest_difference, std::abs(value - 1.0));
  }
  EXPECT_GT(largest_difference, 0.0);
  EXPECT_LT(largest_difference, 0.2);
  for (const char* name :
       {"model.layers.3.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.bias"}) {
    double squares = 0.0;
    const Values values = ReadAll(source, name);
    for (double value : values) squares += value * value;
    EXPECT_NEAR(std::sqrt(squares / static_cast<double>(values.size())), 0.02, 0.004) << name;
  }
}

TEST(RandomWeights, TensorsDifferAndTheSeedRepeatsThem) {
  const RandomWeightSource first(TinyConfig(), DType::kBFloat16, 7);
  const RandomWeightSource again(TinyConfig(), DType::kBFloat16, 7);
  const RandomWeightSource other(TinyConfig(), DType::kBFloat16, 8);
  const std::string gate = "model.layers.1.mlp.gate_proj.weight";
  EXPECT_EQ(ReadAll(first, gate), ReadAll(again, gate));
  EXPECT_NE(ReadAll(first, gate), ReadAll(other, gate));
  EXPECT_NE(ReadAll(first, gate), ReadAll(first, "model.layers.1.mlp.up_proj.weight"));
  EXPECT_NE(ReadAll(first, gate), ReadAll(first, "model.layers.2.mlp.gate_proj.weight"));
}

TEST(RandomWeights, RefusesWhatIsNoModel) {
  ModelConfig model = TinyConfig();
  model.num_kv_heads = 0;
  EXPECT_TRUE(
      Throws<ConfigError>([&] { RandomWeightSource(model, DType::kFloat32); }, {"num_kv_heads"}));
  const RandomWeightSource source(TinyConfig(), DType::kFloat32);
  char byte;
  EXPECT_EQ(source.Find("model.layers.6.mlp.up_proj.weight"), nullptr);
  EXPECT_TRUE(Throws<WeightsError>([&] { source.Read("z", 0, 1, &byte); }, {"z"}));
}

}  // namespace
}  // namespace tidal::test
