// GuideDesk: the questions of guided requests, and their answers.
#include "tidal/guide.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "bindings.h"
#include "tidal/error.h"

namespace py = pybind11;

namespace tidal {
namespace {

// request, guide, number, keep, tokens, is_over
using Question = std::tuple<uint64_t, int64_t, int64_t, int64_t, std::vector<int32_t>, bool>;
// request, number, allowed, is_complete, error
using Answer = std::tuple<uint64_t, int64_t, py::bytes, bool, std::string>;

// The time is short, so that signals are heard.
constexpr double kMostSeconds = 1.0;

std::vector<Question> Wait(const PyGuideDesk& self, double timeout_s) {
  auto questions = WithoutGil(
      self.get(), [&](GuideDesk& desk) { return desk.Wait(std::min(timeout_s, kMostSeconds)); });
  std::vector<Question> result;
  result.reserve(questions.size());
  for (GuideQuestion& one : questions) {
    result.emplace_back(one.request, one.guide, one.number, one.keep, std::move(one.tokens),
                        one.is_over);
  }
  return result;
}

void AnswerAll(const PyGuideDesk& self, const std::vector<Answer>& answers) {
  std::vector<GuideAnswer> result;
  for (const auto& [request, number, allowed, is_complete, error] : answers) {
    const std::string_view bytes = allowed;
    TIDAL_CHECK(bytes.size() % sizeof(uint32_t) == 0, InvalidArgument, "allowed: got ",
                bytes.size(), " bytes, expected words of ", sizeof(uint32_t));
    GuideAnswer& answer = result.emplace_back();
    answer.request = request;
    answer.number = number;
    answer.allowed.resize(bytes.size() / sizeof(uint32_t));
    if (!bytes.empty()) std::memcpy(answer.allowed.data(), bytes.data(), bytes.size());
    answer.is_complete = is_complete;
    answer.error = error;
  }
  WithoutGil(self.get(), [&](GuideDesk& desk) { desk.Answer(std::move(result)); });
}

}  // namespace

void RegisterGuideDesk(py::module_& module) {
  py::class_<PyGuideDesk>(module, "GuideDesk")
      .def("wait", &Wait, py::arg("timeout_s") = 0.1)
      .def("answer", &AnswerAll, py::arg("answers"))
      .def("close",
           [](const PyGuideDesk& self) {
             WithoutGil(self.get(), [](GuideDesk& desk) { desk.Close(); });
           })
      .def_property_readonly("is_closed",
                             [](const PyGuideDesk& self) { return self.get()->is_closed(); });
}

}  // namespace tidal
