// With batch_invariant a text depends on nothing beside it, and verified decoding writes the very
// tokens of dense decoding, on every device.
#include <gtest/gtest.h>

#include "tidal/decoder.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

class BatchInvariantDecoding : public DecoderTest {
 protected:
  // More prompts than rows, so that others join and leave; some end with a chunk of one token.
  Prompts prompts_ = MakePrompts({150, 40, 33, 1, 129, 121}, 5);

  static DecodeConfig Invariant(DecodeConfig config) {
    config.batch_invariant = true;
    return config;
  }

  DecodeConfig Verified(Drafts drafts = Drafts::kTidal) const {
    DecodeConfig config = Invariant(Tidal());
    config.verify = true;
    config.drafts = drafts;
    config.draft_tokens = 7;
    config.token_budget = 8;
    return config;
  }

  static std::vector<SamplingParams> Params() {
    SamplingParams drawn = Greedy(50);
    drawn.temperature = 0.8;
    drawn.seed = 3;
    return {Greedy(50), drawn};
  }

  std::vector<Ints> Together(Decoder& decoder, const SamplingParams& params) const {
    std::vector<Ints> texts;
    for (const SequenceResult& result : Generate(decoder, prompts_, params)) {
      texts.push_back(result.token_ids);
    }
    return texts;
  }

  std::vector<Ints> Alone(Decoder& decoder, const SamplingParams& params) const {
    std::vector<Ints> texts;
    for (const Ints& prompt : prompts_) {
      texts.push_back(Generate(decoder, {prompt}, params)[0].token_ids);
    }
    return texts;
  }
};

TEST_P(BatchInvariantDecoding, WritesTheSameAloneAndBesideOthers) {
  for (const DecodeConfig& config : {Dense(), Tidal()}) {
    const auto decoder = Make(Invariant(config));
    for (const SamplingParams& params : Params()) {
      EXPECT_EQ(Together(*decoder, params), Alone(*decoder, params));
    }
  }
}

TEST_P(BatchInvariantDecoding, WritesWhatDenseDecodingWritesIfVerified) {
  const auto dense = Make(Invariant(Dense()));
  for (const Drafts drafts : {Drafts::kTidal, Drafts::kNgram, Drafts::kBoth}) {
    const auto verified = Make(Verified(drafts));
    for (const SamplingParams& params : Params()) {
      const std::vector<Ints> want = Together(*dense, params);
      EXPECT_EQ(Together(*verified, params), want);
      EXPECT_EQ(Alone(*verified, params), want);
    }
  }
}

TEST_P(BatchInvariantDecoding, RecordedStepsAreAsPlainOnes) {
  DecodeConfig config = Verified();
  const std::vector<Ints> want = Together(*Make(config), Greedy(50));
  config.cuda_graphs = false;
  EXPECT_EQ(Together(*Make(config), Greedy(50)), want);
}

// Pages for both begin to lack behind what is kept for a request's output when it is let in.
TEST_P(BatchInvariantDecoding, GoesOnFromHostMemoryAsIfNeverPaused) {
  const SamplingParams params = Greedy(1400);
  prompts_ = MakePrompts({12, 13}, 5);
  DecodeConfig config = Invariant(Tidal());
  config.max_seq_len = 1440;
  const std::vector<Ints> want = Alone(*Make(config), params);
  config.num_pages = 140;
  config.host_kv_gib = 0.1;
  const auto decoder = Make(config);
  EXPECT_EQ(Together(*decoder, params), want);
  EXPECT_GT(decoder->stats().num_pauses, 0);
}

INSTANTIATE_TEST_SUITE_P(Backends, BatchInvariantDecoding, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
