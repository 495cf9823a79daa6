// One running call: prefill its prompts, then step its living sequences together until each has
// ended.
#include <algorithm>
#include <chrono>

#include "decode/decoder_impl.h"
#include "tidal/error.h"

namespace tidal {
namespace {

int64_t NowNs() {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

}  // namespace

Generation::Impl::Impl(Decoder::Impl& owner, const std::vector<std::vector<int32_t>>& prompts,
                       const std::vector<SamplingParams>& params)
    : decoder(owner), record(std::make_shared<SelectionRecord>()), start_ns(NowNs()) {
  Engine& engine = decoder.engine;
  for (size_t i = 0; i < prompts.size(); ++i) {
    auto prompt_len = static_cast<int64_t>(prompts[i].size());
    SamplingRow sampling = MakeSamplingRow(params[i], decoder.slots.Take());
    running.push_back(
        {engine.MakeSequence(prompts[i], prompt_len + params[i].max_new_tokens, sampling),
         params[i], 0.0});
    engine.StartSampling(*running.back().sequence);
    results.push_back({.token_ids = {},
                       .finish_reason = FinishReason::kNone,
                       .error = {},
                       .prompt_tokens = prompt_len});
    record->running.push_back(running.back().sequence->id);
    record->selections.emplace_back();
    prefill.tokens_total += prompt_len;
    ++num_alive;
  }
}

Generation::Impl::~Impl() {
  std::lock_guard lock(decoder.mutex);
  for (size_t i = 0; i < running.size(); ++i) {
    if (running[i].sequence) End(static_cast<int64_t>(i), FinishReason::kAbort);
  }
}

double Generation::Impl::Elapsed() const {
  return static_cast<double>(NowNs() - start_ns) * 1e-9;
}

std::vector<TokenEvent> Generation::Impl::Advance() {
  std::lock_guard lock(decoder.mutex);
  std::vector<TokenEvent> events;
  for (size_t i = 0; i < running.size(); ++i) {
    if (!running[i].sequence || running[i].sequence->prefilled()) continue;
    PrefillOne(static_cast<int64_t>(i), events);
    return events;
  }
  if (num_alive > 0) StepAll(events);
  return events;
}

void Generation::Impl::PrefillOne(int64_t index, std::vector<TokenEvent>& events) {
  Running& run = running[static_cast<size_t>(index)];
  prefill.tokens_done += decoder.engine.PrefillNext(*run.sequence);
  if (!run.sequence->prefilled()) return;
  int32_t token = decoder.engine.SampleAfterPrefill(*run.sequence);
  run.first_token_s = Elapsed();
  results[static_cast<size_t>(index)].time_to_first_token_s = run.first_token_s;
  Accept(index, token, events);
}

void Generation::Impl::StepAll(std::vector<TokenEvent>& events) {
  std::vector<int64_t> indices;
  std::vector<Sequence*> rows;
  for (size_t i = 0; i < running.size(); ++i) {
    if (!running[i].sequence) continue;
    indices.push_back(static_cast<int64_t>(i));
    rows.push_back(&*running[i].sequence);
  }
  std::vector<int32_t> next = decoder.engine.Step(rows);
  for (size_t row = 0; row < rows.size(); ++row) Accept(indices[row], next[row], events);
}

// Appends a drawn token and applies the stop rules.
void Generation::Impl::Accept(int64_t index, int32_t token, std::vector<TokenEvent>& events) {
  Running& run = running[static_cast<size_t>(index)];
  SequenceResult& result = results[static_cast<size_t>(index)];
  if (token < 0) {
    result.error = Concat("the logits after token ", run.sequence->cached - 1,
                          " hold a NaN or infinity, or nothing above -inf; expected finite values; "
                          "check the weights, or try dtype float32");
    End(index, FinishReason::kError);
    return;
  }
  run.sequence->tokens.push_back(token);
  result.token_ids.push_back(token);
  events.push_back({index, token});
  const std::vector<int32_t>& stops = run.params.stop_token_ids;
  if (std::find(stops.begin(), stops.end(), token) != stops.end()) {
    End(index, FinishReason::kStop);
  } else if (static_cast<int64_t>(result.token_ids.size()) >= run.params.max_new_tokens) {
    End(index, FinishReason::kLength);
  }
}

// Keeps what can be looked at, gives the memory back. The caller holds the lock.
void Generation::Impl::End(int64_t index, FinishReason reason) {
  auto i = static_cast<size_t>(index);
  Running& run = running[i];
  results[i].finish_reason = reason;
  results[i].decode_s = results[i].token_ids.empty() ? 0.0 : Elapsed() - run.first_token_s;
  record->running[i].reset();
  try {
    record->selections[i] = decoder.engine.ReadSelection(run.sequence->id);
  } catch (const TidalError&) {
    // A device that has failed has already said so; the pages below must come back all the same.
  }
  decoder.slots.Release(run.sequence->sampling.slot);
  run.sequence.reset();
  --num_alive;
}

void Generation::Impl::Stop(int64_t sequence, FinishReason reason) {
  TIDAL_CHECK(sequence >= 0 && sequence < static_cast<int64_t>(running.size()), InvalidArgument,
              "sequence: got ", sequence, ", expected 0 to ", running.size() - 1);
  std::lock_guard lock(decoder.mutex);
  if (running[static_cast<size_t>(sequence)].sequence) End(sequence, reason);
}

Generation::Generation(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Generation::~Generation() = default;

std::vector<TokenEvent> Generation::Advance() {
  return impl_->Advance();
}
bool Generation::done() const {
  return impl_->num_alive == 0;
}
PrefillProgress Generation::prefill_progress() const {
  return impl_->prefill;
}
void Generation::Stop(int64_t sequence, FinishReason reason) {
  impl_->Stop(sequence, reason);
}
const std::vector<SequenceResult>& Generation::results() const {
  return impl_->results;
}

}  // namespace tidal
