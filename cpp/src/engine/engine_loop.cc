// The loop of the engine: the scheduler's batches go through the model, one after the other, on a
// thread of their own, and whoever asked for them hears what came of it.
#include <algorithm>
#include <chrono>
#include <system_error>
#include <utility>

#include "engine/decoder_impl.h"
#include "tidal/error.h"

namespace tidal {

double Decoder::Impl::NowMs() const {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

void Decoder::Impl::Loop() {
  while (true) {
    {
      Lock lock(mutex);
      auto may_go_on = [&] {
        return is_ending || (!is_closed && (scheduler.HasWork() || !left_plans.empty()));
      };
      if (!may_go_on()) WakeTold();
      has_work.wait(lock, may_go_on);
      if (is_ending) return;
    }
    // Once the process ends nobody may be in the engine's libraries.
    bool has_run;
    {
      ProcessWork work;
      if (!work.may_run()) return;
      has_run = RunPass();
    }
    if (has_run) continue;
    // Who waits needs pages of sessions, which may be closed, or the answer of a guide.
    Lock lock(mutex);
    WakeTold();
    has_work.wait_for(lock, std::chrono::milliseconds(5), [&] { return is_ending || is_woken; });
  }
}

// Returns whether there was one to run.
bool Decoder::Impl::RunPass() {
  std::unique_lock<FairMutex> device_lock(device, std::try_to_lock);
  if (!device_lock.owns_lock()) {
    WakeToldNow();
    device_lock.lock();
  }
  Lock lock(mutex);
  AwaitMasks(lock);
  if (is_closed) return false;
  is_woken = false;
  left_plans.clear();
  std::exception_ptr error;
  std::vector<RequestId> in_flight;
  Drawn drawn;
  try {
    const Batch batch = scheduler.Next(NowMs());
    in_flight = scheduler.InFlight();
    if (!batch.rows.empty() || !batch.saves.empty()) {
      {
        Unlocked unlocked(*this, lock);
        drawn = runner.Run(batch, [this] { WakeToldNow(); });
      }
      scheduler.Commit(batch, drawn, NowMs());
    }
  } catch (...) {
    error = std::current_exception();
    in_flight = scheduler.InFlight();
    scheduler.Fail(NowMs());
    if (in_flight.empty()) EndAll();  // nothing could be planned
  }
  Tell(in_flight, drawn, error);
  AskGuides();
  return !in_flight.empty();
}

// Ends all requests. The caller holds both locks.
void Decoder::Impl::EndAll() {
  for (const auto& [id, listener] : listeners) {
    scheduler.Cancel(id, FinishReason::kAbort, NowMs());
  }
}

// The caller holds `mutex`.
void Decoder::Impl::Tell(std::span<const RequestId> in_flight, Drawn& drawn,
                         const std::exception_ptr& error) {
  std::vector<Generation::Impl*> told;
  auto listener_of = [&](RequestId id) {
    const Listener listener = listeners.at(id);
    told.push_back(listener.generation);
    return listener;
  };
  for (size_t row = 0; row < in_flight.size(); ++row) {
    const Listener listener = listener_of(in_flight[row]);
    listener.generation->HearProgress(listener.index, scheduler.Get(in_flight[row]));
    if (row < drawn.scored.size()) {
      listener.generation->HearScored(listener.index, drawn.scored[row]);
    }
    if (row < drawn.sets.size()) listener.generation->HearSets(listener.index, drawn.sets[row]);
  }
  for (const RequestEvent& event : scheduler.TakeEvents()) {
    const Listener listener = listener_of(event.id);
    TokenLogprobs* logprobs = nullptr;
    const auto row = static_cast<size_t>(event.row), draw = static_cast<size_t>(event.draw);
    if (row < drawn.logprobs.size() && draw < drawn.logprobs[row].size()) {
      logprobs = &drawn.logprobs[row][draw];
    }
    listener.generation->Hear(listener.index, event, logprobs);
    if (event.finish_reason == FinishReason::kNone) continue;
    RequestState left = scheduler.Remove(event.id);
    std::vector<LayerSelection> selection;
    try {
      if (!is_in_pass) {
        selection = runner.ReadSelection(left.request.decoding.plan, left.sequence.id);
      }
    } catch (const std::exception&) {
      // A device that has failed has already said so, memory may be short; the end must be told all
      // the same.
    }
    listeners.erase(event.id);
    if (left.guidance) desk->Put({{.request = event.id, .is_over = true}});
    listener.generation->HearEnd(listener.index, std::move(left), std::move(selection));
  }
  std::sort(told.begin(), told.end());
  told.erase(std::unique(told.begin(), told.end()), told.end());
  for (Generation::Impl* generation : told) generation->HearPassEnd(error);
}

void Decoder::Impl::WakeTold() {
  for (Generation::Impl* generation : std::exchange(to_wake, {})) {
    generation->Wake();
    generation->is_to_be_woken = false;  // after which it may be gone
  }
}

void Decoder::Impl::WakeToldNow() {
  Lock lock(mutex);
  WakeTold();
}

void Decoder::Impl::StartLoop() {
  if (loop.joinable()) return;
  try {
    loop = std::thread([this] { Loop(); });
  } catch (const std::system_error& error) {
    throw BackendError(Concat("decoder: cannot start its thread (", error.what(),
                              "); end other threads, or raise the limit of processes"));
  }
}

RequestId Decoder::Impl::Add(Request request, Sequence sequence, Listener listener) {
  StartLoop();
  // All of a call have come at once, however long it took to add them.
  const double arrived_ms = listener.generation->start_ms;
  const RequestId id = scheduler.Add(std::move(request), std::move(sequence), arrived_ms);
  listeners.emplace(id, listener);
  AskGuides();
  is_woken = true;
  has_work.notify_all();
  return id;
}

void Decoder::Impl::MarkHeard(RequestId id, int64_t num_tokens) {
  if (!scheduler.MarkHeard(id, num_tokens)) return;
  is_woken = true;
  has_work.notify_all();
}

void Decoder::Impl::Cancel(RequestId id, FinishReason reason) {
  if (!listeners.contains(id)) return;
  scheduler.Cancel(id, reason, NowMs());
  Drawn nothing;
  Tell({}, nothing, nullptr);
  WakeTold();
}

}  // namespace tidal
