#include "decode/model_runner.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "core/noise.h"
#include "core/process.h"
#include "decode/chunk_pass.h"
#include "decode/decode_step.h"
#include "decode/memory_plan.h"
#include "decode/settings.h"
#include "model/model_config.h"
#include "model/rope.h"
#include "tidal/error.h"

namespace tidal {
namespace {

std::vector<PassRow> RowsOf(const Batch& batch) {
  std::vector<PassRow> rows;
  rows.reserve(batch.rows.size());
  for (const BatchRow& row : batch.rows) {
    rows.push_back({row.sequence, row.sequence->cached, row.num_tokens});
  }
  return rows;
}

// Returns the most tokens of a row.
int64_t LargestShare(const Batch& batch) {
  int64_t most = 0;
  for (const BatchRow& row : batch.rows) most = std::max(most, row.num_tokens);
  return most;
}

Drawn NothingDrawn(const Batch& batch) {
  return {.tokens = std::vector<std::vector<int32_t>>(batch.rows.size()),
          .logprobs = std::vector<std::vector<TokenLogprobs>>(batch.rows.size()),
          .scored = std::vector<std::vector<TokenLogprobs>>(batch.rows.size()),
          .sets = std::vector<ChosenSets>(batch.rows.size())};
}

// Returns the draws of a step of num_rows rows; those past the batch's are idle.
std::vector<DrawRow> StepDraws(const Batch& batch, int64_t num_rows) {
  std::vector<DrawRow> draws(static_cast<size_t>(num_rows));
  for (size_t i = 0; i < batch.rows.size(); ++i) {
    const BatchRow& row = batch.rows[i];
    draws[i] = {.row = &row,
                .index = 0,
                .keeps_logits = row.num_logits > 0 || row.num_logprobs.has_value()};
  }
  return draws;
}

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

// The same settings but for the layers: none that chooses.
DecodeConfig WithoutChoice(DecodeConfig config) {
  config.select_layers.clear();
  config.scored_layers.clear();
  config.shadow = Shadow::kNone;
  return config;
}

// The K and V of `count` more tokens are in the cache, as reading them leaves them or in another
// way.
void Advance(Sequence& sequence, int64_t count, bool is_clean) {
  const int64_t begin = sequence.cached;
  sequence.cached += count;
  sequence.shadowed = std::min(sequence.shadowed, begin);
  if (!is_clean) {
    sequence.clean_len = std::min(sequence.clean_len, begin);
  } else if (sequence.clean_len >= begin) {
    sequence.clean_len = sequence.cached;
  }
}

}  // namespace

ModelRunner::ModelRunner(const ModelConfig& model, const DecodeConfig& config,
                         const WeightSource& weights, const LoadProgress& progress)
    : model_((ValidateModelConfig(model), model)),
      config_((ValidateDecodeConfig(config), config)),
      plan_(MakeDecodePlan(model, config)),
      backend_(MakeBackend(OptionsOf(config))) {
  const WeightMemory memory = MeasureWeights(*backend_, model_, config_.dtype, weights);
  ResolvedSettings resolved = ResolveSettings(*backend_, model_, config_, plan_, memory);
  TIDAL_CHECK(resolved.memory.problem.empty(), OutOfMemoryError, resolved.memory.problem);
  config_ = resolved.config;
  memory_plan_ = std::move(resolved.memory);

  weights_ = LoadWeights(*backend_, model_, config_.dtype, weights, progress);
  StepLimits limits = LimitsFor(*backend_, model_, config_, plan_);
  limits.decoded_bytes = memory.decoded_bytes;
  limits.quantized_inputs = memory.quantized_inputs;
  backend_->Reserve(limits);
  buffers_ = std::make_unique<RunnerBuffers>(*backend_, model_, config_, plan_);
  buffers_->passes.WriteConstants(*backend_, model_);
  cache_ = std::make_unique<PagedKvCache>(*backend_, model_, config_.kv_dtype, config_.num_pages,
                                          config_.page_size);
  host_pages_ = std::make_unique<HostPages>(
      *cache_, static_cast<int64_t>(config_.host_kv_gib * kGiB) /
                   PagedKvCache::BytesPerPage(model_, config_.kv_dtype, config_.page_size));
  transformer_ =
      std::make_unique<Transformer>(*backend_, model_, weights_, *cache_,
                                    ComputeRope(model_, config_.max_seq_len).attention_scaling);
  plans_.emplace(PlanId::kDense, MakePlan(PlanId::kDense, WithoutChoice(config_)));
  plans_.emplace(PlanId::kDecoder, MakePlan(PlanId::kDecoder, config_));
  Warm();
}

// A device that records its steps does so now, with idle rows: it takes memory for each, and for
// the code of its kernels when they first run.
void ModelRunner::Warm() {
  std::vector<StepKey> keys = RecordedSteps(*backend_, config_, plan_);
  if (keys.empty()) return;
  Pass pass = buffers_->passes.Take({config_.prefill_chunk, 1});
  pass.max_q_len = config_.prefill_chunk;
  pass.max_seq_len = config_.max_seq_len;
  pass.quantizes_inputs = quantizes_prompts();
  buffers_->inputs.Write({}, pass);
  RunChunkPass(pass, 0);
  for (const StepKey& key : keys) WarmStep(key);
  buffers_->sampler.Read(1);  // a device that fails says so now
}

void ModelRunner::WarmStep(const StepKey& key) {
  if (key.tokens_per_row > 1) {
    Pass pass = TakeCheck(key.batch_size, key.tokens_per_row);
    buffers_->inputs.Write({}, pass);
    buffers_->outputs.Write({}, {}, pass.token_ids.dim(0));
    for (int run = 0; run < 2; ++run) RunCheckPass(pass);
    return;
  }
  Pass pass = buffers_->passes.Take({key.batch_size, key.batch_size});
  buffers_->inputs.Write({}, pass);
  buffers_->sampler.SetRows(StepDraws({}, key.batch_size));
  for (int run = 0; run < 2; ++run) RunStepPass(plan(key.plan), pass);
}

bool ModelRunner::verifies() const {
  return Verifies(config_, plan_);
}

void ModelRunner::CopyPages(const std::vector<PageCopy>& copies) {
  cache_->Copy(*backend_, copies);
  for (const auto& [id, active] : plans_) {
    if (active->shadow) active->shadow->Copy(*backend_, copies);
  }
}

void ModelRunner::FillCache(const std::vector<Sequence>& sequences, uint64_t seed) {
  std::optional<Noise> noise;  // drawn only if needed
  for (const Sequence& sequence : sequences) {
    const std::vector<int32_t>& pages = sequence.pages.pages();
    if (cache_->IsFilled(pages)) continue;
    if (!noise) noise.emplace(config_.kv_dtype, Normal{}, seed);
    cache_->Fill(*backend_, pages, *noise);
  }
}

// --- passes ---

Drawn ModelRunner::Run(const Batch& batch, const Meanwhile& meanwhile) {
  CheckProcessRuns();
  CheckBatch(batch);
  CheckFits(batch);
  host_pages_->Save(*backend_, batch.saves);
  host_pages_->Restore(*backend_, batch.restores);
  CopyPages(batch.copies);
  if (batch.rows.empty()) return {};
  PrepareDraws(batch);
  const bool is_step = batch.is_step() && !ReadsPrompts(batch);
  Drawn drawn = is_step ? RunStep(batch, meanwhile) : RunChunk(batch, meanwhile);
  FinishDraws(batch, drawn);
  return drawn;
}

bool ModelRunner::ReadsPrompts(const Batch& batch) const {
  if (batch.is_reading && quantizes_prompts()) return true;
  if (!config_.batch_invariant || config_.device.type == DeviceType::kCpu) return false;
  return batch.plan == PlanId::kDense &&
         std::any_of(batch.rows.begin(), batch.rows.end(),
                     [](const BatchRow& row) { return !row.sequence->prefilled(); });
}

void ModelRunner::PrepareDraws(const Batch& batch) {
  for (const BatchRow& row : batch.rows) {
    if (row.num_draws == 0) continue;
    const int64_t length = row.sequence->cached + row.num_tokens;
    buffers_->slots.Prepare(*row.sequence, length - row.num_draws + 1);
  }
}

void ModelRunner::FinishDraws(const Batch& batch, const Drawn& drawn) {
  for (size_t i = 0; i < batch.rows.size(); ++i) {
    if (batch.rows[i].num_draws == 0) continue;
    buffers_->slots.MarkDrawn(*batch.rows[i].sequence, drawn.tokens[i]);
  }
}

void ModelRunner::CheckFits(const Batch& batch) const {
  const PassSize& most = buffers_->passes.largest();
  const auto num_rows = static_cast<int64_t>(batch.rows.size());
  TIDAL_CHECK(num_rows <= most.batch_size, CapacityError, "batch: got ", num_rows,
              " rows, have max_batch_size ", most.batch_size);
  TIDAL_CHECK(plans_.contains(batch.plan), InvalidArgument, "batch: got plan ",
              static_cast<int64_t>(batch.plan), ", which is none of the engine's, or has gone");
  int64_t num_tokens = 0;
  for (size_t i = 0; i < batch.rows.size(); ++i) {
    const BatchRow& row = batch.rows[i];
    num_tokens += row.num_tokens;
    const int64_t length = row.sequence->cached + row.num_tokens;
    const auto num_pages = static_cast<int64_t>(row.sequence->pages.pages().size());
    TIDAL_CHECK(length <= num_pages * config_.page_size, CapacityError, "batch row ", i,
                ": its tokens need ", cache_->pool().PagesFor(length), " pages, it has ",
                num_pages);
    const auto num_words = static_cast<int64_t>(row.allowed.size());
    const int64_t num_asked = row.num_draws * NumMaskWords(model_.vocab_size);
    TIDAL_CHECK(num_words == 0 || num_words == num_asked, InvalidArgument, "batch row ", i,
                ": got ", num_words, " words of masks, expected ", num_asked);
  }
  TIDAL_CHECK(num_tokens <= most.num_tokens, CapacityError, "batch: got ", num_tokens,
              " tokens, a pass has room for ", most.num_tokens);
}

// The CPU's passes are over when they have been launched.
void ModelRunner::Launch(const std::function<void()>& pass, const Meanwhile& meanwhile) const {
  const bool is_over_then = config_.device.type == DeviceType::kCpu;
  if (is_over_then) meanwhile();
  pass();
  if (!is_over_then) meanwhile();
}

// --- decode steps ---

Drawn ModelRunner::RunStep(const Batch& batch, const Meanwhile& meanwhile) {
  ActivePlan& asked = *plans_.at(batch.plan);
  Drawn drawn = NothingDrawn(batch);
  const bool is_sparse =
      std::any_of(batch.rows.begin(), batch.rows.end(),
                  [&](const BatchRow& row) { return asked.IsSparse(row.sequence->cached + 1); });
  ActivePlan& plan = is_sparse ? asked : *plans_.at(PlanId::kDense);
  if (plan.shadow) FillShadow(*plan.shadow, batch.rows);

  const auto count = static_cast<int64_t>(batch.rows.size());
  const int64_t b = StepSize(config_.device.type, count, config_.max_batch_size);
  Pass pass = buffers_->passes.Take({b, b});
  buffers_->inputs.Write(RowsOf(batch), pass);
  buffers_->sampler.SetRows(StepDraws(batch, b));
  Launch([&] { RunStepPass(plan, pass); }, meanwhile);
  TakeStep(batch, drawn);
  if (is_sparse) TakeSets(batch, plan, drawn);

  if (is_sparse) plan.last_rows.clear();
  for (const BatchRow& row : batch.rows) {
    Sequence& sequence = *row.sequence;
    const bool is_sparse_row = plan.IsSparse(sequence.cached + 1);
    if (is_sparse_row) ++sequence.num_sparse;
    Advance(sequence, 1, !is_sparse_row && !quantizes_prompts());
    if (plan.shadow) sequence.shadowed = sequence.cached;
    if (is_sparse) plan.last_rows.push_back({sequence.id, sequence.cached});
  }
  return drawn;
}

void ModelRunner::TakeStep(const Batch& batch, Drawn& drawn) const {
  const std::vector<int32_t> tokens =
      buffers_->sampler.Read(static_cast<int64_t>(batch.rows.size()));
  std::vector<LogprobsWanted> wanted;
  std::vector<std::vector<TokenLogprobs>*> places;
  for (size_t i = 0; i < batch.rows.size(); ++i) {
    const BatchRow& row = batch.rows[i];
    const auto index = static_cast<int64_t>(i);
    drawn.tokens[i] = {tokens[i]};
    if (row.num_logits > 0) buffers_->sampler.ReadLogits(index, 1, row.logits);
    if (!row.num_logprobs) continue;
    wanted.push_back({.row = index, .token_id = tokens[i], .num_top = *row.num_logprobs});
    places.push_back(&drawn.logprobs[i]);
    if (row.num_scored == 0) continue;
    wanted.push_back(wanted.back());
    wanted.back().token_id = row.sequence->tokens[static_cast<size_t>(row.sequence->cached + 1)];
    places.push_back(&drawn.scored[i]);
  }
  std::vector<TokenLogprobs> logprobs = buffers_->sampler.ReadLogprobs(wanted);
  for (size_t i = 0; i < places.size(); ++i) places[i]->push_back(std::move(logprobs[i]));
}

void ModelRunner::TakeSets(const Batch& batch, const ActivePlan& plan, Drawn& drawn) const {
  auto counts = [&](const BatchRow& row) {
    return row.counts_sets && plan.IsSparse(row.sequence->cached + 1);
  };
  if (std::none_of(batch.rows.begin(), batch.rows.end(), counts)) return;
  const std::vector<ChosenSets> sets =
      plan.selection.CountSets(*backend_, static_cast<int64_t>(batch.rows.size()));
  for (size_t i = 0; i < sets.size(); ++i) {
    if (counts(batch.rows[i])) drawn.sets[i] = sets[i];
  }
}

void ModelRunner::RunStepPass(const ActivePlan& plan, const Pass& pass) {
  backend_->RunStep({.batch_size = pass.seq_lens.dim(0), .plan = plan.id}, [&] {
    DecodeStep(*backend_, *transformer_, plan.attention(), buffers_->sampler, pass);
  });
}

// --- chunk passes ---

bool ModelRunner::IsCheck(const Batch& batch) const {
  if (config_.device.type == DeviceType::kCpu || ReadsPrompts(batch)) return false;
  const int64_t most = TokensPerRow(config_, plan_);
  return std::all_of(batch.rows.begin(), batch.rows.end(), [&](const BatchRow& row) {
    return row.num_draws == row.num_tokens && row.num_tokens <= most;
  });
}

// A recording fixes the host's bounds (on CUDA max_q_len is the number of query tiles in the grid),
// so they are those of the shape and of all sequences; lengths and shares are read on the device.
// Tokens past the last row's are idle.
Pass ModelRunner::TakeCheck(int64_t num_rows, int64_t num_tokens) const {
  const DeviceType device = config_.device.type;
  const int64_t b = StepSize(device, num_rows, config_.max_batch_size);
  const int64_t t = StepSize(device, num_tokens, TokensPerRow(config_, plan_));
  Pass pass = buffers_->passes.Take({b * t, b});
  pass.max_q_len = t;
  pass.max_seq_len = config_.max_seq_len;
  return pass;
}

Pass ModelRunner::TakeChunk(const Batch& batch) const {
  PassSize size = {.num_tokens = 0, .batch_size = static_cast<int64_t>(batch.rows.size())};
  int64_t max_seq_len = 0;
  for (const BatchRow& row : batch.rows) {
    size.num_tokens += row.num_tokens;
    max_seq_len = std::max(max_seq_len, row.sequence->cached + row.num_tokens);
  }
  Pass pass = buffers_->passes.Take(size);
  pass.max_q_len = LargestShare(batch);
  pass.max_seq_len = max_seq_len;
  return pass;
}

Drawn ModelRunner::RunChunk(const Batch& batch, const Meanwhile& meanwhile) {
  Drawn drawn = NothingDrawn(batch);
  const bool is_check = IsCheck(batch);
  Pass pass = is_check ? TakeCheck(static_cast<int64_t>(batch.rows.size()), LargestShare(batch))
                       : TakeChunk(batch);
  pass.quantizes_inputs = batch.is_reading && quantizes_prompts();
  PassOutputs& outputs = buffers_->outputs;
  const std::vector<PassOutput> wanted = OutputsOf(batch);
  std::span<const PassOutput> left(wanted);
  // As many at once as there is room for. Those of a check have room.
  auto next_group = [&] {
    return left.first(std::min(left.size(), static_cast<size_t>(outputs.max_rows())));
  };
  auto group = next_group();
  auto num_rows = is_check ? pass.token_ids.dim(0) : static_cast<int64_t>(group.size());

  buffers_->inputs.Write(RowsOf(batch), pass);
  if (num_rows > 0) outputs.Write(batch, group, num_rows);
  Launch([&] { is_check ? RunCheckPass(pass) : RunChunkPass(pass, num_rows); }, meanwhile);
  while (!group.empty()) {
    outputs.Take(batch, group, num_rows, drawn);
    left = left.subspan(group.size());
    group = next_group();
    if (group.empty()) break;
    num_rows = static_cast<int64_t>(group.size());
    outputs.Write(batch, group, num_rows);
    outputs.Logits(*transformer_, pass, num_rows);
  }
  // Nothing was waited for; the scheduler cuts chunks by the time that they take.
  if (wanted.empty()) buffers_->sampler.Read(1);
  const bool is_clean = batch.is_reading || !quantizes_prompts();
  for (const BatchRow& row : batch.rows) Advance(*row.sequence, row.num_tokens, is_clean);
  return drawn;
}

void ModelRunner::RunChunkPass(const Pass& pass, int64_t num_outputs) {
  ChunkPass(*backend_, *transformer_, pass);
  if (num_outputs > 0) buffers_->outputs.Logits(*transformer_, pass, num_outputs);
}

// More tokens than rows, so no RopeAppendKv here is taken for that of a decode step.
void ModelRunner::RunCheckPass(const Pass& pass) {
  const StepKey key = {.batch_size = pass.seq_lens.dim(0), .tokens_per_row = pass.max_q_len};
  backend_->RunStep(key, [&] { RunChunkPass(pass, pass.token_ids.dim(0)); });
}

}  // namespace tidal
