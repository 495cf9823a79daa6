// Between the loop, which asks guides, and whoever answers: questions wait at a desk that outlives
// the decoder.
#include <algorithm>
#include <chrono>
#include <iterator>
#include <utility>

#include "backend/op_args.h"
#include "core/process.h"
#include "engine/decoder_impl.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// Answers come within some 0.1 ms a row. So long a pass waits for those of the pass before, that
// rows with guides and without stay together.
constexpr double kMostWaitMs = 5.0;

}  // namespace

void GuideDesk::Impl::Put(std::vector<GuideQuestion> questions) {
  if (questions.empty()) return;
  const std::lock_guard lock(mutex);
  std::move(questions.begin(), questions.end(), std::back_inserter(waiting));
  has_questions.notify_all();
}

void GuideDesk::Impl::Close() {
  const std::lock_guard lock(mutex);
  is_closed = true;
  waiting.clear();
  has_questions.notify_all();
}

GuideDesk::GuideDesk(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

std::vector<GuideQuestion> GuideDesk::Wait(double timeout_s) {
  using Seconds = std::chrono::duration<double>;
  std::unique_lock lock(impl_->mutex);
  while (impl_->waiting.empty() && !impl_->is_closed && timeout_s > 0.0) {
    CheckProcessRuns();
    impl_->has_questions.wait_for(lock, Seconds(std::min(timeout_s, kLookSeconds)));
    timeout_s -= kLookSeconds;
  }
  return std::exchange(impl_->waiting, {});
}

void GuideDesk::Answer(std::vector<GuideAnswer> answers) {
  if (auto decoder = impl_->decoder.lock()) decoder->TakeAnswers(std::move(answers));
}

void GuideDesk::Close() {
  impl_->Close();
}

bool GuideDesk::is_closed() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->is_closed;
}

void Decoder::Impl::AskGuides() {
  desk->Put(scheduler.AskGuides(NowMs()));
}

void Decoder::Impl::TakeAnswers(std::vector<GuideAnswer> answers) {
  const int64_t num_words = NumMaskWords(runner.model().vocab_size);
  for (const GuideAnswer& answer : answers) {
    const auto count = static_cast<int64_t>(answer.allowed.size());
    const bool may_be_empty = !answer.error.empty();
    TIDAL_CHECK(count == num_words || (may_be_empty && count == 0), InvalidArgument,
                "allowed: got ", count, " words, expected ", num_words);
  }
  auto lock = EnterToEnd();
  for (GuideAnswer& answer : answers) scheduler.TakeAnswer(std::move(answer));
  AskGuides();  // about the drafts behind those
  is_woken = true;
  has_work.notify_all();
}

// Waits a moment for masks that were asked for.
void Decoder::Impl::AwaitMasks(Lock& lock) {
  while (!is_ending && !is_closed) {
    const std::optional<double> asked_ms = scheduler.MasksAskedAt();
    if (!asked_ms) return;
    const double left_ms = *asked_ms + kMostWaitMs - NowMs();
    if (left_ms <= 0.0) return;
    WakeTold();
    has_work.wait_for(lock, std::chrono::duration<double, std::milli>(left_ms));
  }
}

}  // namespace tidal
