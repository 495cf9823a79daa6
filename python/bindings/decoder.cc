// Decoder and the functions of the module. Every call that works on the device, or waits for one
// that does, releases the GIL.
#include "tidal/decoder.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <optional>
#include <variant>

#include "bindings.h"
#include "tidal/error.h"

namespace py = pybind11;

namespace tidal {
namespace {

PlanId ParsePlan(const std::string& attention) {
  if (attention == "auto") return PlanId::kDecoder;
  if (attention == "full") return PlanId::kDense;
  throw InvalidArgument(
      Concat("attention: got \"", attention, "\", expected \"auto\" or \"full\""));
}

using StoredWeight = std::variant<WeightFileEntry, QuantizedWeight>;

WeightCodes CodesFor(KeepWeights format) {
  switch (format) {
    case KeepWeights::kFloat8:
      return WeightCodes::kFloat8;
    case KeepWeights::kInt4:
      return WeightCodes::kInt4;
    case KeepWeights::kMxfp4:
      return WeightCodes::kMxfp4;
    default:
      return WeightCodes::kNone;
  }
}

std::unique_ptr<WeightSource> OpenFiles(DType dtype, std::vector<StoredWeight> weights) {
  std::vector<WeightFileEntry> plain;
  std::vector<QuantizedWeight> quantized;
  for (StoredWeight& weight : weights) {
    if (auto* matrix = std::get_if<QuantizedWeight>(&weight)) {
      quantized.push_back(std::move(*matrix));
    } else {
      plain.push_back(std::move(std::get<WeightFileEntry>(weight)));
    }
  }
  if (quantized.empty()) return std::make_unique<FileWeightSource>(std::move(plain));
  return std::make_unique<QuantizedWeightSource>(std::move(plain), std::move(quantized), dtype);
}

// {name: all of its numbers in float32}.
py::dict ReadWeights(std::vector<StoredWeight> weights) {
  std::vector<std::string> names;
  names.reserve(weights.size());
  for (const StoredWeight& weight : weights) {
    names.push_back(std::visit([](const auto& stored) { return stored.name; }, weight));
  }
  const auto source = OpenFiles(DType::kFloat32, std::move(weights));
  py::dict result;
  for (const std::string& name : names) {
    const WeightInfo& info = *source->Find(name);
    py::array_t<float> numbers(info.shape);
    float* target = numbers.mutable_data();
    {
      NativeCall call;
      ReadNumbers(*source, name, target);
    }
    result[py::str(name)] = std::move(numbers);
  }
  source->CheckUnchanged();
  return result;
}

using StoredWeights = std::optional<std::vector<StoredWeight>>;  // none: random ones

// The weights as a decoder's settings want them.
class ModelSource {
 public:
  ModelSource(const ModelConfig& model, const DecodeConfig& config, StoredWeights weights) {
    TIDAL_CHECK(config.weight_format != KeepWeights::kMxfp4 || model.has_experts(), ConfigError,
                "weight_format: got \"mxfp4\", which is of experts, and this model has none; "
                "expected \"auto\", \"decoded\", \"fp8\" or \"int4\"");
    TIDAL_CHECK(config.lm_head_format != KeepWeights::kMxfp4, ConfigError,
                "lm_head_format: got \"mxfp4\", which is of experts; expected \"auto\", "
                "\"decoded\", \"fp8\" or \"int4\"");
    const bool is_decoded = config.weight_format == KeepWeights::kDecoded;
    const KeepWeights as_layers = is_decoded ? KeepWeights::kDecoded : KeepWeights::kAsStored;
    const KeepWeights head = config.lm_head_format;
    const KeepWeights of_head = head == KeepWeights::kAsStored ? as_layers : head;
    Part lm_head = {"lm_head_format", CodedPart::kLmHead, of_head};
    if (weights) {
      Part layers = {"weight_format", CodedPart::kLayers, config.weight_format};
      layers.is_quantized = IsQuantized(*weights, CodedPart::kLayers);
      lm_head.is_quantized = IsQuantized(*weights, CodedPart::kLmHead);
      source_ = OpenFiles(config.dtype, std::move(*weights));
      Keep(layers);
    } else {
      const WeightCodes codes = CodesFor(config.weight_format);
      source_ = std::make_unique<RandomWeightSource>(model, config.dtype, 0, codes);
    }
    Keep(lm_head);
    const bool is_automatic = config.activation_format == KeepActivations::kAsStored;
    // What the checkpoint says is faster on CUDA only.
    if (is_automatic && config.device.type != DeviceType::kCpu) return;
    const bool quantizes = config.activation_format == KeepActivations::kFloat8;
    source_ = std::make_unique<ActivationsSource>(std::move(source_), quantizes);
  }

  const WeightSource& get() const { return *source_; }

  PyDecoder::RoundingErrors RoundingErrors() const {
    PyDecoder::RoundingErrors errors;
    for (const auto& [setting, source] : quantizing_) errors[setting] = source->relative_error();
    return errors;
  }

 private:
  struct Part {
    const char* setting;
    CodedPart part;
    KeepWeights format;
    bool is_quantized = false;  // as it is stored
  };

  static bool IsQuantized(const std::vector<StoredWeight>& weights, CodedPart part) {
    return std::any_of(weights.begin(), weights.end(), [&](const StoredWeight& weight) {
      const auto* matrix = std::get_if<QuantizedWeight>(&weight);
      return matrix != nullptr && PartOf(matrix->name) == part;
    });
  }

  void Keep(const Part& part) {
    const WeightCodes codes = CodesFor(part.format);
    TIDAL_CHECK(codes == WeightCodes::kNone || !part.is_quantized, ConfigError, part.setting,
                ": the checkpoint is quantised already; expected \"auto\" or \"decoded\"");
    if (codes != WeightCodes::kNone) {
      auto made = std::make_unique<QuantizingWeightSource>(std::move(source_), codes, part.part);
      quantizing_[part.setting] = made.get();
      source_ = std::move(made);
    } else if (part.format == KeepWeights::kDecoded) {
      source_ = std::make_unique<DecodedWeightSource>(std::move(source_), part.part);
    }
  }

  std::unique_ptr<WeightSource> source_;
  std::map<std::string, const QuantizingWeightSource*> quantizing_;  // within source_
};

std::unique_ptr<PyDecoder> MakeDecoder(const ModelConfig& model, const DecodeConfig& config,
                                       StoredWeights weights, const py::object& progress) {
  std::unique_ptr<Decoder> decoder;
  PyDecoder::RoundingErrors rounding_errors;
  {
    NativeCall call;
    const ModelSource source(model, config, std::move(weights));
    auto report = [&](int64_t done, int64_t total) {
      NativeCall::Callback callback(call);
      CheckSignals();
      if (!progress.is_none()) progress(done, total);
    };
    decoder = std::make_unique<Decoder>(model, config, source.get(), report);
    rounding_errors = source.RoundingErrors();
  }
  return std::make_unique<PyDecoder>(std::move(decoder), std::move(rounding_errors));
}

py::dict LastSelection(const PyDecoder& self, int64_t sequence) {
  return SelectionDict(
      WithoutGil(self.get(), [&](Decoder& decoder) { return decoder.Selection(sequence); }));
}

py::dict PlanDict(const MemoryPlan& plan) {
  py::dict result;
  result["device"] = plan.device;
  result["max_seq_len"] = plan.max_seq_len;
  result["max_batch_size"] = plan.max_batch_size;
  result["weight_bytes"] = plan.weight_bytes;
  result["kv_bytes"] = plan.kv_bytes;
  result["num_pages"] = plan.num_pages;
  result["page_size"] = plan.page_size;
  py::dict scratch;
  for (const MemoryItem& item : plan.scratch) scratch[py::str(item.purpose)] = item.bytes;
  result["scratch"] = scratch;
  result["reserve_bytes"] = plan.reserve_bytes;
  result["host_bytes"] = plan.host_bytes;
  result["device_bytes"] = plan.device_bytes;
  result["free_bytes"] = plan.free_bytes;
  result["usable_bytes"] = plan.usable_bytes;
  result["problem"] = plan.problem;
  return result;
}

py::dict StatsDict(const PyDecoder& self) {
  DecoderStats stats = WithoutGil(self.get(), [](Decoder& decoder) { return decoder.stats(); });
  py::dict result;
  result["num_waiting"] = stats.num_waiting;
  result["num_reading"] = stats.num_reading;
  result["num_decoding"] = stats.num_decoding;
  result["num_paused"] = stats.num_paused;
  result["num_unread"] = stats.num_unread;
  result["pages_free"] = stats.pages_free;
  result["pages_held"] = stats.pages_held;
  result["pages_cached"] = stats.pages_cached;
  result["pages_on_host"] = stats.pages_on_host;
  result["num_chunks"] = stats.num_chunks;
  result["num_checks"] = stats.num_checks;
  result["num_steps"] = stats.num_steps;
  result["num_dense_steps"] = stats.num_dense_steps;
  result["pass_tokens"] = stats.pass_tokens;
  result["chunk_s"] = stats.chunk_s;
  result["check_s"] = stats.check_s;
  result["step_s"] = stats.step_s;
  result["dense_step_s"] = stats.dense_step_s;
  result["gap_s"] = stats.gap_s;
  result["num_pauses"] = stats.num_pauses;
  result["num_finished"] = stats.num_finished;
  result["read_tokens"] = stats.read_tokens;
  result["cached_tokens"] = stats.cached_tokens;
  result["generated_tokens"] = stats.generated_tokens;
  return result;
}

std::vector<double> MeasureSteps(const PyDecoder& self, const std::vector<int64_t>& seq_lens,
                                 int64_t steps, int64_t warmup, const std::string& attention) {
  StepBenchmark benchmark{seq_lens, steps, warmup, ParsePlan(attention)};
  return WithoutGil(self.get(), [&](Decoder& decoder) { return decoder.MeasureSteps(benchmark); });
}

// What a decoder starts.
void DefineStarts(py::class_<PyDecoder>& decoder) {
  using TokenLists = std::vector<std::vector<int32_t>>;
  decoder
      .def(
          "start",
          [](const PyDecoder& self, const TokenLists& prompts,
             const std::vector<SamplingParams>& params, std::optional<PlanConfig> plan,
             std::optional<bool> verify, int32_t priority, std::optional<int64_t> logprobs,
             std::optional<int64_t> prompt_logprobs, std::string cache_salt, int64_t max_unread) {
            CallOptions options;
            options.plan = std::move(plan);
            options.verify = verify;
            options.priority = priority;
            options.logprobs = logprobs;
            options.prompt_logprobs = prompt_logprobs;
            options.cache_salt = std::move(cache_salt);
            options.max_unread = max_unread;
            return std::make_unique<PyGeneration>(WithoutGil(self.get(), [&](Decoder& started) {
              return started.Start(prompts, params, options);
            }));
          },
          py::arg("prompts"), py::arg("params"), py::arg("plan") = py::none(),
          py::arg("verify") = py::none(), py::arg("priority") = 0, py::arg("logprobs") = py::none(),
          py::arg("prompt_logprobs") = py::none(), py::arg("cache_salt") = "",
          py::arg("max_unread") = 0)
      .def(
          "score",
          [](const PyDecoder& self, const std::vector<int32_t>& token_ids, int64_t num_prefill,
             int64_t num_logits) {
            return std::make_unique<PyGeneration>(WithoutGil(self.get(), [&](Decoder& started) {
              return started.Score(token_ids, num_prefill, num_logits);
            }));
          },
          py::arg("token_ids"), py::arg("num_prefill"), py::arg("num_logits"))
      .def(
          "start_session",
          [](const PyDecoder& self, int64_t max_seq_len) {
            return std::make_unique<PySession>(WithoutGil(
                self.get(), [&](Decoder& started) { return started.StartSession(max_seq_len); }));
          },
          py::arg("max_seq_len"))
      .def(
          "open_inbox",
          [](const PyDecoder& self, int event_fd) {
            return std::make_unique<PyInbox>(self.get()->OpenInbox(event_fd));
          },
          py::arg("event_fd"))
      .def("guide_desk",
           [](const PyDecoder& self) {
             return std::make_unique<PyGuideDesk>(self.get()->guide_desk());
           })
      .def(
          "start_replay",
          [](const PyDecoder& self, const TokenLists& prompts, int64_t max_new_tokens) {
            return std::make_unique<PyReplay>(WithoutGil(self.get(), [&](Decoder& started) {
              return started.StartReplay(prompts, max_new_tokens);
            }));
          },
          py::arg("prompts"), py::arg("max_new_tokens"));
}

// What it computes at once.
void DefineMeasures(py::class_<PyDecoder>& decoder) {
  decoder
      .def("measure_steps", &MeasureSteps, py::arg("seq_lens"), py::arg("steps"), py::arg("warmup"),
           py::arg("attention") = "auto")
      .def("selection", &LastSelection, py::arg("sequence"));
}

// What it is.
void DefineProperties(py::class_<PyDecoder>& cls) {
  cls.def_property_readonly("rounding_errors", &PyDecoder::rounding_errors);
  cls.def("memory_plan", [](const PyDecoder& self) { return PlanDict(self.get()->memory_plan()); })
      .def_property_readonly("plan",
                             [](const PyDecoder& self) { return self.get()->plan().ToString(); })
      .def_property_readonly("model", [](const PyDecoder& self) { return self.get()->model(); })
      .def_property_readonly("config", [](const PyDecoder& self) { return self.get()->config(); })
      .def_property_readonly("num_free_pages",
                             [](const PyDecoder& self) {
                               return WithoutGil(self.get(), [](Decoder& decoder) {
                                 return decoder.num_free_pages();
                               });
                             })
      .def("stats", &StatsDict);
}

py::list DeviceList() {
  py::list devices;
  for (const DeviceStatus& status : ListDevices()) {
    py::dict device;
    device["name"] = status.name;
    device["hardware"] = status.hardware;
    device["available"] = status.available;
    device["reason"] = status.reason;
    device["memory_bytes"] = status.memory_bytes;
    device["free_bytes"] = status.free_bytes;
    devices.append(device);
  }
  return devices;
}

}  // namespace

void RegisterDecoder(py::module_& module) {
  py::class_<PyDecoder> decoder(module, "Decoder");
  decoder
      .def(py::init(&MakeDecoder), py::arg("model"), py::arg("config"), py::arg("weights"),
           py::arg("progress") = py::none())
      .def("close", &PyDecoder::Close);
  DefineStarts(decoder);
  DefineMeasures(decoder);
  DefineProperties(decoder);

  module.def(
      "plan_memory",
      [](const ModelConfig& model, const DecodeConfig& config, StoredWeights weights) {
        MemoryPlan plan;
        {
          NativeCall call;
          plan = PlanMemory(model, config, ModelSource(model, config, std::move(weights)).get());
        }
        return PlanDict(plan);
      },
      py::arg("model"), py::arg("config"), py::arg("weights"));
  module.def("read_weights", &ReadWeights, py::arg("weights"));
  module.def("list_devices", &DeviceList);
  module.def("list_libraries", &ListLibraries);
  module.def("version", &VersionString);
  module.def("cuda_build", [] { return TIDAL_CUDA_STATUS; });
}

}  // namespace tidal
