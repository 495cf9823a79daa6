// One call: its requests, and what it has heard of them.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "engine/decoder_impl.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// A row has one number for its draws and for the tokens before them.
void KeepTop(int64_t num_top, TokenLogprobs& logprobs) {
  const auto count = std::min(static_cast<size_t>(num_top), logprobs.top_ids.size());
  logprobs.top_ids.resize(count);
  logprobs.top_logprobs.resize(count);
}

void CheckNumLogprobs(const char* name, std::optional<int64_t> count) {
  TIDAL_CHECK(!count || (*count >= 0 && *count <= kMaxLogprobs), InvalidArgument, name, ": got ",
              count.value_or(0), ", expected 0 to ", kMaxLogprobs);
}

}  // namespace

Generation::Impl::Impl(std::shared_ptr<Decoder::Impl> owner)
    : decoder(std::move(owner)),
      record(std::make_shared<SelectionRecord>()),
      start_ms(decoder->NowMs()) {}

Generation::Impl::~Impl() {
  Close();
  if (!plan_use && !inbox && !is_to_be_woken) return;
  auto lock = decoder->EnterToEnd();
  std::erase(decoder->to_wake, this);
  Leave();
  if (!plan_use) return;
  // The loop drops it between two passes.
  decoder->left_plans.push_back(std::move(plan_use));
  decoder->has_work.notify_all();
}

void Generation::Impl::SetOptions(const CallOptions& options) {
  CheckNumLogprobs("logprobs", options.logprobs);
  CheckNumLogprobs("prompt_logprobs", options.prompt_logprobs);
  ModelRunner& runner = decoder->runner;
  const ActivePlan* plan = &decoder->own_plan;
  if (options.plan) {
    const bool is_dense =
        options.plan->select_layers.empty() && options.plan->scored_layers.empty();
    decoder->left_plans.clear();  // there may be room for one only
    if (!is_dense) plan_use = std::make_unique<PlanUse>(runner, *options.plan);
    plan = &runner.plan(is_dense ? PlanId::kDense : plan_use->id());
  }
  record->plan = plan->id;
  common.decoding = decoder->PolicyOf(*plan, options.verify.value_or(runner.config().verify));
  TIDAL_CHECK(options.max_unread >= 0, InvalidArgument, "max_unread: got ", options.max_unread,
              ", expected >= 0");
  common.priority = options.priority;
  common.max_unread = options.max_unread;
  common.cache_salt = options.cache_salt;
  common.logprobs = options.logprobs;
  common.prompt_logprobs = options.prompt_logprobs;
}

// Makes room for one more sequence of the call, which has ended until it has a request.
void Generation::Impl::Expect(const Sequence& sequence) {
  running.reserve(running.size() + 1);
  results.push_back({.token_ids = {},
                     .finish_reason = FinishReason::kAbort,
                     .error = {},
                     .prompt_tokens = static_cast<int64_t>(sequence.tokens.size()),
                     .cached_tokens = sequence.cached});
  results.back().has_logprobs = common.logprobs.has_value();
  results.back().has_prompt_logprobs = common.prompt_logprobs.has_value();
  record->running.push_back(sequence.id);
  record->selections.emplace_back();
  running.push_back({.id = 0, .num_cached = sequence.cached});
}

void Generation::Impl::Add(Sequence sequence, Request request) {
  const auto index = static_cast<int64_t>(running.size());
  Expect(sequence);
  const bool goes_on = request.sampling.max_new_tokens > 0 || request.scoring;
  const int64_t read_to = sequence.dense_len - (goes_on ? 0 : 1);
  prefill_total += std::max<int64_t>(read_to - sequence.cached, 0);
  if (request.scoring) running.back().logits = request.scoring->logits;
  SetSampling(request.sampling, decoder->runner.model().vocab_size, 0, sequence);
  running.back().id = decoder->Add(std::move(request), std::move(sequence), {this, index});
  results.back().finish_reason = FinishReason::kNone;
  ++num_alive;
}

SequenceResult& Generation::Impl::AddEnded(const Sequence& sequence, FinishReason reason) {
  Expect(sequence);
  record->running.back().reset();
  results.back().finish_reason = reason;
  return results.back();
}

// --- what the loop tells ---

void Generation::Impl::HearProgress(int64_t index, const RequestState& request) {
  auto i = static_cast<size_t>(index);
  Running& run = running[i];
  results[i].cached_tokens = request.cached_tokens;
  results[i].queue_s = (request.begun_ms - start_ms) * 1e-3;
  const Sequence& sequence = request.sequence;
  int64_t num_read = std::min(sequence.cached, sequence.dense_len) - run.num_cached;
  if (num_read <= run.num_read) return;  // or it reads again what it has read before
  run.num_read = num_read;
  if (heard.empty()) heard.emplace_back();
}

void Generation::Impl::HearScored(int64_t index, std::vector<TokenLogprobs>& scored) {
  std::vector<TokenLogprobs>& all = results[static_cast<size_t>(index)].prompt_logprobs;
  if (!common.prompt_logprobs) return;
  const auto num_prompt = static_cast<size_t>(results[static_cast<size_t>(index)].prompt_tokens);
  for (TokenLogprobs& each : scored) {
    if (all.size() + 1 >= num_prompt) break;  // who was paused reads what it generated as well
    KeepTop(*common.prompt_logprobs, each);
    all.push_back(std::move(each));
  }
}

void Generation::Impl::HearSets(int64_t index, const ChosenSets& sets) {
  ChosenSets& all = results[static_cast<size_t>(index)].sets;
  all.num_sets += sets.num_sets;
  all.num_positions += sets.num_positions;
}

void Generation::Impl::Hear(int64_t index, const RequestEvent& event, TokenLogprobs* logprobs) {
  auto has_token = [&](const News& each) {
    return std::any_of(each.tokens.begin(), each.tokens.end(),
                       [&](const TokenEvent& token) { return token.sequence == index; });
  };
  size_t turn = 0;
  while (turn < heard.size() && has_token(heard[turn])) ++turn;
  if (event.token_id < 0) {  // its end alone, which comes with what it was last given
    turn = turn > 0 ? turn - 1 : 0;
  }
  if (turn == heard.size()) heard.emplace_back();
  if (event.token_id >= 0) {
    TokenEvent& token = heard[turn].tokens.emplace_back();
    token.sequence = index;
    token.token_id = event.token_id;
    if (common.logprobs && logprobs != nullptr) {
      KeepTop(*common.logprobs, *logprobs);
      token.logprobs = std::move(*logprobs);
    }
  }
  if (event.finish_reason != FinishReason::kNone) heard[turn].ended.push_back(index);
}

void Generation::Impl::HearEnd(int64_t index, RequestState left,
                               std::vector<LayerSelection> selection) {
  auto i = static_cast<size_t>(index);
  record->running[i].reset();
  record->selections[i] = std::move(selection);
  running[i].left.emplace(std::move(left));
  if (!lender) running[i].left->sequence.pages.Release();  // of what was scored
}

void Generation::Impl::HearPassEnd(const std::exception_ptr& error) {
  if (heard.empty()) return;
  int64_t num_read = 0;
  for (const Running& run : running) num_read += run.num_read;
  for (News& each : heard) {
    each.time_ms = decoder->NowMs();
    each.prefill_done = num_read;
    news.push_back(std::move(each));
  }
  news.back().error = error;
  heard.clear();
  if (!is_to_be_woken.exchange(true)) decoder->to_wake.push_back(this);
}

void Generation::Impl::Wake() {
  has_news.notify_all();
  if (inbox) inbox->Put(this);
  for (int fd : event_fds) {
    const uint64_t one = 1;
    if (write(fd, &one, sizeof(one)) < 0) continue;  // a counter that is full wakes as well
  }
}

// --- what the caller asks ---

std::vector<TokenEvent> Generation::Impl::Advance(double timeout_s) {
  using Seconds = std::chrono::duration<double>;
  auto lock = decoder->Enter();
  while (news.empty() && num_alive > 0) {
    if (timeout_s <= 0.0) return {};
    has_news.wait_for(lock, Seconds(std::min(timeout_s, kLookSeconds)));
    timeout_s -= kLookSeconds;
    decoder->CheckOpen();
  }
  if (num_alive == 0) return {};
  News next = std::move(news.front());
  news.pop_front();
  return Take(std::move(next));
}

// Takes news into the results. Throws what a pass has failed with.
std::vector<TokenEvent> Generation::Impl::Take(News next) {
  prefill_done = next.prefill_done;
  for (const TokenEvent& event : next.tokens) {
    auto i = static_cast<size_t>(event.sequence);
    if (results[i].token_ids.empty()) {
      running[i].first_token_ms = next.time_ms;
      results[i].time_to_first_token_s = (next.time_ms - start_ms) * 1e-3;
    }
    results[i].token_ids.push_back(event.token_id);
    if (event.logprobs) results[i].logprobs.push_back(*event.logprobs);
    if ((common.owner == SequenceOwner::kSession || common.max_unread > 0) && !running[i].left) {
      decoder->MarkHeard(running[i].id, static_cast<int64_t>(results[i].token_ids.size()));
    }
  }
  std::string no_room;
  for (int64_t index : next.ended) {
    const RequestState& left = *running[static_cast<size_t>(index)].left;
    if (left.failure == RequestFailure::kNoRoom) no_room = left.ErrorText();
    End(index, left.finish_reason, next.time_ms);
  }
  if (next.error) std::rethrow_exception(next.error);
  TIDAL_CHECK(no_room.empty(), CapacityError, no_room);
  return std::move(next.tokens);
}

void Generation::Impl::CheckIndex(int64_t index) const {
  TIDAL_CHECK(index >= 0 && index < static_cast<int64_t>(running.size()), InvalidArgument,
              "sequence: got ", index, ", expected 0 to ", running.size() - 1);
}

bool Generation::Impl::IsAlive(int64_t index) const {
  return results[static_cast<size_t>(index)].finish_reason == FinishReason::kNone;
}

// Gives a sequence's end out, and the sequence back to its lender. Its request has ended. The
// caller holds the decoder's mutex.
void Generation::Impl::End(int64_t index, FinishReason reason, double time_ms) {
  auto i = static_cast<size_t>(index);
  RequestState& left = *running[i].left;
  SequenceResult& result = results[i];
  result.finish_reason = reason;
  result.verification = left.verification;
  if (reason == FinishReason::kError) result.error = left.ErrorText();
  const bool has_begun = !result.token_ids.empty();
  result.decode_s = has_begun ? (time_ms - running[i].first_token_ms) * 1e-3 : 0.0;
  if (lender) lender->TakeBack(index, prefill_done >= prefill_total, left, result);
  running[i].left.reset();
  --num_alive;
}

void Generation::Impl::AwaitEnd(int64_t index, Decoder::Impl::Lock& lock) {
  const std::optional<RequestState>& left = running[static_cast<size_t>(index)].left;
  has_news.wait(lock, [&] { return left || !IsAlive(index); });
}

void Generation::Impl::Stop(int64_t index, FinishReason reason) {
  auto lock = decoder->EnterToEnd();
  CheckIndex(index);
  if (!IsAlive(index)) return;
  decoder->Cancel(running[static_cast<size_t>(index)].id, reason);
  AwaitEnd(index, lock);
  if (!IsAlive(index)) return;  // another thread has been given its end
  // What it has not been given yet, it is not.
  for (News& each : news) {
    std::erase_if(each.tokens, [&](const TokenEvent& event) { return event.sequence == index; });
    std::erase(each.ended, index);
  }
  End(index, reason, decoder->NowMs());
}

void Generation::Impl::Close() {
  if (num_alive == 0) return;
  auto lock = decoder->EnterToEnd();
  for (size_t i = 0; i < running.size(); ++i) {
    if (IsAlive(static_cast<int64_t>(i))) decoder->Cancel(running[i].id, FinishReason::kAbort);
  }
  const auto count = static_cast<int64_t>(running.size());
  for (int64_t i = 0; i < count; ++i) AwaitEnd(i, lock);
  for (int64_t i = 0; i < count; ++i) {  // but for those whose end another thread was given
    if (IsAlive(i)) End(i, FinishReason::kAbort, decoder->NowMs());
  }
  news.clear();
  Wake();
}

RequestStatus Generation::Impl::Status(int64_t index) const {
  auto lock = decoder->EnterToEnd();
  CheckIndex(index);
  const auto i = static_cast<size_t>(index);
  if (!IsAlive(index) || running[i].left) return RequestStatus::kFinished;
  return decoder->scheduler.Get(running[i].id).status;
}

std::vector<LayerSelection> Generation::Impl::Selection(int64_t index) const {
  {
    auto lock = decoder->Enter();
    CheckIndex(index);
    const auto i = static_cast<size_t>(index);
    if (!record->running[i]) return record->selections[i];  // no pass to wait for
  }
  auto pause = decoder->EnterBetweenPasses();
  return record->Read(decoder->runner, index);
}

std::vector<LayerSelection> SelectionRecord::Read(const ModelRunner& runner,
                                                  int64_t sequence) const {
  const auto index = static_cast<size_t>(sequence);
  if (!running[index]) return selections[index];
  return runner.ReadSelection(plan, *running[index]);
}

bool Generation::Impl::HasNews() const {
  return !news.empty() || num_alive == 0 || decoder->is_closed;
}

void Generation::Impl::NotifyAt(int fd) {
  auto lock = decoder->EnterToEnd();
  event_fds.push_back(fd);
  if (HasNews()) Wake();
}

void Generation::Impl::ForgetFd(int fd) {
  auto lock = decoder->EnterToEnd();
  std::erase(event_fds, fd);
}

std::vector<SequenceResult> Generation::Impl::Results() const {
  auto lock = decoder->EnterToEnd();
  return results;
}

std::vector<float> Generation::Impl::TakeLogits(int64_t index) {
  auto lock = decoder->EnterToEnd();
  CheckIndex(index);
  const auto i = static_cast<size_t>(index);
  TIDAL_CHECK(running[i].logits != nullptr && results[i].finish_reason == FinishReason::kLength,
              InvalidArgument, "sequence ", index,
              ": its logits were not asked for, have been taken, or are not all there");
  return std::move(*std::exchange(running[i].logits, nullptr));
}

std::vector<TokenLogprobs> Generation::Impl::Logprobs(int64_t index, int64_t first) const {
  auto lock = decoder->EnterToEnd();
  CheckIndex(index);
  return results[static_cast<size_t>(index)].LogprobsFrom(first);
}

Generation::Generation(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Generation::~Generation() {
  if (impl_->decoder->process.IsForeign()) Leak(impl_);
}

std::vector<TokenEvent> Generation::Advance(double timeout_s) {
  return impl_->Advance(timeout_s);
}
bool Generation::done() const {
  return impl_->num_alive == 0;
}
PrefillProgress Generation::prefill_progress() const {
  return {impl_->prefill_done, impl_->prefill_total};
}
void Generation::Stop(int64_t sequence, FinishReason reason) {
  impl_->Stop(sequence, reason);
}
void Generation::Close() {
  if (!impl_->decoder->process.IsForeign()) impl_->Close();
}
RequestStatus Generation::Status(int64_t sequence) const {
  return impl_->Status(sequence);
}
std::vector<LayerSelection> Generation::Selection(int64_t sequence) const {
  return impl_->Selection(sequence);
}
bool Generation::has_news() const {
  auto lock = impl_->decoder->EnterToEnd();
  return impl_->HasNews();
}
void Generation::NotifyAt(int fd) {
  impl_->NotifyAt(fd);
}
void Generation::ForgetFd(int fd) {
  impl_->ForgetFd(fd);
}
std::vector<SequenceResult> Generation::results() const {
  return impl_->Results();
}
std::vector<float> Generation::TakeLogits(int64_t sequence) {
  return impl_->TakeLogits(sequence);
}
std::vector<TokenLogprobs> Generation::Logprobs(int64_t sequence, int64_t first) const {
  return impl_->Logprobs(sequence, first);
}

}  // namespace tidal
