// One decode step: one new token per row, through the layers of a DecodePlan.
#pragma once

#include "backend/backend.h"
#include "decode/pass.h"
#include "decode/sampler.h"
#include "decode/selection.h"
#include "decode/transformer.h"
#include "kv/shadow_cache.h"
#include "tidal/plan.h"

namespace tidal {

// How a step attends.
struct StepAttention {
  const DecodePlan& plan;
  const Selection& selection;
  const ShadowCache* shadow;  // of the plan's scored layers, up to each row's last token; or null
};

// Queues the whole step: pass.token_ids to the sampler's next ids. A pure function of device
// memory, so that a backend may record it once and replay it.
void DecodeStep(Backend& backend, const Transformer& transformer, const StepAttention& how,
                const Sampler& sampler, const Pass& pass);

}  // namespace tidal
