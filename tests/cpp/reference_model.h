// The whole model out of reference ops: one token at a time, double precision, DESIGN's rules for
// the plan to the letter. The oracle of the decoder's tests.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "reference.h"
#include "tidal/config.h"
#include "tidal/plan.h"
#include "tiny_model.h"

namespace tidal::test {

class ReferenceModel {
 public:
  ReferenceModel(const ModelConfig& model, const TinyModel& weights, const DecodeConfig& config);

  // As Decoder::DecodeLogits: the first num_prefill tokens densely, the others through the plan.
  Values DecodeLogits(const Ints& token_ids, int64_t num_prefill);

  // A turn of a session: reads the prompt densely, with the token that the last turn left, and
  // chooses max_new_tokens greedily through the plan.
  Ints Turn(const Ints& prompt, int64_t max_new_tokens);

 private:
  enum class Mode { kDense, kPlan };

  void Clear();
  Values Logits(int32_t token, Mode mode);  // appends the token, then predicts
  Values Attention(int64_t layer, const Values& q, Mode mode);
  const Values& Weight(const std::string& name);
  Values Project(const Values& x, const std::string& name);
  Values Heads(const Values& x, const std::string& name, const std::string& norm,
               const Values& cos_sin);

  ModelConfig model_;
  const TinyModel& weights_;
  std::map<std::string, Values> rounded_;  // weights as the decoder holds them
  DecodeConfig config_;
  DecodePlan plan_;
  std::vector<reference::Sequence> cache_;  // one a layer
  std::vector<Ints> sets_;                  // of the last select layer
  Ints unread_;                             // of the last turn
};

}  // namespace tidal::test
