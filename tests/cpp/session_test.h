// What the tests of sessions share: their decoders, and whole turns.
#pragma once

#include "tidal/decoder.h"
#include "tiny_model.h"

namespace tidal::test {

inline Ints Join(const std::vector<Ints>& parts) {
  Ints all;
  for (const Ints& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

class SessionTest : public DecoderTest {
 protected:
  DecodeConfig Corrected(int64_t interval) const {
    DecodeConfig config = Tidal();
    config.correction_interval = interval;
    return config;
  }
  DecodeConfig Verified(Drafts drafts = Drafts::kTidal) const {
    DecodeConfig config = Tidal();
    config.verify = true;
    config.drafts = drafts;
    return config;
  }
  static SamplingParams Drawn(int64_t max_new_tokens) {
    SamplingParams params = Greedy(max_new_tokens);
    params.temperature = 0.8;
    params.repetition_penalty = 1.2;
    params.seed = 3;
    return params;
  }

  static Ints Turn(Session& session, const Ints& token_ids, const SamplingParams& params) {
    return Finish(*session.Start(token_ids, params))[0].token_ids;
  }
  static void Read(Session& session, const Ints& token_ids) { Finish(*session.Append(token_ids)); }
  static Ints One(Decoder& decoder, const Ints& prompt, const SamplingParams& params) {
    return Generate(decoder, {prompt}, params)[0].token_ids;
  }
};

}  // namespace tidal::test
