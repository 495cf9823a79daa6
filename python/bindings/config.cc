// ModelConfig, PlanConfig, DecodeConfig, SamplingParams as Python objects with the same field names
// and defaults.
#include "tidal/config.h"

#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "bindings.h"
#include "tidal/error.h"
#include "tidal/quantized_weights.h"
#include "tidal/weights.h"

namespace py = pybind11;

namespace tidal {
namespace {

template <typename Enum, size_t N>
using Names = std::array<std::pair<Enum, const char*>, N>;

constexpr Names<RopeType, 6> kRopeTypes = {{{RopeType::kDefault, "default"},
                                            {RopeType::kLinear, "linear"},
                                            {RopeType::kDynamic, "dynamic"},
                                            {RopeType::kLlama3, "llama3"},
                                            {RopeType::kYarn, "yarn"},
                                            {RopeType::kLongrope, "longrope"}}};
constexpr Names<RouterScore, 2> kRouterScores = {
    {{RouterScore::kSoftmax, "softmax"}, {RouterScore::kSigmoid, "sigmoid"}}};
constexpr Names<Activation, 3> kActivations = {{{Activation::kSilu, "silu"},
                                                {Activation::kGeluTanh, "gelu_tanh"},
                                                {Activation::kClampedSwiglu, "clamped_swiglu"}}};
constexpr Names<DType, 3> kDTypes = {
    {{DType::kFloat32, "float32"}, {DType::kBFloat16, "bfloat16"}, {DType::kFloat16, "float16"}}};
constexpr Names<DType, 5> kKvDTypes = {{{DType::kFloat32, "float32"},
                                        {DType::kBFloat16, "bfloat16"},
                                        {DType::kFloat16, "float16"},
                                        {DType::kInt8, "int8"},
                                        {DType::kFloat8, "fp8"}}};
// Dtypes of a tensor in a file: also those that only parts of quantised matrices have.
constexpr Names<DType, 5> kStoredDTypes = {{{DType::kFloat32, "float32"},
                                            {DType::kBFloat16, "bfloat16"},
                                            {DType::kFloat16, "float16"},
                                            {DType::kInt32, "int32"},
                                            {DType::kUInt8, "uint8"}}};
constexpr Names<WeightFormat, 7> kWeightFormats = {{{WeightFormat::kFloat8, "float8"},
                                                    {WeightFormat::kInt8, "int8"},
                                                    {WeightFormat::kInt4Packed, "int4_packed"},
                                                    {WeightFormat::kInt8Packed, "int8_packed"},
                                                    {WeightFormat::kInt4Gptq, "int4_gptq"},
                                                    {WeightFormat::kInt4Awq, "int4_awq"},
                                                    {WeightFormat::kMxfp4, "mxfp4"}}};
constexpr Names<KeepWeights, 5> kKeepWeights = {{{KeepWeights::kAsStored, "auto"},
                                                 {KeepWeights::kDecoded, "decoded"},
                                                 {KeepWeights::kFloat8, "fp8"},
                                                 {KeepWeights::kInt4, "int4"},
                                                 {KeepWeights::kMxfp4, "mxfp4"}}};
constexpr Names<KeepActivations, 3> kKeepActivations = {{{KeepActivations::kAsStored, "auto"},
                                                         {KeepActivations::kPlain, "16bit"},
                                                         {KeepActivations::kFloat8, "fp8"}}};
constexpr Names<Drafts, 3> kDrafts = {
    {{Drafts::kTidal, "tidal"}, {Drafts::kNgram, "ngram"}, {Drafts::kBoth, "both"}}};
constexpr Names<Granularity, 3> kGranularities = {{{Granularity::kKvHead, "kv_head"},
                                                   {Granularity::kHead, "head"},
                                                   {Granularity::kLayer, "layer"}}};
constexpr Names<Pooling, 2> kPoolings = {{{Pooling::kSum, "sum"}, {Pooling::kMax, "max"}}};
constexpr Names<Shadow, 2> kShadows = {{{Shadow::kNone, "none"}, {Shadow::kInt4, "int4"}}};

template <typename Enum, size_t N>
Enum Parse(const Names<Enum, N>& names, const char* field, const std::string& text) {
  std::string known;
  for (const auto& [value, name] : names) {
    if (text == name) return value;
    known += (known.empty() ? "\"" : ", \"") + std::string(name) + "\"";
  }
  throw InvalidArgument(Concat(field, ": got \"", text, "\", expected one of ", known));
}

template <typename Enum, size_t N>
std::string Name(const Names<Enum, N>& names, Enum value) {
  for (const auto& [known, name] : names) {
    if (known == value) return name;
  }
  return "unknown";
}

// A property that is an enum in C++ and a string in Python.
template <typename Class, typename Struct, typename Enum, size_t N>
void DefEnum(Class& cls, const char* field, Enum Struct::*member, const Names<Enum, N>& names) {
  cls.def_property(
      field, [=, &names](const Struct& self) { return Name(names, self.*member); },
      [=, &names](Struct& self, const std::string& text) {
        self.*member = Parse(names, field, text);
      });
}

void RegisterModelConfig(py::module_& module) {
  py::class_<RopeConfig> rope(module, "RopeConfig");
  rope.def(py::init<>())
      .def_readwrite("theta", &RopeConfig::theta)
      .def_readwrite("rotary_dim", &RopeConfig::rotary_dim)
      .def_readwrite("interleaved", &RopeConfig::interleaved)
      .def_readwrite("factor", &RopeConfig::factor)
      .def_readwrite("low_freq_factor", &RopeConfig::low_freq_factor)
      .def_readwrite("high_freq_factor", &RopeConfig::high_freq_factor)
      .def_readwrite("original_max_position_embeddings",
                     &RopeConfig::original_max_position_embeddings)
      .def_readwrite("attention_factor", &RopeConfig::attention_factor)
      .def_readwrite("beta_fast", &RopeConfig::beta_fast)
      .def_readwrite("beta_slow", &RopeConfig::beta_slow)
      .def_readwrite("mscale", &RopeConfig::mscale)
      .def_readwrite("mscale_all_dim", &RopeConfig::mscale_all_dim)
      .def_readwrite("truncate", &RopeConfig::truncate)
      .def_readwrite("query_scale_beta", &RopeConfig::query_scale_beta)
      .def_readwrite("short_factor", &RopeConfig::short_factor)
      .def_readwrite("long_factor", &RopeConfig::long_factor);
  DefEnum(rope, "type", &RopeConfig::type, kRopeTypes);

  py::class_<LayerConfig>(module, "LayerConfig")
      .def(py::init<>())
      .def_readwrite("has_rope", &LayerConfig::has_rope)
      .def_readwrite("window", &LayerConfig::window)
      .def_readwrite("has_experts", &LayerConfig::has_experts)
      .def_readwrite("k_scale", &LayerConfig::k_scale)
      .def_readwrite("v_scale", &LayerConfig::v_scale);

  py::class_<ModelConfig> model(module, "ModelConfig");
  model.def(py::init<>())
      .def_readwrite("vocab_size", &ModelConfig::vocab_size)
      .def_readwrite("hidden_size", &ModelConfig::hidden_size)
      .def_readwrite("intermediate_size", &ModelConfig::intermediate_size)
      .def_readwrite("num_layers", &ModelConfig::num_layers)
      .def_readwrite("num_q_heads", &ModelConfig::num_q_heads)
      .def_readwrite("num_kv_heads", &ModelConfig::num_kv_heads)
      .def_readwrite("head_dim", &ModelConfig::head_dim)
      .def_readwrite("max_position_embeddings", &ModelConfig::max_position_embeddings)
      .def_readwrite("rms_norm_eps", &ModelConfig::rms_norm_eps)
      .def_readwrite("qkv_bias", &ModelConfig::qkv_bias)
      .def_readwrite("o_bias", &ModelConfig::o_bias)
      .def_readwrite("mlp_bias", &ModelConfig::mlp_bias)
      .def_readwrite("input_norms", &ModelConfig::input_norms)
      .def_readwrite("branch_norms", &ModelConfig::branch_norms)
      .def_readwrite("qk_norm", &ModelConfig::qk_norm)
      .def_readwrite("wide_qk_norm", &ModelConfig::wide_qk_norm)
      .def_readwrite("norm_offset", &ModelConfig::norm_offset)
      .def_readwrite("swiglu_limit", &ModelConfig::swiglu_limit)
      .def_readwrite("swiglu_alpha", &ModelConfig::swiglu_alpha)
      .def_readwrite("num_experts", &ModelConfig::num_experts)
      .def_readwrite("experts_per_token", &ModelConfig::experts_per_token)
      .def_readwrite("expert_intermediate_size", &ModelConfig::expert_intermediate_size)
      .def_readwrite("router_correction", &ModelConfig::router_correction)
      .def_readwrite("normalized_routing", &ModelConfig::normalized_routing)
      .def_readwrite("routing_scale", &ModelConfig::routing_scale)
      .def_readwrite("shared_expert_size", &ModelConfig::shared_expert_size)
      .def_readwrite("shared_expert_gate", &ModelConfig::shared_expert_gate)
      .def_readwrite("attention_sinks", &ModelConfig::attention_sinks)
      .def_readwrite("tie_word_embeddings", &ModelConfig::tie_word_embeddings)
      .def_readwrite("embedding_scale", &ModelConfig::embedding_scale)
      .def_readwrite("residual_scale", &ModelConfig::residual_scale)
      .def_readwrite("attention_scale", &ModelConfig::attention_scale)
      .def_readwrite("logit_scale", &ModelConfig::logit_scale)
      .def_readwrite("attention_softcap", &ModelConfig::attention_softcap)
      .def_readwrite("logit_softcap", &ModelConfig::logit_softcap)
      .def_readwrite("rope", &ModelConfig::rope)
      .def_readwrite("window_rope", &ModelConfig::window_rope)
      .def_readwrite("layers", &ModelConfig::layers);
  DefEnum(model, "activation", &ModelConfig::activation, kActivations);
  DefEnum(model, "router_score", &ModelConfig::router_score, kRouterScores);
}

void RegisterDecodeConfig(py::module_& module) {
  module.attr("MAX_LOGIT_BIASES") = kMaxLogitBiases;
  module.attr("MAX_LOGIT_BIAS") = kMaxLogitBias;
  module.attr("MAX_PENALTY") = kMaxPenalty;
  module.attr("MAX_REPETITION_PENALTY") = kMaxRepetitionPenalty;
  module.attr("AUTOMATIC") = kAutomatic;
  module.attr("AUTOMATIC_BUDGET") = kAutomaticBudget;
  module.attr("AUTOMATIC_MASS") = kAutomaticMass;
  module.attr("AUTOMATIC_MIN_BUDGET") = kAutomaticMinBudget;
  py::class_<PlanConfig> plan(module, "PlanConfig");
  plan.def(py::init<>())
      .def_readwrite("select_layers", &PlanConfig::select_layers)
      .def_readwrite("scored_layers", &PlanConfig::scored_layers)
      .def_readwrite("full_layers", &PlanConfig::full_layers)
      .def_readwrite("token_budget", &PlanConfig::token_budget)
      .def_readwrite("top_p_mass", &PlanConfig::top_p_mass)
      .def_readwrite("min_token_budget", &PlanConfig::min_token_budget)
      .def_readwrite("sink_tokens", &PlanConfig::sink_tokens)
      .def_readwrite("recent_tokens", &PlanConfig::recent_tokens)
      .def_readwrite("sparse_min_context", &PlanConfig::sparse_min_context)
      .def_readwrite("correction_interval", &PlanConfig::correction_interval);
  DefEnum(plan, "granularity", &PlanConfig::granularity, kGranularities);
  DefEnum(plan, "pooling", &PlanConfig::pooling, kPoolings);
  DefEnum(plan, "shadow", &PlanConfig::shadow, kShadows);

  py::class_<DecodeConfig, PlanConfig> config(module, "DecodeConfig");
  config.def(py::init<>())
      .def_readwrite("verify", &DecodeConfig::verify)
      .def_readwrite("draft_tokens", &DecodeConfig::draft_tokens)
      .def_readwrite("max_seq_len", &DecodeConfig::max_seq_len)
      .def_readwrite("max_batch_size", &DecodeConfig::max_batch_size)
      .def_readwrite("page_size", &DecodeConfig::page_size)
      .def_readwrite("num_pages", &DecodeConfig::num_pages)
      .def_readwrite("gpu_memory_utilization", &DecodeConfig::gpu_memory_utilization)
      .def_readwrite("prefix_cache", &DecodeConfig::prefix_cache)
      .def_readwrite("prefill_chunk", &DecodeConfig::prefill_chunk)
      .def_readwrite("host_kv_gib", &DecodeConfig::host_kv_gib)
      .def_readwrite("max_chunk_ms", &DecodeConfig::max_chunk_ms)
      .def_readwrite("decode_share", &DecodeConfig::decode_share)
      .def_readwrite("cuda_graphs", &DecodeConfig::cuda_graphs)
      .def_readwrite("batch_invariant", &DecodeConfig::batch_invariant)
      .def_readwrite("num_threads", &DecodeConfig::num_threads)
      .def_property(
          "device", [](const DecodeConfig& self) { return DeviceString(self.device); },
          [](DecodeConfig& self, const std::string& text) { self.device = ParseDevice(text); });
  DefEnum(config, "dtype", &DecodeConfig::dtype, kDTypes);
  DefEnum(config, "kv_dtype", &DecodeConfig::kv_dtype, kKvDTypes);
  DefEnum(config, "weight_format", &DecodeConfig::weight_format, kKeepWeights);
  DefEnum(config, "lm_head_format", &DecodeConfig::lm_head_format, kKeepWeights);
  DefEnum(config, "activation_format", &DecodeConfig::activation_format, kKeepActivations);
  DefEnum(config, "drafts", &DecodeConfig::drafts, kDrafts);

  py::class_<SamplingParams>(module, "SamplingParams")
      .def(py::init<>())
      .def_readwrite("max_new_tokens", &SamplingParams::max_new_tokens)
      .def_readwrite("temperature", &SamplingParams::temperature)
      .def_readwrite("top_k", &SamplingParams::top_k)
      .def_readwrite("top_p", &SamplingParams::top_p)
      .def_readwrite("min_p", &SamplingParams::min_p)
      .def_readwrite("repetition_penalty", &SamplingParams::repetition_penalty)
      .def_readwrite("frequency_penalty", &SamplingParams::frequency_penalty)
      .def_readwrite("presence_penalty", &SamplingParams::presence_penalty)
      .def_readwrite("seed", &SamplingParams::seed)
      .def_readwrite("stop_token_ids", &SamplingParams::stop_token_ids)
      .def_readwrite("min_new_tokens", &SamplingParams::min_new_tokens)
      .def_readwrite("no_repeat_ngram_size", &SamplingParams::no_repeat_ngram_size)
      .def_readwrite("logit_bias", &SamplingParams::logit_bias)
      .def_readwrite("suppress_tokens", &SamplingParams::suppress_tokens)
      .def_readwrite("bad_words", &SamplingParams::bad_words)
      .def_readwrite("allowed_token_ids", &SamplingParams::allowed_token_ids)
      .def_readwrite("guide", &SamplingParams::guide);
}

void RegisterWeights(py::module_& module) {
  py::class_<WeightFileEntry>(module, "WeightFileEntry")
      .def(py::init([](std::string name, const std::string& dtype, std::vector<int64_t> shape,
                       std::string path, int64_t file_offset,
                       const std::tuple<uint64_t, uint64_t, int64_t, int64_t>& identity,
                       std::vector<int64_t> strides, std::string stored_name) {
             const auto& [device, inode, size, mtime_ns] = identity;
             return WeightFileEntry{.name = std::move(name),
                                    .info = {Parse(kStoredDTypes, "dtype", dtype), std::move(shape),
                                             std::move(stored_name)},
                                    .path = std::move(path),
                                    .file_offset = file_offset,
                                    .identity = {device, inode, size, mtime_ns},
                                    .strides = std::move(strides)};
           }),
           py::arg("name"), py::arg("dtype"), py::arg("shape"), py::arg("path"),
           py::arg("file_offset"), py::arg("identity"), py::arg("strides"), py::arg("stored_name"));
  py::class_<QuantizedWeight>(module, "QuantizedWeight")
      .def(py::init([](std::string name, std::vector<int64_t> shape, const std::string& format,
                       const std::pair<int64_t, int64_t>& block, WeightFileEntry codes,
                       WeightFileEntry scales, std::optional<WeightFileEntry> zeros,
                       int32_t zero_offset, bool quantizes_inputs,
                       std::optional<WeightFileEntry> input_scale, std::string stored_name) {
             return QuantizedWeight{.name = std::move(name),
                                    .shape = std::move(shape),
                                    .format = Parse(kWeightFormats, "format", format),
                                    .block_rows = block.first,
                                    .block_columns = block.second,
                                    .codes = std::move(codes),
                                    .scales = std::move(scales),
                                    .zeros = std::move(zeros),
                                    .zero_offset = zero_offset,
                                    .quantizes_inputs = quantizes_inputs,
                                    .input_scale = std::move(input_scale),
                                    .stored_name = std::move(stored_name)};
           }),
           py::arg("name"), py::arg("shape"), py::arg("format"), py::arg("block"), py::arg("codes"),
           py::arg("scales"), py::arg("zeros"), py::arg("zero_offset"), py::arg("quantizes_inputs"),
           py::arg("input_scale"), py::arg("stored_name"));
}

}  // namespace

DType ParseDType(const std::string& name) {
  return Parse(kDTypes, "dtype", name);
}

Device ParseDevice(const std::string& name) {
  if (name == "cpu") return {DeviceType::kCpu, 0};
  if (name == "cuda") return {DeviceType::kCuda, 0};
  const std::string prefix = "cuda:";
  std::string digits = name.substr(std::min(name.size(), prefix.size()));
  bool numeric = !digits.empty() && digits.size() <= 4 &&
                 digits.find_first_not_of("0123456789") == std::string::npos;
  TIDAL_CHECK(name.rfind(prefix, 0) == 0 && numeric, InvalidArgument, "device: got \"", name,
              "\", expected \"cpu\", \"cuda\" or \"cuda:N\"");
  return {DeviceType::kCuda, std::stoi(digits)};
}

std::string DeviceString(const Device& device) {
  return device.type == DeviceType::kCpu ? "cpu" : Concat("cuda:", device.index);
}

void RegisterConfig(py::module_& module) {
  RegisterModelConfig(module);
  RegisterDecodeConfig(module);
  RegisterWeights(module);
}

}  // namespace tidal
