// The front door: checks a call and hands it to Generation.
#include "tidal/decoder.h"

#include <algorithm>
#include <utility>

#include "core/checked.h"
#include "decode/settings.h"
#include "engine/decoder_impl.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// A session that is about to be closed has its pages for a moment.
constexpr double kMaxStuckMs = 1000.0;

void CheckPrompt(const std::vector<int32_t>& prompt, int64_t vocab_size, size_t index) {
  TIDAL_CHECK(!prompt.empty(), InvalidArgument, "prompt ", index,
              ": got no tokens, expected at least one");
  for (int32_t token : prompt) {
    TIDAL_CHECK(token >= 0 && token < vocab_size, InvalidArgument, "prompt ", index,
                ": got token id ", token, ", expected 0 to ", vocab_size - 1);
  }
}

// `count` of the tokens to score, in the setting `name`.
void CheckCount(const char* name, int64_t count, int64_t num_tokens) {
  TIDAL_CHECK(count >= 1 && count <= num_tokens, InvalidArgument, name, ": got ", count,
              ", expected 1 to ", num_tokens);
}

}  // namespace

Decoder::Impl::Impl(const ModelConfig& model, const DecodeConfig& config,
                    const WeightSource& weights, const LoadProgress& progress)
    : runner(model, config, weights, progress),
      own_plan(runner.plan(PlanId::kDecoder)),
      sequences(runner),
      prefixes(runner.pool()),
      scheduler(runner.pool(), config.prefix_cache ? &prefixes : nullptr,
                {.max_rows = runner.config().max_batch_size,
                 .max_pass_tokens = runner.config().prefill_chunk,
                 .max_check_tokens = runner.max_pass_tokens(),
                 .max_seq_len = runner.config().max_seq_len,
                 .max_chunk_ms = config.max_chunk_ms,
                 .decode_share = config.decode_share,
                 .max_host_pages = runner.num_host_pages(),
                 .decodes_cleanly = !runner.quantizes_prompts(),
                 .max_stuck_ms = kMaxStuckMs}) {}

Decoder::Impl::~Impl() {
  desk->Close();
  {
    Lock lock(mutex);
    is_ending = true;
    has_work.notify_all();
  }
  if (loop.joinable()) loop.join();
}

void Decoder::Impl::CheckOpen() const {
  TIDAL_CHECK(!is_closed, InvalidArgument, "decoder: it is closed; create a new Decoder");
  CheckProcessRuns();
}

Decoder::Impl::Lock Decoder::Impl::Enter() const {
  auto lock = EnterToEnd();
  CheckOpen();
  return lock;
}

Decoder::Impl::Lock Decoder::Impl::EnterToEnd() const {
  process.Check("decoder");
  return Lock(mutex);
}

Decoder::Impl::Pause Decoder::Impl::EnterBetweenPasses() const {
  auto pause = PauseToEnd();
  CheckOpen();
  return pause;
}

Decoder::Impl::Pause Decoder::Impl::PauseToEnd() const {
  process.Check("decoder");
  std::unique_lock<FairMutex> device_lock(device);
  return {std::move(device_lock), Lock(mutex)};
}

DecodePolicy Decoder::Impl::PolicyOf(const ActivePlan& plan, bool verifies) const {
  const DecodeConfig& config = runner.config();
  DecodePolicy policy = {.verifies = verifies && CanDraft(config, plan.plan),
                         .drafts = config.drafts,
                         .draft_tokens = config.draft_tokens};
  if (plan.plan.is_dense()) return policy;
  policy.plan = plan.id;
  policy.dense_len = plan.selection.dense_len();
  if (!verifies) policy.correction_interval = plan.config.correction_interval;
  return policy;
}

// A replay keeps all its prompts; what they begin with alike once.
void Decoder::Impl::CheckReplayFits(const std::vector<std::vector<int32_t>>& prompts,
                                    int64_t max_new_tokens) {
  const DecodeConfig& config = runner.config();
  auto count = static_cast<int64_t>(prompts.size());
  TIDAL_CHECK(count <= config.max_batch_size, CapacityError, "batch: need ", count,
              " rows, have max_batch_size ", config.max_batch_size,
              "; raise max_batch_size or send fewer prompts at once");
  int64_t pages = 0;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const auto length = static_cast<int64_t>(prompts[i].size());
    scheduler.CheckCapacity(Concat("prompt ", i), length, max_new_tokens);
    int64_t num_shared = 0;
    for (size_t earlier = 0; earlier < i; ++earlier) {
      num_shared =
          std::max(num_shared, NumCommonPages(prompts[earlier], prompts[i], config.page_size));
    }
    pages += runner.pool().PagesFor(length + max_new_tokens) - num_shared;
  }
  TIDAL_CHECK(pages <= runner.pool().num_free(), CapacityError, "KV cache: need ", pages,
              " pages of ", config.page_size, " tokens for ", count, " sequences, have ",
              runner.pool().num_free(), " free of ", runner.pool().num_pages(),
              "; raise max_seq_len, max_batch_size or num_pages, or send fewer or shorter prompts");
}

Decoder::Decoder(const ModelConfig& model, const DecodeConfig& config, const WeightSource& weights,
                 const LoadProgress& progress)
    : impl_(std::make_shared<Impl>(model, config, weights, progress)) {
  impl_->desk->decoder = impl_;
}

Decoder::~Decoder() {
  if (impl_->process.IsForeign()) Leak(impl_);
}

void Decoder::Close() {
  if (impl_->process.IsForeign()) return;
  auto pause = impl_->PauseToEnd();
  impl_->is_closed = true;
  impl_->desk->Close();
  for (const auto& [id, listener] : impl_->listeners) listener.generation->Wake();
}

std::unique_ptr<Generation> Decoder::Start(const std::vector<std::vector<int32_t>>& prompts,
                                           const std::vector<SamplingParams>& params,
                                           const CallOptions& options) {
  TIDAL_CHECK(!prompts.empty(), InvalidArgument, "prompts: got none, expected at least one");
  TIDAL_CHECK(prompts.size() == params.size(), InvalidArgument, "params: got ", params.size(),
              ", expected one per prompt (", prompts.size(), ")");
  for (size_t i = 0; i < prompts.size(); ++i) {
    CheckPrompt(prompts[i], model().vocab_size, i);
    ValidateSamplingParams(params[i], model().vocab_size);
    impl_->scheduler.CheckCapacity(Concat("prompt ", i), static_cast<int64_t>(prompts[i].size()),
                                   params[i].max_new_tokens);
  }
  auto generation = std::make_unique<Generation::Impl>(impl_);
  if (options.plan) {
    auto pause = impl_->EnterBetweenPasses();
    generation->SetOptions(options);
  }
  auto lock = impl_->Enter();  // after it: what throws lets go of the engine first
  if (!options.plan) generation->SetOptions(options);
  for (size_t i = 0; i < prompts.size(); ++i) {
    Request request = generation->common;
    request.sampling = params[i];
    generation->Add(impl_->sequences.Make(prompts[i], 0, impl_->runner.ScratchSampling()),
                    std::move(request));
  }
  impl_->last_call = generation->record;
  return std::unique_ptr<Generation>(new Generation(std::move(generation)));
}

std::unique_ptr<Generation> Decoder::Score(const std::vector<int32_t>& token_ids,
                                           int64_t num_prefill, int64_t num_logits) {
  const int64_t vocab_size = model().vocab_size;
  CheckPrompt(token_ids, vocab_size, 0);
  const auto length = static_cast<int64_t>(token_ids.size());
  CheckCount("num_prefill", num_prefill, length);
  CheckCount("num_logits", num_logits, length);
  impl_->scheduler.CheckCapacity("token_ids", length, 0);
  const auto num_values = static_cast<size_t>(Product({num_logits, vocab_size}));
  Scoring scoring = {.forced = {token_ids.begin() + num_prefill, token_ids.end()},
                     .num_logits = num_logits,
                     .logits = std::make_shared<std::vector<float>>(num_values)};
  auto generation = std::make_unique<Generation::Impl>(impl_);
  auto lock = impl_->Enter();  // after it: what throws lets go of the engine first
  generation->SetOptions({.verify = false});
  Request request = generation->common;
  request.owner = SequenceOwner::kReplay;
  request.sampling.max_new_tokens = length - num_prefill;
  request.scoring = std::move(scoring);
  generation->Add(impl_->sequences.Make({token_ids.begin(), token_ids.begin() + num_prefill}, 0,
                                        impl_->runner.ScratchSampling()),
                  std::move(request));
  return std::unique_ptr<Generation>(new Generation(std::move(generation)));
}

std::unique_ptr<Replay> Decoder::StartReplay(const std::vector<std::vector<int32_t>>& prompts,
                                             int64_t max_new_tokens) {
  SamplingParams params;
  params.max_new_tokens = max_new_tokens;
  ValidateSamplingParams(params, model().vocab_size);
  for (size_t i = 0; i < prompts.size(); ++i) CheckPrompt(prompts[i], model().vocab_size, i);
  auto lock = impl_->Enter();
  impl_->CheckReplayFits(prompts, max_new_tokens);
  auto replay = std::make_shared<Replay::Impl>(impl_, prompts, max_new_tokens);
  return std::unique_ptr<Replay>(new Replay(std::move(replay)));
}

std::unique_ptr<Session> Decoder::StartSession(int64_t max_seq_len) {
  TIDAL_CHECK(max_seq_len >= 0, InvalidArgument, "max_seq_len: got ", max_seq_len,
              ", expected >= 0 (0 = the decoder's)");
  TIDAL_CHECK(max_seq_len <= config().max_seq_len, CapacityError, "max_seq_len: got ", max_seq_len,
              ", expected at most the decoder's ", config().max_seq_len, "; raise that");
  if (max_seq_len == 0) max_seq_len = config().max_seq_len;
  auto lock = impl_->Enter();
  Sequence sequence = impl_->sequences.MakeEmpty(max_seq_len);
  auto session = std::make_shared<Session::Impl>(impl_, std::move(sequence), max_seq_len);
  return std::unique_ptr<Session>(new Session(std::move(session)));
}

std::vector<LayerSelection> Decoder::Selection(int64_t sequence) const {
  auto pause = impl_->EnterBetweenPasses();
  const std::shared_ptr<SelectionRecord>& record = impl_->last_call;
  auto count = record ? static_cast<int64_t>(record->running.size()) : 0;
  TIDAL_CHECK(sequence >= 0 && sequence < count, InvalidArgument, "sequence: got ", sequence,
              ", expected an index into the ", count, " prompts of the last call");
  return record->Read(impl_->runner, sequence);
}

const ModelConfig& Decoder::model() const {
  return impl_->runner.model();
}
const DecodeConfig& Decoder::config() const {
  return impl_->runner.config();
}
const DecodePlan& Decoder::plan() const {
  return impl_->own_plan.plan;
}
const MemoryPlan& Decoder::memory_plan() const {
  return impl_->runner.memory_plan();
}

std::unique_ptr<Inbox> Decoder::OpenInbox(int event_fd) {
  auto inbox = std::make_shared<Inbox::Impl>(impl_, event_fd);
  return std::unique_ptr<Inbox>(new Inbox(std::move(inbox)));
}

std::shared_ptr<GuideDesk> Decoder::guide_desk() const {
  return std::make_shared<GuideDesk>(impl_->desk);
}

void EndAllCalls() {
  EndProcess();
}

int64_t Decoder::num_free_pages() const {
  auto lock = impl_->Enter();
  return impl_->runner.pool().num_free();
}

DecoderStats Decoder::stats() const {
  auto lock = impl_->Enter();
  return impl_->scheduler.stats();
}

int64_t Decoder::num_free_rows() const {
  auto lock = impl_->Enter();
  const DecoderStats stats = impl_->scheduler.stats();
  return config().max_batch_size - stats.num_reading - stats.num_decoding;
}

}  // namespace tidal
