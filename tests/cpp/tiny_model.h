// A tiny random model held in memory: what the decoder's tests load instead of a checkpoint.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "backend_test.h"
#include "tidal/decoder.h"

namespace tidal::test {

// Sizes that CUDA takes too.
ModelConfig TinyConfig();
// Sizes that divide nothing, with biases and q/k norms: the CPU only.
ModelConfig OddConfig();

class TinyModel final : public WeightSource {
 public:
  struct Tensor {
    WeightInfo info;
    Values values;
  };

  TinyModel(const ModelConfig& config, uint64_t seed);

  const WeightInfo* Find(const std::string& name) const override;
  void Read(const std::string& name, int64_t offset, int64_t bytes, void* dst) const override;

  Tensor& tensor(const std::string& name) { return tensors_.at(name); }
  const Tensor& tensor(const std::string& name) const { return tensors_.at(name); }
  void Erase(const std::string& name) { tensors_.erase(name); }
  // The dtype the tensors are stored in; float32 at first.
  void StoreAs(DType dtype);
  int64_t num_elements() const;

 private:
  std::map<std::string, Tensor> tensors_;
};

using Prompts = std::vector<Ints>;

class DecoderTest : public ::testing::TestWithParam<BackendCase> {
 protected:
  void SetUp() override;

  // Room for 4 sequences of 512 tokens; dense, or FFSsSs with a budget of 32.
  DecodeConfig Dense() const;
  DecodeConfig Tidal() const;
  std::unique_ptr<Decoder> Make(const DecodeConfig& config) const;

  bool is_cpu() const { return GetParam().is_cpu(); }

  // Random prompts of the given lengths.
  static Prompts MakePrompts(const Ints& lengths, uint64_t seed = 11);
  // Makes the model one of 16 tokens, whose texts repeat themselves, and the prompts of those.
  Prompts KnowFewTokens(Prompts prompts, uint64_t seed = 5);
  static SamplingParams Greedy(int64_t max_new_tokens);
  static std::vector<SequenceResult> Generate(Decoder& decoder, const Prompts& prompts,
                                              const SamplingParams& params);
  static std::vector<SequenceResult> Finish(Generation& generation);
  // One Advance of each, again and again until all are done.
  static void FinishInTurns(const std::vector<std::unique_ptr<Generation>>& calls);
  // Calls of one prompt each that were decoded together gave what they give alone. On CUDA a batch
  // row equals the row alone to rounding only, so there as many.
  void ExpectAnswers(const std::vector<std::unique_ptr<Generation>>& calls,
                     const std::vector<Ints>& alone) const;

  ModelConfig model_ = TinyConfig();
  TinyModel weights_{model_, 5};
};

std::vector<BackendCase> DecoderBackends();

// What Decoder::Score gives after the last num_positions of the tokens, all of them read, and after
// the first num_prefill and each of those behind them.
std::vector<float> PrefillLogits(Decoder& decoder, const Ints& token_ids, int64_t num_positions);
std::vector<float> DecodeLogits(Decoder& decoder, const Ints& token_ids, int64_t num_prefill);

// Bits of float32 logits, for SameBits.
Bytes Bits(const std::vector<float>& values);
Values Widen(const std::vector<float>& values);

}  // namespace tidal::test
