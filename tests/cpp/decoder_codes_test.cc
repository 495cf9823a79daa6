// A decoder whose matrices stay in codes: it computes with the numbers that they stand for.
#include <gtest/gtest.h>

#include "tidal/quantized_weights.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

constexpr WeightCodes kCodes[] = {WeightCodes::kFloat8, WeightCodes::kInt4};

class DecoderCodes : public DecoderTest {
 protected:
  void SetUp() override {
    DecoderTest::SetUp();
    weights_.StoreAs(GetParam().dtype);
  }

  std::unique_ptr<WeightSource> InCodes(WeightCodes codes) const {
    return std::make_unique<QuantizingWeightSource>(std::make_unique<TinyModel>(weights_), codes);
  }
  std::unique_ptr<Decoder> MakeIn(WeightCodes codes, const DecodeConfig& config) const {
    return std::make_unique<Decoder>(model_, config, *InCodes(codes));
  }
};

TEST_P(DecoderCodes, AreTheNumbersTheyStandFor) {
  const Ints text = MakePrompts({240})[0];
  for (WeightCodes codes : kCodes) {
    for (DecodeConfig config : {Dense(), Tidal()}) {
      // Where numbers agree to rounding only, so do the scores that positions are chosen by.
      if (!is_cpu() && config != Dense()) continue;
      const auto got = DecodeLogits(*MakeIn(codes, config), text, 200);
      // The CPU's activations are float32: there numbers of that type are the codes' exactly.
      if (is_cpu()) config.dtype = DType::kFloat32;
      weights_.StoreAs(config.dtype);
      const DecodedWeightSource decoded(InCodes(codes), CodedPart::kLayers);
      const auto want =
          DecodeLogits(*std::make_unique<Decoder>(model_, config, decoded), text, 200);
      weights_.StoreAs(GetParam().dtype);
      if (is_cpu()) {
        EXPECT_TRUE(SameBits(Bits(got), Bits(want), 4));
      } else {
        EXPECT_LT(RelativeError(Widen(got), Widen(want)),
                  ToleranceFor(Op::kLogits, GetParam().dtype).rel);
      }
    }
  }
}

TEST_P(DecoderCodes, BatchRowEqualsRowAlone) {
  if (!is_cpu()) GTEST_SKIP() << "on CUDA rows agree to rounding only (the op tests check that)";
  const Prompts prompts = MakePrompts({5, 130, 64, 1});
  for (WeightCodes codes : kCodes) {
    for (const DecodeConfig& config : {Dense(), Tidal()}) {
      const auto decoder = MakeIn(codes, config);
      const auto together = Generate(*decoder, prompts, Greedy(40));
      for (size_t i = 0; i < prompts.size(); ++i) {
        EXPECT_EQ(Generate(*decoder, {prompts[i]}, Greedy(40))[0].token_ids, together[i].token_ids);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, DecoderCodes, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
