#include "decode/settings.h"

#include <algorithm>
#include <limits>

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

}  // namespace

void ValidatePlanConfig(const PlanConfig& c) {
  if (c.token_budget != kAutomatic) CheckAtLeast("token_budget", c.token_budget, 1);
  CheckAtLeast("min_token_budget", c.min_token_budget, 0);
  TIDAL_CHECK(c.top_p_mass > 0.0 && c.top_p_mass <= 1.0, InvalidArgument, "top_p_mass: got ",
              c.top_p_mass, ", expected in (0, 1]");
  CheckAtLeast("sink_tokens", c.sink_tokens, 0);
  if (c.recent_tokens != kAutomatic) CheckAtLeast("recent_tokens", c.recent_tokens, 1);
  CheckAtMost("sink_tokens", c.sink_tokens, kMaxInt32);
  CheckAtMost("recent_tokens", c.recent_tokens, kMaxInt32);
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
  TIDAL_CHECK(c.max_chunk_ms > 0.0, InvalidArgument, "max_chunk_ms: got ", c.max_chunk_ms,
              ", expected > 0");
  TIDAL_CHECK(c.host_kv_gib >= 0.0 && c.host_kv_gib <= kMaxHostKvGib, InvalidArgument,
              "host_kv_gib: got ", c.host_kv_gib, ", expected 0 to ", kMaxHostKvGib);
  TIDAL_CHECK(c.decode_share >= 0.0 && c.decode_share < 1.0, InvalidArgument, "decode_share: got ",
              c.decode_share, ", expected 0 <= share < 1");
  // Positions, rows and page ids are 32-bit on the device.
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
          .cuda_graphs = config.cuda_graphs,
          .batch_invariant = config.batch_invariant};
}

DecodePlan MakeDecodePlan(const ModelConfig& model, const PlanConfig& config) {
  if (config.select_layers.empty() && config.scored_layers.empty()) {
    return DecodePlan::Dense(PlanLayers(model));
  }
  return DecodePlan::Tidal(PlanLayers(model), config.full_layers, config.select_layers,
                           config.scored_layers);
}

void ResolvePlanSettings(const Backend& backend, int64_t max_seq_len, PlanConfig& plan) {
  if (plan.token_budget == kAutomatic) {
    plan.token_budget = kAutomaticBudget;
    if (plan.top_p_mass == 1.0) plan.top_p_mass = kAutomaticMass;
  }
  if (plan.min_token_budget == 0) plan.min_token_budget = kAutomaticMinBudget;
  if (plan.recent_tokens == kAutomatic) {
    int64_t least = std::min(plan.token_budget, max_seq_len);
    if (plan.top_p_mass < 1.0) least = std::min(plan.min_token_budget, least);
    plan.recent_tokens = std::max(std::min(least / 4, least - plan.sink_tokens), int64_t{1});
  }
  int64_t num_forced = plan.sink_tokens + plan.recent_tokens;
  // A budget beyond the longest sequence means everything; no need for memory to say so.
  plan.token_budget = std::max(std::min(plan.token_budget, max_seq_len), num_forced);
  plan.min_token_budget = std::max(std::min(plan.min_token_budget, plan.token_budget), num_forced);
  if (plan.sparse_min_context == kAutomatic) {
    plan.sparse_min_context = backend.SparseMinContext(plan.token_budget);
  }
}

int64_t PagesOfLongest(const DecodeConfig& config) {
  return (config.max_seq_len + config.page_size - 1) / config.page_size;
}

bool CanDraft(const DecodeConfig& config, const DecodePlan& plan) {
  return config.drafts != Drafts::kTidal || !plan.is_dense();
}

bool Verifies(const DecodeConfig& config, const DecodePlan& plan) {
  return config.verify && CanDraft(config, plan);
}

int64_t TokensPerRow(const DecodeConfig& config, const DecodePlan& plan) {
  if (!Verifies(config, plan)) return 1;
  return 1 + (config.draft_tokens == 0 ? kMaxAutomaticDrafts : config.draft_tokens);
}

}  // namespace tidal
