// One running call: prefill its prompts, then step its living sequences together until each has
// ended.
#include <algorithm>
#include <chrono>

#include "engine/decoder_impl.h"
#include "engine/reading.h"
#include "engine/verified_round.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// Before anything is known about how many drafts are kept.
constexpr int64_t kFirstDraftTokens = 4;

int64_t NowNs() {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

}  // namespace

Generation::Impl::Impl(std::shared_ptr<Decoder::Impl> owner)
    : decoder(std::move(owner)), record(std::make_shared<SelectionRecord>()), start_ns(NowNs()) {}

void Generation::Impl::Add(Sequence&& sequence, const SamplingParams& params) {
  ModelRunner& runner = decoder->runner;
  auto num_tokens = static_cast<int64_t>(sequence.tokens.size());
  int64_t draft_tokens = runner.config().draft_tokens;
  results.push_back({.token_ids = {},
                     .finish_reason = FinishReason::kNone,
                     .error = {},
                     .prompt_tokens = num_tokens,
                     .cached_tokens = sequence.cached});
  record->running.push_back(sequence.id);
  record->selections.emplace_back();
  running.push_back({std::nullopt, params, draft_tokens == 0 ? kFirstDraftTokens : draft_tokens});
  prefill_total += std::max<int64_t>(sequence.dense_len - sequence.cached, 0);
  Sequence& added = running.back().sequence.emplace(std::move(sequence));
  ++num_alive;
  SetSampling(params, runner.model().vocab_size, decoder->slots.Take(), added);
}

Generation::Impl::~Impl() {
  Close();
}

void Generation::Impl::Close() {
  if (num_alive == 0) return;
  auto lock = decoder->EnterToEnd();
  for (size_t i = 0; i < running.size(); ++i) {
    if (running[i].sequence) End(static_cast<int64_t>(i), FinishReason::kAbort);
  }
}

double Generation::Impl::Elapsed() const {
  return static_cast<double>(NowNs() - start_ns) * 1e-9;
}

std::vector<TokenEvent> Generation::Impl::Advance() {
  auto lock = decoder->Enter();
  std::vector<TokenEvent> events;
  for (size_t i = 0; i < running.size(); ++i) {
    if (!running[i].sequence || running[i].sequence->prefilled()) continue;
    PrefillOne(static_cast<int64_t>(i), events);
    return events;
  }
  bool any_drawn = std::any_of(running.begin(), running.end(),
                               [](const Running& run) { return !run.drawn.empty(); });
  if (!any_drawn && num_alive > 0) StepAll();
  for (size_t i = 0; i < running.size(); ++i) {
    std::deque<int32_t>& drawn = running[i].drawn;
    if (drawn.empty()) continue;
    int32_t token = drawn.front();
    drawn.pop_front();
    Accept(static_cast<int64_t>(i), token, events);
  }
  return events;
}

void Generation::Impl::PrefillOne(int64_t index, std::vector<TokenEvent>& events) {
  Running& run = running[static_cast<size_t>(index)];
  ModelRunner& runner = decoder->runner;
  BatchRow row = NextChunk(runner, *run.sequence, run.sequence->dense_len);
  if (run.sequence->cached + row.num_tokens == run.sequence->dense_len) row.num_draws = 1;
  const Drawn drawn = runner.Run({.rows = {row}});
  prefill_done += row.num_tokens;
  if (!run.sequence->prefilled()) return;
  int32_t token = drawn.tokens[0][0];
  if (token >= 0) run.sequence->tokens.push_back(token);
  Accept(index, token, events);
}

void Generation::Impl::StepAll() {
  ModelRunner& runner = decoder->runner;
  std::vector<size_t> indices;
  Batch batch = {.rows = {}, .plan = PlanId::kDecoder};
  for (size_t i = 0; i < running.size(); ++i) {
    if (!running[i].sequence) continue;
    indices.push_back(i);
    batch.rows.push_back({.sequence = &*running[i].sequence});
  }
  if (runner.verifies()) return VerifyAll(indices);
  for (const BatchRow& row : batch.rows) {
    CorrectCache(runner, *row.sequence, runner.config().correction_interval);
  }
  const Drawn drawn = runner.Run(batch);
  for (size_t i = 0; i < batch.rows.size(); ++i) {
    const int32_t token = drawn.tokens[i][0];
    if (token >= 0) batch.rows[i].sequence->tokens.push_back(token);
    running[indices[i]].drawn.push_back(token);
  }
}

void Generation::Impl::VerifyAll(const std::vector<size_t>& indices) {
  ModelRunner& runner = decoder->runner;
  std::vector<DraftRow> rows;
  for (size_t index : indices) {
    Running& run = running[index];
    Sequence& sequence = *run.sequence;
    // A round draws one token more than it drafts; room for all was reserved, and no more.
    int64_t num_new = static_cast<int64_t>(sequence.tokens.size()) - results[index].prompt_tokens;
    int64_t room = run.params.max_new_tokens - num_new - 1;
    rows.push_back({.sequence = &sequence,
                    .num_drafts = runner.plan(PlanId::kDecoder).IsSparse(sequence.cached + 1)
                                      ? std::min(run.draft_tokens, room)
                                      : 0,
                    .begin = 0,
                    .tokens = {}});
  }
  RunVerifiedRound(runner, rows);
  for (size_t i = 0; i < rows.size(); ++i) {
    const DraftRow& row = rows[i];
    Running& run = running[indices[i]];
    run.drawn.assign(row.tokens.begin(), row.tokens.end());
    bool adapts = runner.config().draft_tokens == 0 && row.num_drafts > 0;
    if (adapts) run.draft_tokens = NextDraftTokens(row);
    Verification& verification = results[indices[i]].verification;
    verification.drafted_tokens += row.num_drafts;
    verification.accepted_tokens += row.num_kept();
    ++verification.dense_passes;
  }
}

// Takes a drawn token into the result and applies the stop rules.
void Generation::Impl::Accept(int64_t index, int32_t token, std::vector<TokenEvent>& events) {
  Running& run = running[static_cast<size_t>(index)];
  SequenceResult& result = results[static_cast<size_t>(index)];
  if (result.token_ids.empty()) result.time_to_first_token_s = run.first_token_s = Elapsed();
  if (token < 0) {
    auto num_tokens = result.prompt_tokens + static_cast<int64_t>(result.token_ids.size());
    result.error = Concat("the logits after token ", num_tokens - 1,
                          " hold a NaN or infinity, or nothing above -inf; expected finite values; "
                          "check the weights, or try dtype float32");
    End(index, FinishReason::kError);
    return;
  }
  result.token_ids.push_back(token);
  events.push_back({index, token});
  const std::vector<int32_t>& stops = run.params.stop_token_ids;
  if (std::find(stops.begin(), stops.end(), token) != stops.end()) {
    End(index, FinishReason::kStop);
  } else if (static_cast<int64_t>(result.token_ids.size()) >= run.params.max_new_tokens) {
    End(index, FinishReason::kLength);
  }
}

// Keeps what can be looked at, gives the memory back, a session's sequence to the session. The
// caller holds the lock.
void Generation::Impl::End(int64_t index, FinishReason reason) {
  auto i = static_cast<size_t>(index);
  Running& run = running[i];
  results[i].finish_reason = reason;
  results[i].decode_s = results[i].token_ids.empty() ? 0.0 : Elapsed() - run.first_token_s;
  record->running[i].reset();
  try {
    record->selections[i] = decoder->runner.ReadSelection(PlanId::kDecoder, run.sequence->id);
  } catch (const std::exception&) {
    // A device that has failed has already said so, memory may be short; the pages below must come
    // back all the same.
  }
  decoder->slots.Release(run.sequence->sampling.slot);
  if (session) {
    session->TakeBack(std::move(*run.sequence), static_cast<int64_t>(results[i].token_ids.size()));
  }
  run.sequence.reset();
  run.drawn.clear();
  --num_alive;
}

void Generation::Impl::Stop(int64_t sequence, FinishReason reason) {
  TIDAL_CHECK(sequence >= 0 && sequence < static_cast<int64_t>(running.size()), InvalidArgument,
              "sequence: got ", sequence, ", expected 0 to ", running.size() - 1);
  auto lock = decoder->EnterToEnd();
  if (running[static_cast<size_t>(sequence)].sequence) End(sequence, reason);
}

Generation::Generation(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Generation::~Generation() {
  if (impl_->decoder->process.IsForeign()) Leak(impl_);
}

std::vector<TokenEvent> Generation::Advance() {
  return impl_->Advance();
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
std::vector<SequenceResult> Generation::results() const {
  auto lock = impl_->decoder->EnterToEnd();
  return impl_->results;
}

}  // namespace tidal
