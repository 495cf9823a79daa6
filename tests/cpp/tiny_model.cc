// A tiny random model in memory (tiny_model.h).
#include "tiny_model.h"

#include <cmath>
#include <cstring>

#include "tidal/error.h"

namespace tidal::test {
namespace {

constexpr int64_t kVocab = 320;

// Makes the tensors of one config, each with the spread that keeps activations near 1.
class Maker {
 public:
  Maker(std::map<std::string, TinyModel::Tensor>& tensors, uint64_t seed)
      : tensors_(tensors), random_(seed) {}

  void Matrix(const std::string& name, int64_t rows, int64_t columns, double gain = 1.0) {
    const double stddev = gain / std::sqrt(static_cast<double>(columns));
    Add(name, {rows, columns}, random_.Normal(rows * columns, DType::kFloat32, stddev));
  }
  void Norm(const std::string& name, int64_t size) {
    Add(name, {size}, random_.Normal(size, DType::kFloat32, 0.2, 1.0));
  }
  void Bias(const std::string& name, int64_t size) {
    Add(name, {size}, random_.Normal(size, DType::kFloat32, 0.3));
  }

 private:
  void Add(const std::string& name, const Shape& shape, Values values) {
    tensors_[name] = {{DType::kFloat32, shape}, std::move(values)};
  }

  std::map<std::string, TinyModel::Tensor>& tensors_;
  Random random_;
};

}  // namespace

ModelConfig TinyConfig() {
  ModelConfig config;
  config.vocab_size = kVocab;
  config.hidden_size = 128;
  config.intermediate_size = 192;
  config.num_layers = 6;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 64;
  config.max_position_embeddings = 1024;
  return config;
}

ModelConfig OddConfig() {
  ModelConfig config = TinyConfig();
  config.vocab_size = 97;
  config.hidden_size = 75;
  config.intermediate_size = 101;
  config.num_q_heads = 6;
  config.head_dim = 20;
  config.qkv_bias = config.o_bias = config.mlp_bias = config.qk_norm = true;
  config.rope.theta = 500.0;
  return config;
}

TinyModel::TinyModel(const ModelConfig& config, uint64_t seed) {
  Maker make(tensors_, seed);
  const int64_t hidden = config.hidden_size, inner = config.intermediate_size;
  make.Matrix("model.embed_tokens.weight", config.vocab_size, hidden, std::sqrt(hidden));
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
    make.Norm(prefix + "input_layernorm.weight", hidden);
    make.Norm(prefix + "post_attention_layernorm.weight", hidden);
    // q and k a little larger: scores of stddev 2, so that attention prefers some positions.
    make.Matrix(attention + "q_proj.weight", config.q_size(), hidden, 1.4);
    make.Matrix(attention + "k_proj.weight", config.kv_size(), hidden, 1.4);
    make.Matrix(attention + "v_proj.weight", config.kv_size(), hidden);
    make.Matrix(attention + "o_proj.weight", hidden, config.q_size());
    make.Matrix(mlp + "gate_proj.weight", inner, hidden);
    make.Matrix(mlp + "up_proj.weight", inner, hidden);
    make.Matrix(mlp + "down_proj.weight", hidden, inner);
    if (config.qk_norm) {
      make.Norm(attention + "q_norm.weight", config.head_dim);
      make.Norm(attention + "k_norm.weight", config.head_dim);
    }
    if (config.qkv_bias) {
      make.Bias(attention + "q_proj.bias", config.q_size());
      make.Bias(attention + "k_proj.bias", config.kv_size());
      make.Bias(attention + "v_proj.bias", config.kv_size());
    }
    if (config.o_bias) make.Bias(attention + "o_proj.bias", hidden);
    if (config.mlp_bias) {
      make.Bias(mlp + "gate_proj.bias", inner);
      make.Bias(mlp + "up_proj.bias", inner);
      make.Bias(mlp + "down_proj.bias", hidden);
    }
  }
  make.Norm("model.norm.weight", hidden);
  if (!config.tie_word_embeddings) make.Matrix("lm_head.weight", config.vocab_size, hidden, 4.0);
}

const WeightInfo* TinyModel::Find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second.info;
}

void TinyModel::Read(const std::string& name, int64_t offset, int64_t bytes, void* dst) const {
  const Tensor& source = tensors_.at(name);
  const Bytes all = Encode(source.values, source.info.dtype);
  ASSERT_LE(offset + bytes, static_cast<int64_t>(all.size())) << name << ": read past the end";
  std::memcpy(dst, all.data() + offset, static_cast<size_t>(bytes));
}

void TinyModel::StoreAs(DType dtype) {
  for (auto& [name, stored] : tensors_) {
    stored.info.dtype = dtype;
    stored.values = Rounded(std::move(stored.values), dtype);
  }
}

int64_t TinyModel::num_elements() const {
  int64_t count = 0;
  for (const auto& [name, stored] : tensors_) count += static_cast<int64_t>(stored.values.size());
  return count;
}

void DecoderTest::SetUp() {
  const std::string reason = WhyUnavailable(GetParam().device);
  if (!reason.empty()) GTEST_SKIP() << reason;
}

DecodeConfig DecoderTest::Dense() const {
  DecodeConfig config;
  config.device = {GetParam().device, 0};
  config.dtype = config.kv_dtype = GetParam().dtype;
  config.max_seq_len = 512;
  config.max_batch_size = 4;
  config.page_size = 16;
  config.prefill_chunk = 64;
  config.token_budget = 32;
  config.num_threads = 1;  // tests run side by side; ThreadsDoNotChangeBits tries more
  // So that passes do not depend on time, or on what was read before.
  config.prefix_cache = false;
  config.max_chunk_ms = 1e9;
  config.decode_share = 0.0;
  return config;
}

DecodeConfig DecoderTest::Tidal() const {
  DecodeConfig config = Dense();
  config.select_layers = {2, 4};
  config.sparse_min_context = 0;  // sequences here are short
  config.granularity = Granularity::kKvHead;
  config.recent_tokens = 1;
  return config;
}

std::unique_ptr<Decoder> DecoderTest::Make(const DecodeConfig& config) const {
  return std::make_unique<Decoder>(model_, config, weights_);
}

Prompts DecoderTest::MakePrompts(const Ints& lengths, uint64_t seed) {
  Random random(seed);
  Prompts prompts;
  for (int32_t length : lengths) prompts.push_back(random.Below(length, kVocab));
  return prompts;
}

Prompts DecoderTest::KnowFewTokens(Prompts prompts, uint64_t seed) {
  model_.vocab_size = 16;
  weights_ = TinyModel(model_, seed);
  for (Ints& prompt : prompts) {
    for (int32_t& token : prompt) token %= 16;
  }
  return prompts;
}

SamplingParams DecoderTest::Greedy(int64_t max_new_tokens) {
  SamplingParams params;
  params.max_new_tokens = max_new_tokens;
  return params;
}

std::vector<SequenceResult> DecoderTest::Finish(Generation& generation) {
  while (!generation.done()) generation.Advance();
  return generation.results();
}

void DecoderTest::FinishInTurns(const std::vector<std::unique_ptr<Generation>>& calls) {
  for (bool running = true; running;) {
    running = false;
    for (const auto& call : calls) {
      call->Advance();
      running = running || !call->done();
    }
  }
}

void DecoderTest::ExpectAnswers(const std::vector<std::unique_ptr<Generation>>& calls,
                                const std::vector<Ints>& alone) const {
  ASSERT_EQ(calls.size(), alone.size());
  for (size_t i = 0; i < calls.size(); ++i) {
    const Ints tokens = calls[i]->results()[0].token_ids;
    if (is_cpu()) {
      EXPECT_EQ(tokens, alone[i]) << i;
    }
    EXPECT_EQ(tokens.size(), alone[i].size()) << i;
  }
}

std::vector<SequenceResult> DecoderTest::Generate(Decoder& decoder, const Prompts& prompts,
                                                  const SamplingParams& params) {
  const std::vector<SamplingParams> each(prompts.size(), params);
  return Finish(*decoder.Start(prompts, each));
}

std::vector<BackendCase> DecoderBackends() {
  return {{DeviceType::kCpu, DType::kFloat32},
          {DeviceType::kCpu, DType::kBFloat16},
          {DeviceType::kCuda, DType::kBFloat16},
          {DeviceType::kCuda, DType::kFloat16}};
}

std::vector<float> PrefillLogits(Decoder& decoder, const Ints& token_ids, int64_t num_positions) {
  const auto call = decoder.Score(token_ids, static_cast<int64_t>(token_ids.size()), num_positions);
  while (!call->done()) call->Advance();
  return call->TakeLogits(0);
}

std::vector<float> DecodeLogits(Decoder& decoder, const Ints& token_ids, int64_t num_prefill) {
  const auto length = static_cast<int64_t>(token_ids.size());
  const auto call = decoder.Score(token_ids, num_prefill, length - num_prefill + 1);
  while (!call->done()) call->Advance();
  return call->TakeLogits(0);
}

Bytes Bits(const std::vector<float>& values) {
  Bytes bytes(values.size() * sizeof(float));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

Values Widen(const std::vector<float>& values) {
  return Values(values.begin(), values.end());
}

}  // namespace tidal::test
