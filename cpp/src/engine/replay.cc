// Replay: prompts read once, their continuations decoded through one plan after the other. The
// prompts' keys and values stay; those of a continuation are written over by the next. What prompts
// begin with alike is read once for all of them.
#include <algorithm>
#include <mutex>
#include <optional>
#include <span>
#include <utility>

#include "engine/decoder_impl.h"
#include "engine/plan_use.h"
#include "engine/reading.h"
#include "tidal/error.h"

namespace tidal {

// Decode steps through a plan beside the decoder's, between passes of others.
class Replay::Impl::PlannedSteps {
 public:
  PlannedSteps(Decoder::Impl& decoder, const PlanConfig& plan)
      : decoder_(decoder), runner_(decoder.runner) {
    auto pause = decoder.EnterBetweenPasses();
    use_.emplace(runner_, plan);
  }
  ~PlannedSteps() {
    auto pause = decoder_.PauseToEnd();
    use_.reset();
  }
  PlannedSteps(const PlannedSteps&) = delete;
  PlannedSteps& operator=(const PlannedSteps&) = delete;

  // Runs a decode step, with the plan's own cache correction before it.
  Drawn Step(std::vector<BatchRow> rows) {
    auto pass = decoder_.EnterForAPass();
    const ActivePlan& plan = runner_.plan(use_->id());
    for (const BatchRow& row : rows) {
      CorrectCache(runner_, *row.sequence, plan.config.correction_interval);
    }
    const auto num_rows = static_cast<int64_t>(rows.size());
    Drawn drawn = runner_.Run({std::move(rows), use_->id()});
    if (drawn.is_sparse) {
      num_sets_ += plan.selection.CountSets(num_rows);
      num_positions_ += runner_.CountPositions(use_->id(), num_rows);
    }
    return drawn;
  }

  // Positions of a set, on average over the sparse steps so far.
  double MeanSetSize() const {
    if (num_sets_ == 0) return 0.0;
    return static_cast<double>(num_positions_) / static_cast<double>(num_sets_);
  }

 private:
  Decoder::Impl& decoder_;
  ModelRunner& runner_;
  std::optional<PlanUse> use_;
  int64_t num_sets_ = 0;
  int64_t num_positions_ = 0;
};

Replay::Impl::Impl(std::shared_ptr<Decoder::Impl> owner,
                   const std::vector<std::vector<int32_t>>& token_ids, int64_t room)
    : decoder(std::move(owner)), max_new_tokens(room) {
  ModelRunner& runner = decoder->runner;
  prompts.reserve(token_ids.size());
  for (const std::vector<int32_t>& ids : token_ids) {
    const int64_t max_len = static_cast<int64_t>(ids.size()) + room;
    Sequence sequence = decoder->sequences.Make(ids, 0, runner.ScratchSampling());
    std::vector<int32_t> pages = SharedPages(sequence);
    const int64_t num_shared = static_cast<int64_t>(pages.size()) * runner.pool().page_size();
    sequence.pages.Adopt(std::move(pages));
    sequence.pages.Own(max_len, num_shared, num_shared);
    // The earlier prompt has computed them once this one is read.
    sequence.cached = sequence.clean_len = num_shared;
    prompts.push_back({.sequence = std::move(sequence), .num_shared = num_shared, .logits = {}});
  }
}

std::vector<int32_t> Replay::Impl::SharedPages(const Sequence& sequence) const {
  std::span<const int32_t> most;
  for (const Prompt& prompt : prompts) {
    const Sequence& earlier = prompt.sequence;
    if (earlier.inv_freq != sequence.inv_freq) continue;
    const int64_t count =
        NumCommonPages(earlier.tokens, sequence.tokens, decoder->runner.pool().page_size());
    if (count > std::ssize(most)) {
      most = std::span(earlier.pages.pages()).first(static_cast<size_t>(count));
    }
  }
  return {most.begin(), most.end()};
}

Replay::Impl::~Impl() {
  Close();
}

void Replay::Impl::Close() {
  std::lock_guard call(calls);
  auto lock = decoder->EnterToEnd();
  is_closed = true;
  prompts.clear();
}

std::unique_lock<std::mutex> Replay::Impl::Enter() const {
  decoder->process.Check("decoder");
  std::unique_lock call(calls);
  decoder->CheckOpen();
  TIDAL_CHECK(!is_closed, InvalidArgument, "replay: it is closed; start a new one");
  return call;
}

bool Replay::Impl::ReadNext() {
  ModelRunner& runner = decoder->runner;
  for (Prompt& prompt : prompts) {
    Sequence& sequence = prompt.sequence;
    if (sequence.prefilled()) continue;
    BatchRow row = NextChunk(runner, sequence, sequence.dense_len);
    const bool is_last = sequence.cached + row.num_tokens == sequence.dense_len;
    if (is_last) row.num_draws = row.num_logits = 1;
    auto pass = decoder->EnterForAPass();
    Drawn drawn = runner.Run({.rows = {row}});
    if (is_last) {
      prompt.logits = std::move(drawn.logits[0]);
      prompt.first_token = drawn.tokens[0][0];
    }
    return true;
  }
  return false;
}

void Replay::Impl::ReadAll() {
  while (ReadNext()) {
  }
}

std::vector<Sequence*> Replay::Impl::Rewind() {
  std::vector<Sequence*> rows;
  for (Prompt& prompt : prompts) {
    prompt.sequence.tokens.resize(static_cast<size_t>(prompt.sequence.dense_len));
    prompt.sequence.Rewind(prompt.sequence.dense_len);
    prompt.sequence.num_sparse = 0;
    rows.push_back(&prompt.sequence);
  }
  return rows;
}

Replay::Replay(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Replay::~Replay() {
  if (impl_->decoder->process.IsForeign()) Leak(impl_);
}

void Replay::Close() {
  if (!impl_->decoder->process.IsForeign()) impl_->Close();
}

bool Replay::ReadNext() {
  auto call = impl_->Enter();
  return impl_->ReadNext();
}

PrefillProgress Replay::prefill_progress() const {
  auto call = impl_->Enter();
  PrefillProgress progress;
  for (const Impl::Prompt& prompt : impl_->prompts) {
    const int64_t done = std::min(prompt.sequence.cached, prompt.sequence.dense_len);
    progress.tokens_done += done - prompt.num_shared;
    progress.tokens_total += prompt.sequence.dense_len - prompt.num_shared;
  }
  return progress;
}

std::vector<std::vector<float>> Replay::StepLogits(
    const PlanConfig& settings, const std::vector<std::vector<int32_t>>& continuations) {
  auto call = impl_->Enter();
  size_t count = impl_->prompts.size();
  TIDAL_CHECK(continuations.size() == count, InvalidArgument, "continuations: got ",
              continuations.size(), ", expected one per prompt (", count, ")");
  size_t longest = 0;
  for (const std::vector<int32_t>& tokens : continuations) {
    longest = std::max(longest, tokens.size());
    int64_t vocab_size = impl_->decoder->runner.model().vocab_size;
    for (int32_t token : tokens) {
      TIDAL_CHECK(token >= 0 && token < vocab_size, InvalidArgument, "continuations: got token id ",
                  token, ", expected 0 to ", vocab_size - 1);
    }
  }
  TIDAL_CHECK(static_cast<int64_t>(longest) <= impl_->max_new_tokens, CapacityError,
              "continuations: ", longest, " tokens, have room for max_new_tokens ",
              impl_->max_new_tokens);
  Impl::PlannedSteps plan(*impl_->decoder, settings);
  impl_->ReadAll();
  std::vector<Sequence*> sequences = impl_->Rewind();
  std::vector<std::vector<float>> logits;
  for (const Impl::Prompt& prompt : impl_->prompts) logits.push_back(prompt.logits);
  for (size_t step = 0; step < longest; ++step) {
    std::vector<size_t> indices;
    std::vector<BatchRow> rows;
    for (size_t i = 0; i < count; ++i) {
      if (step >= continuations[i].size()) continue;
      sequences[i]->tokens.push_back(continuations[i][step]);
      indices.push_back(i);
      rows.push_back({.sequence = sequences[i], .num_logits = 1});
    }
    const Drawn drawn = plan.Step(std::move(rows));
    for (size_t row = 0; row < indices.size(); ++row) {
      std::vector<float>& all = logits[indices[row]];
      all.insert(all.end(), drawn.logits[row].begin(), drawn.logits[row].end());
    }
  }
  impl_->mean_set_size = plan.MeanSetSize();
  return logits;
}

std::vector<std::vector<int32_t>> Replay::Greedy(const PlanConfig& settings, int64_t max_new_tokens,
                                                 const std::vector<int32_t>& stop_token_ids) {
  TIDAL_CHECK(max_new_tokens >= 1, InvalidArgument, "max_new_tokens: got ", max_new_tokens,
              ", expected >= 1");
  TIDAL_CHECK(max_new_tokens <= impl_->max_new_tokens, CapacityError, "max_new_tokens: got ",
              max_new_tokens, ", have room for ", impl_->max_new_tokens);
  auto call = impl_->Enter();
  Impl::PlannedSteps plan(*impl_->decoder, settings);
  impl_->ReadAll();
  std::vector<Sequence*> rows = impl_->Rewind();
  std::vector<std::vector<int32_t>> outputs(rows.size());
  std::vector<size_t> indices;
  std::vector<int32_t> next;
  for (size_t i = 0; i < rows.size(); ++i) {
    indices.push_back(i);
    next.push_back(impl_->prompts[i].first_token);
  }
  while (true) {
    std::vector<size_t> alive;
    std::vector<Sequence*> alive_rows;
    for (size_t row = 0; row < rows.size(); ++row) {
      std::vector<int32_t>& output = outputs[indices[row]];
      int32_t token = next[row];
      if (token < 0) {
        output.clear();
        continue;
      }
      output.push_back(token);
      bool stops =
          std::find(stop_token_ids.begin(), stop_token_ids.end(), token) != stop_token_ids.end();
      if (stops || static_cast<int64_t>(output.size()) >= max_new_tokens) continue;
      rows[row]->tokens.push_back(token);
      alive.push_back(indices[row]);
      alive_rows.push_back(rows[row]);
    }
    if (alive.empty()) break;
    indices = std::move(alive);
    rows = std::move(alive_rows);
    std::vector<BatchRow> batch;
    for (Sequence* row : rows) batch.push_back({.sequence = row});
    const Drawn drawn = plan.Step(std::move(batch));
    for (size_t row = 0; row < rows.size(); ++row) next[row] = drawn.tokens[row][0];
    next.resize(rows.size());
  }
  impl_->mean_set_size = plan.MeanSetSize();
  return outputs;
}

double Replay::mean_set_size() const {
  auto call = impl_->Enter();
  return impl_->mean_set_size;
}

}  // namespace tidal
