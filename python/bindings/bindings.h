// What the files of the module share: one Register function per file, the classes that several
// know, and how arguments are taken.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "closable.h"
#include "tidal/config.h"
#include "tidal/decoder.h"
#include "tidal/guide.h"
#include "tidal/quantized_weights.h"
#include "tidal/weights.h"

namespace tidal {

void RegisterErrors();
void RegisterConfig(pybind11::module_& module);
void RegisterGuideDesk(pybind11::module_& module);
void RegisterGeneration(pybind11::module_& module);
void RegisterSession(pybind11::module_& module);
void RegisterReplay(pybind11::module_& module);
void RegisterDecoder(pybind11::module_& module);

// Enums travel as strings; an unknown one is a ValueError that lists the known ones.
DType ParseDType(const std::string& name);
Device ParseDevice(const std::string& name);
std::string DeviceString(const Device& device);

// Lets Ctrl-C and other signals end the call, as Python exceptions.
void CheckSignals();

// A generation; its results stay when it is closed.
class PyGeneration : public Closable<Generation> {
 public:
  explicit PyGeneration(std::unique_ptr<Generation> generation)
      : Closable("generation", std::move(generation)) {}

  void CloseKeepingResults();
  bool done() const { return is_closed() || get()->done(); }
  PrefillProgress prefill_progress() const {
    return is_closed() ? prefill_ : get()->prefill_progress();
  }
  std::vector<SequenceResult> results() const;
  std::vector<TokenLogprobs> Logprobs(size_t sequence, size_t first) const;

 private:
  std::vector<SequenceResult> results_;  // once closed
  PrefillProgress prefill_;
};

class PyInbox : public Closable<Inbox> {
 public:
  explicit PyInbox(std::unique_ptr<Inbox> inbox) : Closable("inbox", std::move(inbox)) {}
};

class PySession : public Closable<Session> {
 public:
  explicit PySession(std::unique_ptr<Session> session) : Closable("session", std::move(session)) {}
};

class PyGuideDesk : public Closable<GuideDesk> {
 public:
  explicit PyGuideDesk(std::shared_ptr<GuideDesk> desk) : Closable("guide desk", std::move(desk)) {}
};

class PyReplay : public Closable<Replay> {
 public:
  explicit PyReplay(std::unique_ptr<Replay> replay) : Closable("replay", std::move(replay)) {}
};

class PyDecoder : public Closable<Decoder> {
 public:
  // What rounded a part of the weights to codes, and by how much.
  using RoundingErrors = std::map<std::string, double>;  // by setting

  PyDecoder(std::unique_ptr<Decoder> decoder, RoundingErrors errors)
      : Closable("decoder", std::move(decoder)), rounding_errors_(std::move(errors)) {}

  const RoundingErrors& rounding_errors() const { return rounding_errors_; }

 private:
  RoundingErrors rounding_errors_;
};

// Looks up what arrays are made with. pybind11 does it at the first array, and imports numpy:
// Python code, which C++ may run only where the end of the interpreter waits for it.
inline void LoadNumpy() {
  static bool is_loaded = false;  // the GIL guards it
  if (is_loaded) return;
  NativeCall call;
  NativeCall::Callback callback(call);
  pybind11::detail::npy_api::get();
  is_loaded = true;
}

// A numpy array [rows, columns] that takes over the vector's memory.
template <typename T>
pybind11::array_t<T> ToArray(std::vector<T> values, int64_t rows, int64_t columns) {
  LoadNumpy();
  auto owner = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owner->data();
  pybind11::capsule free(owner.get(),
                         [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
  owner.release();
  return pybind11::array_t<T>({rows, columns}, data, free);
}

// {layer: [num_sets, num_selected] int32}.
pybind11::dict SelectionDict(std::vector<LayerSelection> layers);

// Takes no object that its class's __new__ made and no __init__ has filled, which pybind11 would
// give memory of anything.
template <typename T>
class FilledCaster : public pybind11::detail::type_caster_base<T> {
 public:
  bool load(pybind11::handle source, bool convert) {
    if (pybind11::isinstance<T>(source)) {
      auto* instance = reinterpret_cast<pybind11::detail::instance*>(source.ptr());
      if (!instance->get_value_and_holder().instance_registered()) return false;
    }
    return pybind11::detail::type_caster_base<T>::load(source, convert);
  }
};

}  // namespace tidal

namespace pybind11::detail {

template <>
class type_caster<tidal::RopeConfig> : public tidal::FilledCaster<tidal::RopeConfig> {};
template <>
class type_caster<tidal::ModelConfig> : public tidal::FilledCaster<tidal::ModelConfig> {};
template <>
class type_caster<tidal::LayerConfig> : public tidal::FilledCaster<tidal::LayerConfig> {};
template <>
class type_caster<tidal::PlanConfig> : public tidal::FilledCaster<tidal::PlanConfig> {};
template <>
class type_caster<tidal::DecodeConfig> : public tidal::FilledCaster<tidal::DecodeConfig> {};
template <>
class type_caster<tidal::SamplingParams> : public tidal::FilledCaster<tidal::SamplingParams> {};
template <>
class type_caster<tidal::WeightFileEntry> : public tidal::FilledCaster<tidal::WeightFileEntry> {};
template <>
class type_caster<tidal::QuantizedWeight> : public tidal::FilledCaster<tidal::QuantizedWeight> {};
template <>
class type_caster<tidal::Verification> : public tidal::FilledCaster<tidal::Verification> {};
template <>
class type_caster<tidal::TokenLogprobs> : public tidal::FilledCaster<tidal::TokenLogprobs> {};
template <>
class type_caster<tidal::SequenceResult> : public tidal::FilledCaster<tidal::SequenceResult> {};
template <>
class type_caster<tidal::PyGeneration> : public tidal::FilledCaster<tidal::PyGeneration> {};
template <>
class type_caster<tidal::PyInbox> : public tidal::FilledCaster<tidal::PyInbox> {};
template <>
class type_caster<tidal::PySession> : public tidal::FilledCaster<tidal::PySession> {};
template <>
class type_caster<tidal::PyGuideDesk> : public tidal::FilledCaster<tidal::PyGuideDesk> {};
template <>
class type_caster<tidal::PyReplay> : public tidal::FilledCaster<tidal::PyReplay> {};
template <>
class type_caster<tidal::PyDecoder> : public tidal::FilledCaster<tidal::PyDecoder> {};

}  // namespace pybind11::detail
