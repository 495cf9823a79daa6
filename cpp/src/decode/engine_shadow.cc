// The engine's shadow keys: made for a plan, and brought up to date before a step reads them.
#include <algorithm>
#include <numeric>

#include "decode/engine.h"
#include "decode/shadow_balance.h"
#include "model/rope.h"

namespace tidal {

std::unique_ptr<ShadowCache> Engine::MakeShadow(PlanId id, const DecodePlan& plan,
                                                const PlanConfig& config) {
  if (config.shadow == Shadow::kNone) return nullptr;
  if (shadow_balance_.empty()) shadow_balance_ = MeasureBalance();
  auto shadow =
      std::make_unique<ShadowCache>(id, *backend_, model_, plan.LayersOf(LayerKind::kScored),
                                    config_.num_pages, config_.page_size);
  shadow->SetBalance(*backend_, shadow_balance_);
  return shadow;
}

ShadowBalance Engine::MeasureBalance() {
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

void Engine::FillShadow(const ShadowCache& shadow, std::span<Sequence* const> rows) {
  for (Sequence* row : rows) {
    if (row->shadow_plan != shadow.plan()) row->shadowed = 0;
    row->shadow_plan = shadow.plan();
    for (int64_t begin = row->shadowed; begin < row->cached;) {
      int64_t count = std::min(config_.prefill_chunk, row->cached - begin);
      Pass pass = buffers_->prefill.Take(count, 1);
      std::vector<int32_t> positions(static_cast<size_t>(count));
      std::iota(positions.begin(), positions.end(), static_cast<int32_t>(begin));
      std::vector<int32_t> zeros(static_cast<size_t>(count), 0);
      backend_->Upload(pass.positions, positions.data());
      backend_->Upload(pass.seq_idx, zeros.data());
      UploadSequences(*backend_, {&row, 1}, pass);
      for (size_t i = 0; i < shadow.layers().size(); ++i) {
        backend_->AppendShadow({.kv = transformer_->Cache(shadow.layers()[i], pass),
                                .positions = pass.positions,
                                .seq_idx = pass.seq_idx,
                                .shadow = shadow.Layer(i)});
      }
      begin += count;
    }
    row->shadowed = row->cached;
  }
}

}  // namespace tidal
