// Generation and what it gives: results, tokens; and the inbox that hears many.
#include <pybind11/stl.h>

#include "bindings.h"
#include "tidal/error.h"

namespace py = pybind11;

namespace tidal {
namespace {

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

FinishReason ParseFinishReason(const std::string& text) {
  if (text == "stop") return FinishReason::kStop;
  if (text == "abort") return FinishReason::kAbort;
  throw InvalidArgument(Concat("reason: got \"", text, "\", expected \"stop\" or \"abort\""));
}

// The default timeout is short, so that signals are heard.
std::vector<std::pair<int64_t, int32_t>> Advance(const PyGeneration& self, double timeout_s) {
  auto events =
      WithoutGil(self.get(), [&](Generation& generation) { return generation.Advance(timeout_s); });
  std::vector<std::pair<int64_t, int32_t>> pairs;
  pairs.reserve(events.size());
  for (const TokenEvent& event : events) pairs.emplace_back(event.sequence, event.token_id);
  return pairs;
}

std::string StatusString(const PyGeneration& self, int64_t sequence) {
  if (self.is_closed()) return "finished";
  switch (
      WithoutGil(self.get(), [&](Generation& generation) { return generation.Status(sequence); })) {
    case RequestStatus::kQueued:
      return "waiting";
    case RequestStatus::kReading:
      return "reading";
    case RequestStatus::kDecoding:
      return "decoding";
    case RequestStatus::kPaused:
      return "paused";
    case RequestStatus::kFinished:
      break;
  }
  return "finished";
}

// Returns whether there may be news.
bool NotifyAt(const PyGeneration& self, int fd) {
  if (self.is_closed()) return false;
  WithoutGil(self.get(), [&](Generation& generation) { generation.NotifyAt(fd); });
  return true;
}

void ForgetFd(const PyGeneration& self, int fd) {
  if (self.is_closed()) return;
  WithoutGil(self.get(), [&](Generation& generation) { generation.ForgetFd(fd); });
}

// (key, token ids, whether there is more for advance()), in the order in which they have come.
py::list TakeLetters(const PyInbox& self) {
  const std::vector<Letter> letters =
      WithoutGil(self.get(), [](Inbox& inbox) { return inbox.Take(); });
  py::list result(letters.size());
  for (size_t i = 0; i < letters.size(); ++i) {
    const Letter& letter = letters[i];
    result[i] = py::make_tuple(letter.key, letter.token_ids, letter.has_more);
  }
  return result;
}

// Returns whether it will be heard there.
bool AddToInbox(const PyInbox& self, const PyGeneration& generation, int64_t key) {
  if (generation.is_closed()) return false;
  auto added = generation.get();
  WithoutGil(self.get(), [&](Inbox& inbox) { inbox.Add(*added, key); });
  return true;
}

void RemoveFromInbox(const PyInbox& self, const PyGeneration& generation) {
  if (self.is_closed() || generation.is_closed()) return;
  auto removed = generation.get();
  WithoutGil(self.get(), [&](Inbox& inbox) { inbox.Remove(*removed); });
}

py::dict Selection(const PyGeneration& self, int64_t sequence) {
  return SelectionDict(WithoutGil(
      self.get(), [&](Generation& generation) { return generation.Selection(sequence); }));
}

// One row that has them all.
py::array_t<float> TakeLogits(const PyGeneration& self, int64_t sequence) {
  std::vector<float> logits = WithoutGil(
      self.get(), [&](Generation& generation) { return generation.TakeLogits(sequence); });
  const auto count = static_cast<int64_t>(logits.size());
  return ToArray(std::move(logits), 1, count);
}

void Stop(const PyGeneration& self, int64_t sequence, const std::string& reason) {
  FinishReason parsed = ParseFinishReason(reason);
  WithoutGil(self.get(), [&](Generation& generation) { generation.Stop(sequence, parsed); });
}

}  // namespace

py::dict SelectionDict(std::vector<LayerSelection> layers) {
  py::dict result;
  for (LayerSelection& layer : layers) {
    result[py::int_(layer.layer)] =
        ToArray(std::move(layer.token_idx), layer.num_sets, layer.num_selected);
  }
  return result;
}

void PyGeneration::CloseKeepingResults() {
  if (is_closed()) return;
  auto [results, prefill] = WithoutGil(get(), [](Generation& generation) {
    generation.Close();
    return std::pair(generation.results(), generation.prefill_progress());
  });
  results_ = std::move(results);
  prefill_ = prefill;
  Drop();
}

std::vector<SequenceResult> PyGeneration::results() const {
  if (is_closed()) return results_;
  return WithoutGil(get(), [](Generation& generation) { return generation.results(); });
}

std::vector<TokenLogprobs> PyGeneration::Logprobs(size_t sequence, size_t first) const {
  const auto index = static_cast<int64_t>(sequence), begin = static_cast<int64_t>(first);
  if (!is_closed()) {
    return WithoutGil(
        get(), [&](const Generation& generation) { return generation.Logprobs(index, begin); });
  }
  TIDAL_CHECK(sequence < results_.size(), InvalidArgument, "sequence: got ", sequence,
              ", expected 0 to ", results_.size() - 1);
  return results_[sequence].LogprobsFrom(begin);
}

void RegisterGeneration(py::module_& module) {
  py::class_<Verification>(module, "Verification")
      .def_readonly("drafted_tokens", &Verification::drafted_tokens)
      .def_readonly("ngram_tokens", &Verification::ngram_tokens)
      .def_readonly("accepted_tokens", &Verification::accepted_tokens)
      .def_readonly("dense_passes", &Verification::dense_passes);

  py::class_<TokenLogprobs>(module, "TokenLogprobs")
      .def_readonly("logprob", &TokenLogprobs::logprob)
      .def_readonly("rank", &TokenLogprobs::rank)
      .def_readonly("top_ids", &TokenLogprobs::top_ids)
      .def_readonly("top_logprobs", &TokenLogprobs::top_logprobs);

  py::class_<SequenceResult>(module, "SequenceResult")
      .def_readonly("token_ids", &SequenceResult::token_ids)
      .def_property_readonly(
          "finish_reason",
          [](const SequenceResult& self) { return FinishReasonString(self.finish_reason); })
      .def_readonly("error", &SequenceResult::error)
      .def_readonly("logprobs", &SequenceResult::logprobs)
      .def_readonly("prompt_logprobs", &SequenceResult::prompt_logprobs)
      .def_readonly("has_logprobs", &SequenceResult::has_logprobs)
      .def_readonly("has_prompt_logprobs", &SequenceResult::has_prompt_logprobs)
      .def_readonly("prompt_tokens", &SequenceResult::prompt_tokens)
      .def_readonly("cached_tokens", &SequenceResult::cached_tokens)
      .def_readonly("queue_s", &SequenceResult::queue_s)
      .def_readonly("time_to_first_token_s", &SequenceResult::time_to_first_token_s)
      .def_readonly("decode_s", &SequenceResult::decode_s)
      .def_property_readonly("verification",
                             [](const SequenceResult& self) { return self.verification; })
      .def_property_readonly("sets", [](const SequenceResult& self) {
        return std::pair(self.sets.num_sets, self.sets.num_positions);
      });

  py::class_<PyInbox>(module, "Inbox")
      .def("add", &AddToInbox, py::arg("generation"), py::arg("key"))
      .def("remove", &RemoveFromInbox, py::arg("generation"))
      .def("take", &TakeLetters)
      .def("close", &PyInbox::Close);

  py::class_<PyGeneration>(module, "Generation")
      .def("advance", &Advance, py::arg("timeout_s") = 0.1)
      .def("status", &StatusString, py::arg("sequence"))
      .def("selection", &Selection, py::arg("sequence"))
      .def("notify_at", &NotifyAt, py::arg("event_fd"))
      .def("forget_fd", &ForgetFd, py::arg("event_fd"))
      .def("stop", &Stop, py::arg("sequence"), py::arg("reason") = "stop")
      .def("results", &PyGeneration::results)
      .def("logprobs", &PyGeneration::Logprobs, py::arg("sequence"), py::arg("first"))
      .def("take_logits", &TakeLogits, py::arg("sequence"))
      .def("close", &PyGeneration::CloseKeepingResults)
      .def_property_readonly("done", &PyGeneration::done)
      .def_property_readonly("has_news",
                             [](const PyGeneration& self) {
                               if (self.is_closed()) return true;
                               return WithoutGil(self.get(), [](const Generation& generation) {
                                 return generation.has_news();
                               });
                             })
      .def_property_readonly("prefill_progress", [](const PyGeneration& self) {
        PrefillProgress progress = self.prefill_progress();
        return std::pair(progress.tokens_done, progress.tokens_total);
      });
}

}  // namespace tidal
