// QuantizingWeightSource: numbers rounded to the nearest code while they are read.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "backend_test.h"
#include "core/float8.h"
#include "core/mxfp4.h"
#include "model/weight_format.h"
#include "tidal/quantized_weights.h"
#include "tidal/weights.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

TEST(Float8, TheNearestCodeIsFound) {
  for (int code = 0; code < 256; ++code) {
    if ((code & 127) == 127) continue;
    EXPECT_EQ(FloatToFloat8(static_cast<float>(double{Float8ToFloat(static_cast<uint8_t>(code))})),
              code);
  }
  for (int code = 0; code < 126; ++code) {  // between two codes the nearer, in the middle the even
    const double low = double{Float8ToFloat(static_cast<uint8_t>(code))},
                 high = double{Float8ToFloat(static_cast<uint8_t>(code + 1))},
                 middle = (low + high) / 2;
    EXPECT_EQ(FloatToFloat8(static_cast<float>(middle)), code + code % 2) << code;
    EXPECT_EQ(FloatToFloat8(static_cast<float>(middle * 0.999)), code) << code;
    EXPECT_EQ(FloatToFloat8(static_cast<float>(-middle * 1.001)), 128 + code + 1) << code;
  }
  EXPECT_EQ(FloatToFloat8(1e9f), 126);
  EXPECT_EQ(FloatToFloat8(-1e9f), 254);
  EXPECT_EQ(FloatToFloat8(std::nanf("")) & 127, 127);
}

TEST(Mxfp4, TheNearestCodeIsFound) {
  for (int code = 0; code < 16; ++code) {
    const auto place = static_cast<size_t>(code);
    EXPECT_EQ(FloatToFloat4(kFloat4Values[place]), code);
    if (code % 8 == 7) continue;
    const float middle = (kFloat4Values[place] + kFloat4Values[place + 1]) / 2;
    EXPECT_EQ(FloatToFloat4(middle), code + code % 2) << code;
    EXPECT_EQ(FloatToFloat4(middle * 0.999f), code) << code;
    EXPECT_EQ(FloatToFloat4(middle * 1.001f), code + 1) << code;
  }
  EXPECT_EQ(FloatToFloat4(1e9f), 7);
  EXPECT_EQ(FloatToFloat4(-1e9f), 15);
}

TEST(Mxfp4, ScalesArePowersOf2) {
  for (int scale = 0; scale < 255; ++scale) {
    const float power = E8m0ToFloat(static_cast<uint8_t>(scale));
    EXPECT_EQ(power, std::ldexp(1.0f, scale - 127)) << scale;
    EXPECT_EQ(FloatToE8m0(power), scale);
  }
  EXPECT_TRUE(std::isnan(E8m0ToFloat(255)));
}

// A matrix of the layers and another, from noise.
TEST(QuantizingWeights, NumbersAreRoundedToTheNearestCode) {
  ModelConfig model = TinyConfig();
  model.hidden_size = 320;
  const std::string name = "model.layers.0.mlp.gate_proj.weight";
  for (WeightCodes codes : {WeightCodes::kFloat8, WeightCodes::kInt4}) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      const RandomWeightSource numbers(model, dtype);
      const QuantizingWeightSource source(std::make_unique<RandomWeightSource>(model, dtype),
                                          codes);
      EXPECT_EQ(source.FindCodes("model.embed_tokens.weight"), nullptr);
      EXPECT_EQ(source.FindCodes("model.norm.weight"), nullptr);
      const CodedInfo* info = source.FindCodes(name);
      ASSERT_NE(info, nullptr);
      const bool is_int4 = codes == WeightCodes::kInt4;
      EXPECT_EQ(info->group_size, is_int4 ? 128 : 320);
      const int64_t rows = model.intermediate_size, in = 320, size = DTypeBytes(dtype);
      const int64_t groups = is_int4 ? 3 : 1;
      std::vector<uint8_t> packed(static_cast<size_t>(rows * in / (is_int4 ? 2 : 1)));
      std::vector<float> scales(static_cast<size_t>(rows * groups));
      source.ReadCodes(name, 0, rows, {packed.data(), scales.data(), nullptr});
      std::vector<char> raw(static_cast<size_t>(rows * in * size)), decoded(raw.size());
      numbers.Read(name, 0, rows * in * size, raw.data());
      source.Read(name, 0, rows * in * size, decoded.data());
      const Values want = test::Decode(Bytes(raw.begin(), raw.end()), dtype);
      const Values got = test::Decode(Bytes(decoded.begin(), decoded.end()), dtype);
      double error = 0.0, total = 0.0;
      for (int64_t i = 0; i < rows * in; ++i) {
        const float scale =
            scales[static_cast<size_t>(i / in * groups + i % in / info->group_size)];
        const auto place = static_cast<size_t>(i);
        const uint8_t code = packed[is_int4 ? place / 2 : place];
        const double value =
            (is_int4 ? ((code >> (i % 2 * 4)) & 15) - 8 : Float8ToFloat(code)) * double{scale};
        ASSERT_EQ(got[place], Rounded({value}, dtype)[0]) << i;
        // Half a step; the largest of int4 is half a step beyond, and the scale is rounded.
        const double step = is_int4 ? scale : std::max(std::abs(want[place]) / 8, scale / 512.0);
        ASSERT_LE(std::abs(value - want[place]), (is_int4 ? 0.54 : 0.51) * step) << i;
        error += (value - want[place]) * (value - want[place]);
        total += want[place] * want[place];
      }
      EXPECT_NEAR(source.relative_error(), std::sqrt(error / total), 1e-6);
      EXPECT_GT(source.relative_error(), is_int4 ? 0.05 : 0.01);
    }
  }
}

// A scale is the power of 2 below the largest of 32 neighbours, over 4; other matrices stay
// numbers.
TEST(QuantizingWeights, ThoseOfExpertsAreRoundedToMxfp4) {
  ModelConfig model = TinyConfig();
  model.hidden_size = 96;
  model.num_experts = 4;
  model.experts_per_token = 2;
  model.expert_intermediate_size = 72;  // not of whole blocks
  model.layers.resize(static_cast<size_t>(model.num_layers), {.has_experts = true});
  const std::string expert = "model.layers.0.mlp.experts.1.", name = expert + "up_proj.weight";
  const RandomWeightSource numbers(model, DType::kFloat32);
  const QuantizingWeightSource source(std::make_unique<RandomWeightSource>(model, DType::kFloat32),
                                      WeightCodes::kMxfp4);
  for (const char* other : {"self_attn.q_proj.weight", "mlp.gate.weight"}) {
    EXPECT_EQ(source.FindCodes(std::string("model.layers.0.") + other), nullptr) << other;
  }
  EXPECT_EQ(source.FindCodes(expert + "down_proj.weight"), nullptr);
  const CodedInfo want = {
      .codes = WeightCodes::kMxfp4, .group_size = 32, .scale_dtype = DType::kUInt8};
  ASSERT_NE(source.FindCodes(name), nullptr);
  EXPECT_TRUE(source.FindCodes(name)->HasSameCodes(want));
  constexpr int64_t kCount = 72 * 96;
  std::vector<float> plain(kCount), rounded(kCount);
  numbers.Read(name, 0, kCount * 4, plain.data());
  source.Read(name, 0, kCount * 4, rounded.data());
  for (size_t begin = 0; begin < plain.size(); begin += 32) {
    float largest = 0.0f;
    for (size_t i = begin; i < begin + 32; ++i) largest = std::max(largest, std::abs(plain[i]));
    const float scale = std::exp2(std::floor(std::log2(largest)) - 2.0f);
    for (size_t i = begin; i < begin + 32; ++i) {
      const auto code = static_cast<size_t>(FloatToFloat4(plain[i] / scale));
      ASSERT_EQ(rounded[i], kFloat4Values[code] * scale) << i;
    }
  }
  EXPECT_GT(source.relative_error(), 0.05);
}

}  // namespace
}  // namespace tidal::test
