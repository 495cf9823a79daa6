// Replay: prompts read once, their continuations decoded through one plan after the other. The
// prompts' keys and values stay; those of a continuation are written over by the next. What prompts
// begin with alike is read once for all of them. Each run is a Generation that borrows the
// sequences and gives them back when they end (generation.cc).
#include <algorithm>
#include <span>
#include <utility>

#include "engine/decoder_impl.h"
#include "tidal/error.h"

namespace tidal {

Replay::Impl::Impl(std::shared_ptr<Decoder::Impl> owner,
                   const std::vector<std::vector<int32_t>>& token_ids, int64_t room)
    : decoder(std::move(owner)), max_new_tokens(room) {
  ModelRunner& runner = decoder->runner;
  const auto vocab_size = static_cast<size_t>(runner.model().vocab_size);
  prompts.reserve(token_ids.size());
  for (const std::vector<int32_t>& ids : token_ids) {
    const auto length = static_cast<int64_t>(ids.size());
    Sequence sequence = decoder->sequences.Make(ids, 0, runner.ScratchSampling());
    Shared shared = MostShared(sequence);
    const int64_t num_shared =
        static_cast<int64_t>(shared.pages.size()) * runner.pool().page_size();
    sequence.pages.Adopt(std::move(shared.pages));
    sequence.pages.Own(length + room, num_shared, num_shared);
    // The earlier prompt has computed them once this one is read.
    sequence.cached = sequence.clean_len = num_shared;
    prompts.push_back({.sequence = std::move(sequence),
                       .length = length,
                       .num_shared = num_shared,
                       .source = shared.source,
                       .logits = std::make_shared<std::vector<float>>(vocab_size)});
  }
}

Replay::Impl::Shared Replay::Impl::MostShared(const Sequence& sequence) const {
  std::span<const int32_t> most;
  std::optional<size_t> source;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const Sequence& earlier = *prompts[i].sequence;
    if (earlier.inv_freq != sequence.inv_freq) continue;
    const int64_t count =
        NumCommonPages(earlier.tokens, sequence.tokens, decoder->runner.pool().page_size());
    if (count <= std::ssize(most)) continue;
    most = std::span(earlier.pages.pages()).first(static_cast<size_t>(count));
    source = i;
  }
  return {{most.begin(), most.end()}, source};
}

Replay::Impl::~Impl() {
  Close();
}

void Replay::Impl::Close() {
  auto lock = decoder->EnterToEnd();
  is_closed = true;
  for (Prompt& prompt : prompts) prompt.sequence.reset();
}

Sequence Replay::Impl::Prompt::Lend(std::optional<int32_t> token) {
  Sequence lent = std::move(*sequence);
  sequence.reset();
  if (token) lent.tokens.push_back(*token);
  return lent;
}

std::unique_ptr<Generation::Impl> Replay::Impl::NewRun(const std::shared_ptr<Impl>& self) {
  auto run = std::make_unique<Generation::Impl>(self->decoder);
  run->lender = self;
  run->common.owner = SequenceOwner::kReplay;
  run->common.counts_sets = true;
  return run;
}

void Replay::Impl::Begin(Generation::Impl& run, const CallOptions& options) const {
  TIDAL_CHECK(!is_closed, InvalidArgument, "replay: it is closed; start a new one");
  const bool is_idle = std::all_of(prompts.begin(), prompts.end(), [](const Prompt& prompt) {
    return prompt.sequence.has_value();
  });
  TIDAL_CHECK(is_idle, InvalidArgument,
              "replay: a call of it is running; finish it or close it first");
  decoder->StartLoop();  // what may throw comes before any change
  run.SetOptions(options);
}

void Replay::Impl::CheckRead() const {
  for (size_t i = 0; i < prompts.size(); ++i) {
    TIDAL_CHECK(prompts[i].is_read, InvalidArgument, "replay: prompt ", i,
                " has not been read; read it first");
  }
}

void Replay::Impl::TakeBack(int64_t index, bool, RequestState& left, SequenceResult& result) {
  Prompt& prompt = prompts[static_cast<size_t>(index)];
  Sequence& used = left.sequence;
  const bool is_whole = left.finish_reason != FinishReason::kError;
  if (is_whole) result.token_ids.assign(used.tokens.begin() + prompt.length, used.tokens.end());
  if (is_closed) return;  // the pages go with the request
  const bool has_source = !prompt.source || prompts[*prompt.source].is_read;
  if (!prompt.is_read && has_source && left.finish_reason == FinishReason::kLength) {
    prompt.is_read = true;
    prompt.first_token = left.last_draw;
  }
  used.tokens.resize(static_cast<size_t>(prompt.length));
  // What it has read behind tokens that nobody has read is of no use.
  used.Rewind(has_source ? prompt.length : prompt.num_shared);
  used.num_sparse = 0;
  used.sampling = decoder->runner.ScratchSampling();
  used.rules.reset();
  used.id = decoder->sequences.NextId();
  prompt.sequence.emplace(std::move(used));
}

Replay::Replay(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
Replay::~Replay() {
  if (impl_->decoder->process.IsForeign()) Leak(impl_);
}

void Replay::Close() {
  if (!impl_->decoder->process.IsForeign()) impl_->Close();
}

std::unique_ptr<Generation> Replay::Read() {
  auto run = Impl::NewRun(impl_);
  auto lock = impl_->decoder->Enter();  // after it: what throws lets go of the engine first
  impl_->Begin(*run, {.verify = false});
  for (Impl::Prompt& prompt : impl_->prompts) {
    if (prompt.is_read) {
      run->AddEnded(*prompt.sequence, FinishReason::kLength);
      continue;
    }
    Request request = run->common;
    request.sampling.max_new_tokens = 0;
    request.scoring = {.num_logits = 1, .logits = prompt.logits};
    if (prompt.source && !impl_->prompts[*prompt.source].is_read) {
      request.reads_behind = run->running[*prompt.source].id;
    }
    run->Add(prompt.Lend({}), std::move(request));
  }
  return std::unique_ptr<Generation>(new Generation(std::move(run)));
}

std::unique_ptr<Generation> Replay::StepLogits(
    const PlanConfig& plan, const std::vector<std::vector<int32_t>>& continuations) {
  const size_t count = impl_->prompts.size();
  TIDAL_CHECK(continuations.size() == count, InvalidArgument, "continuations: got ",
              continuations.size(), ", expected one per prompt (", count, ")");
  const auto vocab_size = static_cast<size_t>(impl_->decoder->runner.model().vocab_size);
  std::vector<Impl::Logits> logits;
  for (const std::vector<int32_t>& tokens : continuations) {
    for (int32_t token : tokens) {
      TIDAL_CHECK(token >= 0 && static_cast<size_t>(token) < vocab_size, InvalidArgument,
                  "continuations: got token id ", token, ", expected 0 to ", vocab_size - 1);
    }
    TIDAL_CHECK(static_cast<int64_t>(tokens.size()) <= impl_->max_new_tokens, CapacityError,
                "continuations: ", tokens.size(), " tokens, have room for max_new_tokens ",
                impl_->max_new_tokens);
    logits.push_back(std::make_shared<std::vector<float>>((tokens.size() + 1) * vocab_size));
  }
  auto run = Impl::NewRun(impl_);
  auto pause = impl_->decoder->EnterBetweenPasses();  // after it: as above
  impl_->CheckRead();
  impl_->Begin(*run, {.plan = plan, .verify = false});
  for (size_t i = 0; i < count; ++i) {
    Impl::Prompt& prompt = impl_->prompts[i];
    const std::vector<int32_t>& tokens = continuations[i];
    std::copy(prompt.logits->begin(), prompt.logits->end(), logits[i]->begin());
    if (tokens.empty()) {
      run->AddEnded(*prompt.sequence, FinishReason::kLength);
      run->running.back().logits = logits[i];
      continue;
    }
    Request request = run->common;
    request.sampling.max_new_tokens = static_cast<int64_t>(tokens.size()) - 1;
    request.scoring = {.forced = {tokens.begin() + 1, tokens.end()},
                       .num_logits = static_cast<int64_t>(tokens.size()) + 1,
                       .logits = logits[i]};
    run->Add(prompt.Lend(tokens.front()), std::move(request));
  }
  return std::unique_ptr<Generation>(new Generation(std::move(run)));
}

std::unique_ptr<Generation> Replay::Greedy(const PlanConfig& plan, int64_t max_new_tokens,
                                           const std::vector<int32_t>& stop_token_ids) {
  TIDAL_CHECK(max_new_tokens >= 1, InvalidArgument, "max_new_tokens: got ", max_new_tokens,
              ", expected >= 1");
  TIDAL_CHECK(max_new_tokens <= impl_->max_new_tokens, CapacityError, "max_new_tokens: got ",
              max_new_tokens, ", have room for ", impl_->max_new_tokens);
  auto run = Impl::NewRun(impl_);
  auto pause = impl_->decoder->EnterBetweenPasses();  // after it: as above
  impl_->CheckRead();
  impl_->Begin(*run, {.plan = plan, .verify = false});
  for (Impl::Prompt& prompt : impl_->prompts) {
    const int32_t first = prompt.first_token;
    const bool stops =
        std::find(stop_token_ids.begin(), stop_token_ids.end(), first) != stop_token_ids.end();
    if (first < 0) {
      run->AddEnded(*prompt.sequence, FinishReason::kError);
    } else if (stops || max_new_tokens == 1) {
      const FinishReason reason = stops ? FinishReason::kStop : FinishReason::kLength;
      run->AddEnded(*prompt.sequence, reason).token_ids = {first};
    } else {
      Request request = run->common;
      request.sampling.max_new_tokens = max_new_tokens - 1;
      request.sampling.stop_token_ids = stop_token_ids;
      run->Add(prompt.Lend(first), std::move(request));
    }
  }
  return std::unique_ptr<Generation>(new Generation(std::move(run)));
}

}  // namespace tidal
