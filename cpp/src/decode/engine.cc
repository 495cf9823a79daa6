#include "decode/engine.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "core/noise.h"
#include "core/process.h"
#include "decode/memory_plan.h"
#include "decode/prefill.h"
#include "model/model_config.h"
#include "model/rope.h"
#include "tidal/error.h"

namespace tidal {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

void CheckAtLeast(const char* field, int64_t value, int64_t least) {
  TIDAL_CHECK(value >= least, InvalidArgument, field, ": got ", value, ", expected >= ", least);
}

void CheckAtMost(const char* field, int64_t value, int64_t most) {
  TIDAL_CHECK(value <= most, InvalidArgument, field, ": got ", value, ", expected <= ", most);
}

void ValidatePlanConfig(const PlanConfig& c) {
  if (c.token_budget != kAutomatic) CheckAtLeast("token_budget", c.token_budget, 1);
  CheckAtLeast("min_token_budget", c.min_token_budget, 0);
  TIDAL_CHECK(c.top_p_mass > 0.0 && c.top_p_mass <= 1.0, InvalidArgument, "top_p_mass: got ",
              c.top_p_mass, ", expected in (0, 1]");
  CheckAtLeast("sink_tokens", c.sink_tokens, 0);
  if (c.recent_tokens != kAutomatic) CheckAtLeast("recent_tokens", c.recent_tokens, 1);
  CheckAtLeast("sparse_min_context", c.sparse_min_context, kAutomatic);
  CheckAtLeast("correction_interval", c.correction_interval, 0);
  int64_t budget = c.token_budget == kAutomatic ? kAutomaticBudget : c.token_budget;
  int64_t least_recent = c.recent_tokens == kAutomatic ? 1 : c.recent_tokens;
  TIDAL_CHECK(c.sink_tokens + least_recent <= budget, InvalidArgument, "token_budget: got ", budget,
              ", expected at least sink_tokens ", c.sink_tokens, " + recent_tokens ", least_recent);
  TIDAL_CHECK(c.min_token_budget <= budget, InvalidArgument, "min_token_budget: got ",
              c.min_token_budget, ", expected at most token_budget ", budget);
  bool is_adaptive = c.top_p_mass < 1.0 || c.token_budget == kAutomatic;
  TIDAL_CHECK(!is_adaptive || c.pooling == Pooling::kSum, InvalidArgument,
              "pooling: got \"max\" with an adaptive budget (top_p_mass or token_budget \"auto\"), "
              "expected \"sum\": the mass of a set is a sum over its heads");
  TIDAL_CHECK(c.shadow == Shadow::kNone || !c.scored_layers.empty(), InvalidArgument,
              "shadow: got \"int4\" without scored_layers, expected some: no other layer reads it");
}

void ValidateDecodeConfig(const DecodeConfig& c) {
  ValidatePlanConfig(c);
  CheckAtLeast("draft_tokens", c.draft_tokens, 0);
  CheckAtLeast("max_seq_len", c.max_seq_len, 0);
  CheckAtLeast("max_batch_size", c.max_batch_size, 1);
  CheckAtLeast("page_size", c.page_size, 1);
  CheckAtLeast("num_pages", c.num_pages, 0);
  CheckAtLeast("prefill_chunk", c.prefill_chunk, 0);
  CheckAtLeast("num_threads", c.num_threads, 0);
  // Positions, rows and page ids are 32-bit on the device.
  CheckAtMost("sink_tokens", c.sink_tokens, kMaxInt32);
  CheckAtMost("recent_tokens", c.recent_tokens, kMaxInt32);
  CheckAtMost("max_seq_len", c.max_seq_len, kMaxInt32);
  CheckAtMost("max_batch_size", c.max_batch_size, kMaxInt32);
  CheckAtMost("page_size", c.page_size, kMaxInt32);
  CheckAtMost("num_pages", c.num_pages, kMaxInt32);
  CheckAtMost("prefill_chunk", c.prefill_chunk, kMaxInt32);
  TIDAL_CHECK(c.gpu_memory_utilization > 0.0 && c.gpu_memory_utilization <= 1.0, InvalidArgument,
              "gpu_memory_utilization: got ", c.gpu_memory_utilization, ", expected in (0, 1]");
  TIDAL_CHECK(c.draft_tokens <= kMaxDraftTokens, InvalidArgument, "draft_tokens: got ",
              c.draft_tokens, ", expected at most ", kMaxDraftTokens);
  TIDAL_CHECK(!c.verify || c.correction_interval == 0, InvalidArgument, "correction_interval: got ",
              c.correction_interval,
              " together with verify, expected 0: checking drafts rewrites their K and V already");
}

BackendOptions OptionsOf(const DecodeConfig& config) {
  return {.device = config.device,
          .num_threads = config.num_threads,
          .cuda_graphs = config.cuda_graphs};
}

DecodePlan MakeDecodePlan(const ModelConfig& model, const PlanConfig& config) {
  if (config.select_layers.empty() && config.scored_layers.empty()) {
    return DecodePlan::Dense(model.num_layers);
  }
  return DecodePlan::Tidal(model.num_layers, config.full_layers, config.select_layers,
                           config.scored_layers);
}

// True if a row's next step attends to more than `length` tokens.
bool AnyLonger(std::span<Sequence* const> rows, int64_t length) {
  return std::any_of(rows.begin(), rows.end(),
                     [&](const Sequence* row) { return row->cached + 1 > length; });
}

// Tokens and rows of nobody.
void UploadIdle(Backend& backend, const Pass& pass) {
  auto t = static_cast<size_t>(pass.token_ids.dim(0));
  std::vector<int32_t> inputs(static_cast<size_t>(pass.inputs.numel()), 0);
  std::fill_n(inputs.begin() + static_cast<std::ptrdiff_t>(t), t, -1);  // positions
  backend.Upload(pass.inputs, inputs.data());
}

}  // namespace

Engine::Engine(const ModelConfig& model, const DecodeConfig& config, const WeightSource& weights,
               const Decoder::LoadProgress& progress)
    : model_((ValidateModelConfig(model), model)),
      config_((ValidateDecodeConfig(config), config)),
      plan_(MakeDecodePlan(model, config)),
      dense_plan_(DecodePlan::Dense(model.num_layers)),
      backend_(MakeBackend(OptionsOf(config))) {
  ResolvedSettings resolved = ResolveSettings(*backend_, model_, config_, plan_);
  TIDAL_CHECK(resolved.memory.problem.empty(), OutOfMemoryError, resolved.memory.problem);
  config_ = resolved.config;
  memory_plan_ = std::move(resolved.memory);

  weights_ = LoadWeights(*backend_, model_, config_.dtype, weights, progress);
  backend_->Reserve(LimitsFor(*backend_, model_, config_, plan_));
  buffers_ = std::make_unique<EngineBuffers>(*backend_, model_, config_, plan_);
  cache_ = std::make_unique<PagedKvCache>(*backend_, model_, config_.kv_dtype, config_.num_pages,
                                          config_.page_size);
  transformer_ =
      std::make_unique<Transformer>(*backend_, model_, weights_, *cache_,
                                    ComputeRope(model_, config_.max_seq_len).attention_scaling);
  shadow_ = MakeShadow(PlanId::kDecoder, plan_, config_);
  Warm();
}

// A device that records its steps does so now, with idle rows: it takes memory for each, and for
// the code of its kernels when they first run.
void Engine::Warm() {
  std::vector<StepKey> keys = RecordedSteps(*backend_, config_, plan_);
  if (keys.empty()) return;
  Pass chunk = buffers_->prefill.Take(config_.prefill_chunk, 1);
  UploadIdle(*backend_, chunk);
  std::vector<int32_t> no_queries = {0, 0};
  backend_->Upload(buffers_->q_starts, no_queries.data());
  PrefillChunk(*backend_, *transformer_,
               {.q_starts = buffers_->q_starts,
                .max_q_len = config_.prefill_chunk,
                .max_seq_len = config_.max_seq_len},
               chunk);
  for (const StepKey& key : keys) {
    if (key.tokens_per_row > 1) {
      buffers_->verifier->Warm(*transformer_, key.batch_size, key.tokens_per_row);
      continue;
    }
    Pass pass = buffers_->step.Take(key.batch_size, key.batch_size);
    UploadIdle(*backend_, pass);
    buffers_->sampler.SetRows(std::vector(static_cast<size_t>(key.batch_size), ScratchSampling()));
    for (int run = 0; run < 2; ++run) RunPass(key, OwnAttention(), pass);
  }
  buffers_->sampler.Read(1);  // a device that fails says so now
}

Sequence Engine::MakeSequence(std::vector<int32_t> prompt, int64_t max_len,
                              const SamplingRow& sampling) {
  auto prompt_len = static_cast<int64_t>(prompt.size());
  return {.id = next_sequence_id_++,
          .tokens = std::move(prompt),
          .dense_len = prompt_len,
          .cached = 0,
          .num_sparse = 0,
          .pages = SequencePages(pool(), max_len),
          .inv_freq = ComputeRope(model_, prompt_len).inv_freq,
          .sampling = sampling};
}

Sequence Engine::MakeEmptySequence(int64_t max_len) {
  return {.id = next_sequence_id_++,
          .tokens = {},
          .dense_len = 0,
          .cached = 0,
          .num_sparse = 0,
          .pages = SequencePages(pool(), 0),
          .inv_freq = ComputeRope(model_, max_len).inv_freq,
          .sampling = ScratchSampling()};
}

Sequence Engine::Fork(const Sequence& sequence) {
  return {.id = next_sequence_id_++,
          .tokens = sequence.tokens,
          .dense_len = sequence.dense_len,
          .cached = sequence.cached,
          .num_sparse = sequence.num_sparse,
          .clean_len = sequence.clean_len,
          .shadow_plan = sequence.shadow_plan,
          .shadowed = sequence.shadowed,
          .pages = sequence.pages.Share(sequence.cached),
          .inv_freq = sequence.inv_freq,
          .sampling = sequence.sampling};
}

void Engine::OwnPages(Sequence& sequence, int64_t num_tokens, int64_t first) {
  std::vector<PageCopy> copies = sequence.pages.Own(num_tokens, first, sequence.cached);
  cache_->Copy(*backend_, copies);
  if (shadow_) shadow_->Copy(*backend_, copies);
  sequence.id = next_sequence_id_++;
}

void Engine::FillCache(const std::vector<Sequence>& sequences, uint64_t seed) {
  std::optional<Noise> noise;  // drawn only if needed
  for (const Sequence& sequence : sequences) {
    const std::vector<int32_t>& pages = sequence.pages.pages();
    if (cache_->IsFilled(pages)) continue;
    if (!noise) noise.emplace(config_.kv_dtype, Normal{}, seed);
    cache_->Fill(*backend_, pages, *noise);
  }
}

SamplingRow Engine::ScratchSampling() const {
  return MakeSamplingRow(SamplingParams{}, buffers_->seen.scratch_slot());
}

void Engine::MarkSeen(const Sequence& sequence, int64_t num_tokens) {
  if (sequence.sampling.repetition_penalty == 1.0f) return;
  buffers_->seen.Set(sequence.sampling.slot,
                     std::span(sequence.tokens).first(static_cast<size_t>(num_tokens)));
}

int64_t Engine::PrefillNext(Sequence& sequence) {
  return CacheDensely(sequence, sequence.dense_len);
}

void Engine::CorrectCache(Sequence& sequence, int64_t interval) {
  if (interval == 0 || sequence.num_sparse < interval) return;
  int64_t end = sequence.cached;
  sequence.cached -= sequence.num_sparse;
  while (sequence.cached < end) CacheDensely(sequence, end);
  sequence.num_sparse = 0;
}

int64_t Engine::CacheDensely(Sequence& sequence, int64_t end) {
  CheckProcessRuns();
  int64_t begin = sequence.cached;
  sequence.shadowed = std::min(sequence.shadowed, begin);
  int64_t count = std::min(config_.prefill_chunk, end - begin);
  int64_t seq_len = begin + count;
  Pass pass = buffers_->prefill.Take(count, 1);

  UploadChunk(*backend_, sequence, begin, seq_len, buffers_->q_starts, pass);
  PrefillChunk(*backend_, *transformer_,
               {.q_starts = buffers_->q_starts, .max_q_len = count, .max_seq_len = seq_len}, pass);
  sequence.cached = seq_len;
  return count;
}

int32_t Engine::SampleAfterPrefill(const Sequence& sequence, int64_t chunk_len) {
  Pass pass = buffers_->prefill.Take(chunk_len, 1);
  Pass row = buffers_->step.Take(1, 1);
  auto last = static_cast<int32_t>(chunk_len - 1);
  backend_->Upload(buffers_->gather_rows.Rows(0, 1), &last);
  backend_->GatherRows({.x = pass.hidden,
                        .rows = buffers_->gather_rows.Rows(0, 1),
                        .out = buffers_->gathered.Rows(0, 1)});
  transformer_->Logits(buffers_->gathered.Rows(0, 1), row.normed, buffers_->sampler.logits(1));
  buffers_->sampler.SetRows({sequence.sampling});
  step_rows_.clear();  // the first row's parameters were just replaced
  buffers_->sampler.Sample(pass.seq_lens);
  return buffers_->sampler.Read(1)[0];
}

void Engine::AppendPrefillLogits(const Sequence& sequence, int64_t chunk_len, int64_t first,
                                 int64_t last, std::vector<float>& out) {
  int64_t chunk_begin = sequence.cached - chunk_len;
  TensorView hidden = buffers_->prefill.Take(chunk_len, 1).hidden;
  for (int64_t begin = std::max(first, chunk_begin); begin < std::min(last, sequence.cached);) {
    int64_t count = std::min({config_.max_batch_size, last - begin, sequence.cached - begin});
    std::vector<int32_t> rows(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      rows[static_cast<size_t>(i)] = static_cast<int32_t>(begin - chunk_begin + i);
    }
    TensorView gathered = buffers_->gathered.Rows(0, count);
    backend_->Upload(buffers_->gather_rows.Rows(0, count), rows.data());
    backend_->GatherRows(
        {.x = hidden, .rows = buffers_->gather_rows.Rows(0, count), .out = gathered});
    transformer_->Logits(gathered, buffers_->step.Take(count, count).normed,
                         buffers_->sampler.logits(count));
    size_t size = out.size();
    out.resize(size + static_cast<size_t>(count * model_.vocab_size));
    backend_->Download(out.data() + size, buffers_->sampler.logits(count));
    begin += count;
  }
}

// What stays the same while the same sequences step together.
void Engine::UploadRows(std::span<Sequence* const> rows, const Pass& pass) {
  std::vector<uint64_t> ids;
  for (const Sequence* sequence : rows) ids.push_back(sequence->id);
  if (ids == step_rows_) return;

  auto b = static_cast<size_t>(pass.seq_lens.dim(0));
  std::vector<int32_t> seq_idx(b);
  std::vector<SamplingRow> sampling(b, ScratchSampling());
  for (size_t i = 0; i < b; ++i) seq_idx[i] = static_cast<int32_t>(i);
  for (size_t i = 0; i < rows.size(); ++i) sampling[i] = rows[i]->sampling;
  backend_->Upload(pass.seq_idx, seq_idx.data());
  UploadSequences(*backend_, rows, pass);
  buffers_->sampler.SetRows(sampling);
  step_rows_ = std::move(ids);
}

void Engine::UploadTokens(std::span<Sequence* const> rows, const Pass& pass) {
  auto b = static_cast<size_t>(pass.seq_lens.dim(0));
  std::vector<int32_t> inputs(3 * b, 0);  // token_ids, positions, seq_lens
  std::fill_n(inputs.begin() + static_cast<std::ptrdiff_t>(b), b, -1);
  for (size_t i = 0; i < rows.size(); ++i) {
    auto cached = static_cast<size_t>(rows[i]->cached);
    inputs[i] = rows[i]->tokens[cached];
    inputs[b + i] = static_cast<int32_t>(cached);
    inputs[2 * b + i] = static_cast<int32_t>(cached + 1);
  }
  backend_->Upload(pass.inputs, inputs.data());
}

bool Engine::IsSparse(const Sequence& sequence) const {
  return !plan_.is_dense() && sequence.cached + 1 > buffers_->selection.dense_len();
}

std::vector<int32_t> Engine::Step(std::span<Sequence* const> rows, StepPlan plan) {
  bool may_be_sparse = plan == StepPlan::kDecoder && !plan_.is_dense();
  bool sparse = may_be_sparse && AnyLonger(rows, buffers_->selection.dense_len());
  std::vector<int32_t> next = RunStep(rows, OwnAttention(), sparse);
  if (!sparse) return next;
  CountSparse(rows, buffers_->selection);
  last_sparse_rows_.clear();
  for (const Sequence* row : rows) last_sparse_rows_.push_back({row->id, row->cached});
  return next;
}

std::vector<int32_t> Engine::StepThrough(OtherPlan& other, std::span<Sequence* const> rows) {
  for (Sequence* row : rows) CorrectCache(*row, other.correction_interval);
  bool sparse = !other.plan.is_dense() && AnyLonger(rows, other.selection.dense_len());
  std::vector<int32_t> next =
      RunStep(rows, {other.plan, other.selection, other.shadow.get()}, sparse);
  if (!sparse) return next;
  CountSparse(rows, other.selection);
  auto num_rows = static_cast<int64_t>(rows.size());
  other.num_sets += other.selection.CountSets(num_rows);
  other.num_positions += other.selection.CountPositions(*backend_, num_rows);
  return next;
}

// In a batch with longer rows a short one is decoded densely.
void Engine::CountSparse(std::span<Sequence* const> rows, const Selection& selection) {
  for (Sequence* row : rows) {
    if (row->cached > selection.dense_len()) ++row->num_sparse;
  }
}

std::unique_ptr<OtherPlan> Engine::MakePlan(const PlanConfig& asked) {
  ValidatePlanConfig(asked);
  DecodeConfig settings = config_;
  static_cast<PlanConfig&>(settings) = asked;
  ResolvePlanSettings(*backend_, config_.max_seq_len, settings);
  DecodePlan plan = MakeDecodePlan(model_, settings);
  const PlanId id = next_plan_;
  next_plan_ = PlanId{static_cast<int64_t>(id) + 1};
  settings.verify = false;
  StepLimits limits = LimitsFor(*backend_, model_, settings, plan);
  limits.tokens_per_row = TokensPerRow(config_, plan_);
  backend_->Reserve(limits);
  return std::unique_ptr<OtherPlan>(
      new OtherPlan{.plan = plan,
                    .selection = Selection(*backend_, model_, settings, plan),
                    .shadow = MakeShadow(id, plan, settings),
                    .correction_interval = settings.correction_interval});
}

// Without sparse the dense plan, whatever `plan` says.
std::vector<int32_t> Engine::RunStep(std::span<Sequence* const> rows, const StepAttention& how,
                                     bool sparse) {
  CheckProcessRuns();
  bool writes_shadow = sparse && how.shadow != nullptr;
  if (writes_shadow) FillShadow(*how.shadow, rows);
  int64_t b =
      StepSize(config_.device.type, static_cast<int64_t>(rows.size()), config_.max_batch_size);
  Pass pass = buffers_->step.Take(b, b);
  UploadRows(rows, pass);
  UploadTokens(rows, pass);

  RunPass({.batch_size = b, .sparse = sparse, .tokens_per_row = 1}, how, pass);

  for (Sequence* row : rows) {
    row->shadowed = writes_shadow ? row->cached + 1 : std::min(row->shadowed, row->cached);
    ++row->cached;
  }
  std::vector<int32_t> next = buffers_->sampler.Read(b);
  next.resize(rows.size());
  return next;
}

void Engine::RunPass(const StepKey& key, const StepAttention& how, const Pass& pass) {
  const DecodePlan& plan = key.sparse ? how.plan : dense_plan_;
  backend_->RunStep(key, [&] {
    DecodeStep(*backend_, *transformer_, {plan, how.selection, how.shadow}, buffers_->sampler,
               pass);
  });
}

std::vector<std::vector<int32_t>> Engine::Verify(std::span<Sequence* const> rows) {
  CheckProcessRuns();
  for (Sequence* row : rows) row->shadowed = std::min(row->shadowed, row->cached);
  return buffers_->verifier->Run(*transformer_, rows);
}

void Engine::AppendStepLogits(int64_t row, std::vector<float>& out) {
  size_t size = out.size();
  out.resize(size + static_cast<size_t>(model_.vocab_size));
  backend_->Download(out.data() + size,
                     buffers_->sampler.logits(config_.max_batch_size).Rows(row, 1));
}

std::vector<LayerSelection> Engine::ReadSelection(uint64_t sequence_id) const {
  for (size_t i = 0; i < last_sparse_rows_.size(); ++i) {
    const SparseRow& row = last_sparse_rows_[i];
    if (row.id != sequence_id || row.seq_len <= buffers_->selection.dense_len()) continue;
    return buffers_->selection.Read(*backend_, static_cast<int64_t>(i));
  }
  return {};
}

MemoryPlan PlanMemory(const ModelConfig& model, const DecodeConfig& config) {
  ValidateModelConfig(model);
  ValidateDecodeConfig(config);
  std::unique_ptr<Backend> backend = MakeBackend(OptionsOf(config));
  return ResolveSettings(*backend, model, config, MakeDecodePlan(model, config)).memory;
}

}  // namespace tidal
