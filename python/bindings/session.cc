// Session and Replay: what stays in the cache between calls.
#include <pybind11/stl.h>

#include <optional>

#include "bindings.h"

namespace py = pybind11;

namespace tidal {
namespace {

using TokenLists = std::vector<std::vector<int32_t>>;

std::unique_ptr<PyGeneration> StartTurn(const PySession& self,
                                        const std::vector<int32_t>& token_ids,
                                        const SamplingParams& params, std::optional<int64_t> keep) {
  return std::make_unique<PyGeneration>(WithoutGil(
      self.get(), [&](Session& session) { return session.Start(token_ids, params, keep); }));
}

// Starts a call of a replay.
template <typename Start>
std::unique_ptr<PyGeneration> StartRun(const PyReplay& self, const Start& start) {
  return std::make_unique<PyGeneration>(WithoutGil(self.get(), start));
}

}  // namespace

void RegisterSession(py::module_& module) {
  py::class_<PySession>(module, "Session")
      .def(
          "append",
          [](const PySession& self, const std::vector<int32_t>& ids) {
            return std::make_unique<PyGeneration>(
                WithoutGil(self.get(), [&](Session& session) { return session.Append(ids); }));
          },
          py::arg("token_ids"))
      .def("start", &StartTurn, py::arg("token_ids"), py::arg("params"),
           py::arg("keep") = py::none())
      .def(
          "truncate",
          [](const PySession& self, int64_t length) {
            WithoutGil(self.get(), [&](Session& session) { session.Truncate(length); });
          },
          py::arg("length"))
      .def("fork",
           [](const PySession& self) {
             return std::make_unique<PySession>(
                 WithoutGil(self.get(), [](Session& session) { return session.Fork(); }));
           })
      .def("token_ids",
           [](const PySession& self) {
             return WithoutGil(self.get(), [](Session& session) { return session.token_ids(); });
           })
      .def("num_cached",
           [](const PySession& self) {
             return WithoutGil(self.get(), [](Session& session) { return session.num_cached(); });
           })
      .def(
          "most_tokens",
          [](const PySession& self, int64_t keep, bool adds) {
            return WithoutGil(self.get(),
                              [&](Session& session) { return session.MostTokens(keep, adds); });
          },
          py::arg("keep"), py::arg("adds"))
      .def_property_readonly("max_seq_len",
                             [](const PySession& self) { return self.get()->max_seq_len(); })
      .def("close", &PySession::Close);
}

void RegisterReplay(py::module_& module) {
  py::class_<PyReplay>(module, "Replay")
      .def("read",
           [](const PyReplay& self) {
             return StartRun(self, [](Replay& replay) { return replay.Read(); });
           })
      .def(
          "step_logits",
          [](const PyReplay& self, const PlanConfig& plan, const TokenLists& continuations) {
            return StartRun(self,
                            [&](Replay& replay) { return replay.StepLogits(plan, continuations); });
          },
          py::arg("plan"), py::arg("continuations"))
      .def(
          "greedy",
          [](const PyReplay& self, const PlanConfig& plan, int64_t max_new_tokens,
             const std::vector<int32_t>& stop_token_ids) {
            return StartRun(self, [&](Replay& replay) {
              return replay.Greedy(plan, max_new_tokens, stop_token_ids);
            });
          },
          py::arg("plan"), py::arg("max_new_tokens"), py::arg("stop_token_ids"))
      .def("close", &PyReplay::Close);
}

}  // namespace tidal
