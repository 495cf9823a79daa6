// Decoder, Generation, Session and Replay. Every call that works on the device, or waits for one
// that does, releases the GIL.
#include "tidal/decoder.h"

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings.h"
#include "tidal/error.h"

namespace py = pybind11;

namespace tidal {
namespace {

using TokenPairs = std::vector<std::pair<int64_t, int32_t>>;

TokenPairs ToPairs(const std::vector<TokenEvent>& events) {
  TokenPairs pairs;
  for (const TokenEvent& event : events) pairs.emplace_back(event.sequence, event.token_id);
  return pairs;
}

py::object FinishReasonString(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return py::none();
    case FinishReason::kStop:
      return py::str("stop");
    case FinishReason::kLength:
      return py::str("length");
    case FinishReason::kAbort:
      return py::str("abort");
    case FinishReason::kError:
      return py::str("error");
  }
  return py::none();
}

StepPlan ParseStepPlan(const std::string& attention) {
  if (attention == "auto") return StepPlan::kDecoder;
  if (attention == "full") return StepPlan::kDense;
  throw InvalidArgument(
      Concat("attention: got \"", attention, "\", expected \"auto\" or \"full\""));
}

FinishReason ParseFinishReason(const std::string& text) {
  if (text == "stop") return FinishReason::kStop;
  if (text == "abort") return FinishReason::kAbort;
  throw InvalidArgument(Concat("reason: got \"", text, "\", expected \"stop\" or \"abort\""));
}

// A numpy array [rows, columns] that takes over the vector's memory.
template <typename T>
py::array_t<T> ToArray(std::vector<T> values, int64_t rows, int64_t columns) {
  auto* owner = new std::vector<T>(std::move(values));
  py::capsule free(owner, [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
  return py::array_t<T>({rows, columns}, owner->data(), free);
}

// Ctrl-C and other signals, seen between steps.
void CheckSignals() {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// The Generation with its Decoder kept alive; close() gives the memory back early.
class PyGeneration {
 public:
  explicit PyGeneration(std::unique_ptr<Generation> generation)
      : generation_(std::move(generation)) {}
  ~PyGeneration() { Close(); }

  Generation& get() const {
    TIDAL_CHECK(generation_ != nullptr, InvalidArgument,
                "generation: it is closed; start a new one");
    return *generation_;
  }

  void Close() {
    if (generation_ == nullptr) return;
    results_ = generation_->results();
    prefill_ = generation_->prefill_progress();
    py::gil_scoped_release release;
    generation_.reset();
    for (SequenceResult& result : results_) {
      if (result.finish_reason == FinishReason::kNone) result.finish_reason = FinishReason::kAbort;
    }
  }

  TokenPairs Advance() {
    py::gil_scoped_release release;
    return ToPairs(get().Advance());
  }

  // The decode loop. The GIL is held only while Python looks at a step's tokens.
  void Run(const py::object& on_tokens) {
    Generation& generation = get();
    py::gil_scoped_release release;
    while (!generation.done()) {
      std::vector<TokenEvent> events = generation.Advance();
      py::gil_scoped_acquire acquire;
      CheckSignals();
      if (!on_tokens.is_none()) on_tokens(ToPairs(events));
    }
  }

  bool done() const { return generation_ == nullptr || generation_->done(); }

  PrefillProgress prefill_progress() const {
    return generation_ ? generation_->prefill_progress() : prefill_;
  }

  std::vector<SequenceResult> results() const {
    return generation_ ? generation_->results() : results_;
  }

 private:
  std::unique_ptr<Generation> generation_;
  std::vector<SequenceResult> results_;
  PrefillProgress prefill_;
};

// Something of a Decoder that close() can end before it.
template <typename T>
class Closable {
 public:
  // `name` is what messages call it.
  Closable(const char* name, std::unique_ptr<T> object) : name_(name), object_(std::move(object)) {}
  ~Closable() { Close(); }

  T& get() const {
    TIDAL_CHECK(object_ != nullptr, InvalidArgument, name_, ": it is closed; start a new one");
    return *object_;
  }

  void Close() {
    py::gil_scoped_release release;
    object_.reset();
  }

 private:
  const char* name_;
  std::unique_ptr<T> object_;
};

class PySession : public Closable<Session> {
 public:
  explicit PySession(std::unique_ptr<Session> session) : Closable("session", std::move(session)) {}

  std::unique_ptr<PyGeneration> Start(const std::vector<int32_t>& token_ids,
                                      const SamplingParams& params, std::optional<int64_t> keep) {
    return std::make_unique<PyGeneration>(get().Start(token_ids, params, keep));
  }
};

class PyReplay : public Closable<Replay> {
 public:
  explicit PyReplay(std::unique_ptr<Replay> replay) : Closable("replay", std::move(replay)) {}

  void Read(const py::object& on_progress) {
    Replay& replay = get();
    py::gil_scoped_release release;
    while (replay.ReadNext()) {
      PrefillProgress progress = replay.prefill_progress();
      py::gil_scoped_acquire acquire;
      CheckSignals();
      if (!on_progress.is_none()) on_progress(progress.tokens_done, progress.tokens_total);
    }
  }

  py::list StepLogits(const PlanConfig& plan, const std::vector<std::vector<int32_t>>& tokens) {
    Replay& replay = get();
    std::vector<std::vector<float>> logits;
    {
      py::gil_scoped_release release;
      logits = replay.StepLogits(plan, tokens);
    }
    py::list arrays;
    for (size_t i = 0; i < logits.size(); ++i) {
      auto rows = static_cast<int64_t>(tokens[i].size()) + 1;
      auto vocab_size = static_cast<int64_t>(logits[i].size()) / rows;
      arrays.append(ToArray(std::move(logits[i]), rows, vocab_size));
    }
    return arrays;
  }

  std::vector<std::vector<int32_t>> Greedy(const PlanConfig& plan, int64_t max_new_tokens,
                                           const std::vector<int32_t>& stop_token_ids) {
    Replay& replay = get();
    py::gil_scoped_release release;
    return replay.Greedy(plan, max_new_tokens, stop_token_ids);
  }

  double MeanSetSize() const { return get().mean_set_size(); }
};

// No weights: random ones.
std::unique_ptr<WeightSource> MakeWeightSource(const ModelConfig& model, DType dtype,
                                               std::optional<std::vector<WeightFileEntry>> files) {
  if (!files) return std::make_unique<RandomWeightSource>(model, dtype);
  return std::make_unique<FileWeightSource>(std::move(*files));
}

std::unique_ptr<Decoder> MakeDecoder(const ModelConfig& model, const DecodeConfig& config,
                                     std::optional<std::vector<WeightFileEntry>> weights,
                                     const py::object& progress) {
  py::gil_scoped_release release;
  auto source = MakeWeightSource(model, config.dtype, std::move(weights));
  return std::make_unique<Decoder>(model, config, *source, [&](int64_t done, int64_t total) {
    py::gil_scoped_acquire acquire;
    CheckSignals();
    if (!progress.is_none()) progress(done, total);
  });
}

py::dict SelectionDict(const Decoder& decoder, int64_t sequence) {
  std::vector<LayerSelection> layers;
  {
    py::gil_scoped_release release;
    layers = decoder.Selection(sequence);
  }
  py::dict result;
  for (LayerSelection& layer : layers) {
    result[py::int_(layer.layer)] =
        ToArray(std::move(layer.token_idx), layer.num_sets, layer.num_selected);
  }
  return result;
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

template <typename Compute>
py::array_t<float> LogitsArray(const Decoder& decoder, const Compute& compute) {
  std::vector<float> logits;
  {
    py::gil_scoped_release release;
    logits = compute();
  }
  int64_t vocab_size = decoder.model().vocab_size;
  auto rows = static_cast<int64_t>(logits.size()) / vocab_size;
  return ToArray(std::move(logits), rows, vocab_size);
}

void RegisterGeneration(py::module_& module) {
  py::class_<Verification>(module, "Verification")
      .def_readonly("drafted_tokens", &Verification::drafted_tokens)
      .def_readonly("accepted_tokens", &Verification::accepted_tokens)
      .def_readonly("dense_passes", &Verification::dense_passes);

  py::class_<SequenceResult>(module, "SequenceResult")
      .def_readonly("token_ids", &SequenceResult::token_ids)
      .def_property_readonly(
          "finish_reason",
          [](const SequenceResult& self) { return FinishReasonString(self.finish_reason); })
      .def_readonly("error", &SequenceResult::error)
      .def_readonly("prompt_tokens", &SequenceResult::prompt_tokens)
      .def_readonly("cached_tokens", &SequenceResult::cached_tokens)
      .def_readonly("time_to_first_token_s", &SequenceResult::time_to_first_token_s)
      .def_readonly("decode_s", &SequenceResult::decode_s)
      .def_readonly("verification", &SequenceResult::verification);

  py::class_<PyGeneration>(module, "Generation")
      .def("advance", &PyGeneration::Advance)
      .def("run", &PyGeneration::Run, py::arg("on_tokens") = py::none())
      .def(
          "stop",
          [](PyGeneration& self, int64_t sequence, const std::string& reason) {
            FinishReason parsed = ParseFinishReason(reason);
            py::gil_scoped_release release;
            self.get().Stop(sequence, parsed);
          },
          py::arg("sequence"), py::arg("reason") = "stop")
      .def("results", &PyGeneration::results)
      .def("close", &PyGeneration::Close)
      .def_property_readonly("done", &PyGeneration::done)
      .def_property_readonly("prefill_progress", [](const PyGeneration& self) {
        PrefillProgress progress = self.prefill_progress();
        return std::pair(progress.tokens_done, progress.tokens_total);
      });
}

void RegisterSession(py::module_& module) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  py::class_<PySession>(module, "Session")
      .def(
          "append",
          [](PySession& self, const std::vector<int32_t>& ids) { self.get().Append(ids); },
          py::arg("token_ids"), NoGil())
      .def(
          "read_next", [](PySession& self) { return self.get().ReadNext(); }, NoGil())
      .def("start", &PySession::Start, py::arg("token_ids"), py::arg("params"),
           py::arg("keep") = py::none(), NoGil(), py::keep_alive<0, 1>())
      .def(
          "truncate", [](PySession& self, int64_t length) { self.get().Truncate(length); },
          py::arg("length"), NoGil())
      .def(
          "token_ids", [](const PySession& self) { return self.get().token_ids(); }, NoGil())
      .def(
          "num_cached", [](const PySession& self) { return self.get().num_cached(); }, NoGil())
      .def_property_readonly("max_seq_len",
                             [](const PySession& self) { return self.get().max_seq_len(); })
      .def("close", &PySession::Close);
}

void RegisterReplay(py::module_& module) {
  py::class_<PyReplay>(module, "Replay")
      .def("read", &PyReplay::Read, py::arg("on_progress") = py::none())
      .def("step_logits", &PyReplay::StepLogits, py::arg("plan"), py::arg("continuations"))
      .def("greedy", &PyReplay::Greedy, py::arg("plan"), py::arg("max_new_tokens"),
           py::arg("stop_token_ids"))
      .def("mean_set_size", &PyReplay::MeanSetSize)
      .def("close", &PyReplay::Close);
}

}  // namespace

void RegisterDecoder(py::module_& module) {
  RegisterGeneration(module);
  RegisterSession(module);
  RegisterReplay(module);
  py::class_<Decoder>(module, "Decoder")
      .def(py::init(&MakeDecoder), py::arg("model"), py::arg("config"), py::arg("weights"),
           py::arg("progress") = py::none())
      .def(
          "start",
          [](Decoder& self, const std::vector<std::vector<int32_t>>& prompts,
             const std::vector<SamplingParams>& params) {
            py::gil_scoped_release release;
            return std::make_unique<PyGeneration>(self.Start(prompts, params));
          },
          py::arg("prompts"), py::arg("params"), py::keep_alive<0, 1>())
      .def(
          "start_session",
          [](Decoder& self, int64_t max_seq_len) {
            py::gil_scoped_release release;
            return std::make_unique<PySession>(self.StartSession(max_seq_len));
          },
          py::arg("max_seq_len"), py::keep_alive<0, 1>())
      .def(
          "fork_session",  // here, so that a fork keeps the decoder alive and not its parent
          [](Decoder&, const PySession& session) {
            py::gil_scoped_release release;
            return std::make_unique<PySession>(session.get().Fork());
          },
          py::arg("session"), py::keep_alive<0, 1>())
      .def(
          "start_replay",
          [](Decoder& self, const std::vector<std::vector<int32_t>>& prompts,
             int64_t max_new_tokens) {
            py::gil_scoped_release release;
            return std::make_unique<PyReplay>(self.StartReplay(prompts, max_new_tokens));
          },
          py::arg("prompts"), py::arg("max_new_tokens"), py::keep_alive<0, 1>())
      .def(
          "prefill_logits",
          [](Decoder& self, const std::vector<int32_t>& token_ids, int64_t num_positions) {
            return LogitsArray(self, [&] { return self.PrefillLogits(token_ids, num_positions); });
          },
          py::arg("token_ids"), py::arg("num_positions"))
      .def(
          "decode_logits",
          [](Decoder& self, const std::vector<int32_t>& token_ids, int64_t num_prefill) {
            return LogitsArray(self, [&] { return self.DecodeLogits(token_ids, num_prefill); });
          },
          py::arg("token_ids"), py::arg("num_prefill"))
      .def(
          "measure_steps",
          [](Decoder& self, const std::vector<int64_t>& seq_lens, int64_t steps, int64_t warmup,
             const std::string& attention) {
            StepBenchmark benchmark{seq_lens, steps, warmup, ParseStepPlan(attention)};
            py::gil_scoped_release release;
            return self.MeasureSteps(benchmark);
          },
          py::arg("seq_lens"), py::arg("steps"), py::arg("warmup"), py::arg("attention") = "auto")
      .def("selection", &SelectionDict, py::arg("sequence"))
      .def("memory_plan", [](const Decoder& self) { return PlanDict(self.memory_plan()); })
      .def_property_readonly("plan", [](const Decoder& self) { return self.plan().ToString(); })
      .def_property_readonly("model", [](const Decoder& self) { return self.model(); })
      .def_property_readonly("config", [](const Decoder& self) { return self.config(); })
      .def_property_readonly(
          "num_free_pages",
          [](const Decoder& self) {
            py::gil_scoped_release release;  // another thread may hold the engine
            return self.num_free_pages();
          })
      .def_property_readonly("num_free_rows", [](const Decoder& self) {
        py::gil_scoped_release release;
        return self.num_free_rows();
      });

  module.def(
      "plan_memory",
      [](const ModelConfig& model, const DecodeConfig& config) {
        MemoryPlan plan;
        {
          py::gil_scoped_release release;
          plan = PlanMemory(model, config);
        }
        return PlanDict(plan);
      },
      py::arg("model"), py::arg("config"));
  module.def("list_devices", [] {
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
  });
  module.def("list_libraries", &ListLibraries);
  module.def("version", &VersionString);
  module.def("cuda_build", [] { return TIDAL_CUDA_STATUS; });
}

}  // namespace tidal
