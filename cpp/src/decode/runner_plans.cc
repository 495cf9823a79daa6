// The runner's plans: added, looked at and dropped; and their shadow keys, which are brought up to
// date before a step reads them.
#include <algorithm>
#include <span>
#include <utility>

#include "decode/memory_plan.h"
#include "decode/model_runner.h"
#include "decode/settings.h"
#include "decode/shadow_balance.h"
#include "model/rope.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// Tokens that two sequences have cached in the same pages, whole pages alone.
int64_t NumShared(const Sequence& one, const Sequence& other, int64_t page_size) {
  const std::vector<int32_t>& pages = one.pages.pages();
  const std::vector<int32_t>& others = other.pages.pages();
  const auto [end, _] = std::mismatch(pages.begin(), pages.end(), others.begin(), others.end());
  const int64_t cached = std::min(one.cached, other.cached);
  return std::min((end - pages.begin()) * page_size, cached - cached % page_size);
}

}  // namespace

std::unique_ptr<ActivePlan> ModelRunner::MakePlan(PlanId id, const DecodeConfig& settings) {
  const DecodePlan plan = MakeDecodePlan(model_, settings);
  return std::unique_ptr<ActivePlan>(
      new ActivePlan{.id = id,
                     .config = settings,
                     .plan = plan,
                     .selection = Selection(*backend_, model_, settings, plan),
                     .shadow = MakeShadow(id, plan, settings),
                     .last_rows = {}});
}

PlanId ModelRunner::AddPlan(const PlanConfig& asked) {
  ValidatePlanConfig(asked);
  DecodeConfig settings = config_;
  static_cast<PlanConfig&>(settings) = asked;
  settings.verify = false;
  ResolvePlanSettings(*backend_, config_.max_seq_len, settings);
  for (const auto& [id, active] : plans_) {
    if (active->config != static_cast<const PlanConfig&>(settings)) continue;
    ++active->num_users;
    return id;
  }
  const DecodePlan plan = MakeDecodePlan(model_, settings);
  CheckRoom(settings, plan);
  StepLimits limits = LimitsFor(*backend_, model_, settings, plan);
  limits.tokens_per_row = TokensPerRow(config_, plan_);
  backend_->Reserve(limits);
  const PlanId id = next_plan_;
  plans_.emplace(id, MakePlan(id, settings));
  next_plan_ = PlanId{static_cast<int64_t>(id) + 1};
  return id;
}

// A device that records steps takes memory for them when they first run, where it is too late to
// refuse.
void ModelRunner::CheckRoom(const DecodeConfig& settings, const DecodePlan& plan) const {
  const BackendInfo info = backend_->info();
  if (info.max_recorded_steps == 0) return;
  const int64_t need = AddedPlanBytes(*backend_, model_, settings, plan);
  TIDAL_CHECK(need <= info.free_bytes, OutOfMemoryError, "plan ", plan.ToString(), ": need ", need,
              " bytes on ", info.name, " for its sets and recorded steps, have ", info.free_bytes,
              " free; lower gpu_memory_utilization, max_batch_size or max_seq_len");
}

void ModelRunner::DropPlan(PlanId id) noexcept {
  const auto found = plans_.find(id);
  if (found == plans_.end() || --found->second->num_users > 0) return;
  backend_->ForgetSteps(id);
  plans_.erase(found);
}

std::vector<LayerSelection> ModelRunner::ReadSelection(PlanId id, uint64_t sequence_id) const {
  const ActivePlan& active = plan(id);
  for (size_t i = 0; i < active.last_rows.size(); ++i) {
    const ActivePlan::Row& row = active.last_rows[i];
    if (row.sequence_id != sequence_id || !active.IsSparse(row.seq_len)) continue;
    return active.selection.Read(*backend_, static_cast<int64_t>(i));
  }
  return {};
}

// --- shadows ---

std::unique_ptr<ShadowCache> ModelRunner::MakeShadow(PlanId id, const DecodePlan& plan,
                                                     const PlanConfig& config) {
  if (config.shadow == Shadow::kNone) return nullptr;
  if (shadow_balance_.empty()) shadow_balance_ = MeasureBalance();
  auto shadow =
      std::make_unique<ShadowCache>(id, *backend_, model_, plan.LayersOf(LayerKind::kScored),
                                    config_.num_pages, config_.page_size);
  shadow->SetBalance(*backend_, shadow_balance_);
  return shadow;
}

ShadowBalance ModelRunner::MeasureBalance() {
  PagedKvCache pages = MakeBalancePages(*backend_, model_, config_);
  return MeasureShadowBalance(
      *backend_, pages,
      {.model = model_,
       .weights = weights_,
       .rope_scaling = ComputeRope(model_, config_.max_seq_len).attention_scaling,
       .num_tokens = NumBalanceTokens(config_),
       .chunk = config_.prefill_chunk,
       .buffers = *buffers_});
}

void ModelRunner::FillShadow(const ShadowCache& shadow, const std::vector<BatchRow>& rows) {
  for (size_t i = 0; i < rows.size(); ++i) {
    Sequence& sequence = *rows[i].sequence;
    if (sequence.shadow_plan != shadow.plan()) sequence.shadowed = 0;
    sequence.shadow_plan = shadow.plan();
    for (const BatchRow& earlier : std::span(rows).first(i)) {
      const int64_t shared = NumShared(sequence, *earlier.sequence, config_.page_size);
      sequence.shadowed = std::max(sequence.shadowed, shared);
    }
    while (sequence.shadowed < sequence.cached) {
      const int64_t begin = sequence.shadowed;
      const int64_t count = std::min(config_.prefill_chunk, sequence.cached - begin);
      Pass pass = buffers_->passes.Take({count, 1});
      const PassRow part = {&sequence, begin, count};
      buffers_->inputs.Write({&part, 1}, pass);
      for (size_t layer = 0; layer < shadow.layers().size(); ++layer) {
        backend_->AppendShadow({.kv = transformer_->Cache(shadow.layers()[layer], pass),
                                .positions = pass.positions,
                                .seq_idx = pass.seq_idx,
                                .shadow = shadow.Layer(layer)});
      }
      sequence.shadowed += count;
    }
  }
}

}  // namespace tidal
