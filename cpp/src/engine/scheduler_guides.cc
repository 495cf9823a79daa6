// Scheduler: requests whose draws somebody outside guides (tidal/guide.h).
#include <algorithm>
#include <utility>

#include "engine/scheduler.h"

namespace tidal {

std::vector<GuideQuestion> Scheduler::AskGuides(double now_ms) {
  std::vector<GuideQuestion> questions;
  for (RequestState* request : guided_) {
    if (request->is_in_flight) continue;
    std::optional<GuideQuestion> question =
        request->guidance->Ask(request->generated(), request->num_unchecked());
    if (!question) continue;
    question->request = request->id;
    question->guide = request->request.sampling.guide;
    questions.push_back(std::move(*question));
    asked_ms_ = now_ms;
  }
  return questions;
}

void Scheduler::TakeAnswer(GuideAnswer answer) {
  auto found = requests_.find(answer.request);
  if (found == requests_.end() || !found->second.guidance) return;
  found->second.TakeAnswer(std::move(answer));
}

std::optional<double> Scheduler::MasksAskedAt() const {
  const bool lacks_any = std::any_of(guided_.begin(), guided_.end(),
                                     [](const RequestState* one) { return one->LacksMask(); });
  return lacks_any ? std::optional(asked_ms_) : std::nullopt;
}

// Ends those whose guide has said that there is nothing more to draw.
void Scheduler::EndGuided() {
  for (RequestState* request : std::vector(guided_)) {
    const Guidance& guidance = *request->guidance;
    if (!guidance.has_ended() && guidance.error().empty()) continue;
    ReserveEvents(1);
    if (!guidance.error().empty()) request->failure = RequestFailure::kGuide;
    Finish(*request, guidance.has_ended() ? FinishReason::kStop : FinishReason::kError);
  }
}

}  // namespace tidal
