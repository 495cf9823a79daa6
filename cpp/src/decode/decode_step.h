// One decode step: one new token per row, through the layers of a DecodePlan.
#pragma once

#include "backend/backend.h"
#include "decode/pass.h"
#include "decode/sampler.h"
#include "decode/selection.h"
#include "decode/transformer.h"
#include "tidal/plan.h"

namespace tidal {

// Queues the whole step: pass.token_ids to the sampler's next ids. A pure function of device
// memory, so that a backend may record it once and replay it.
void DecodeStep(Backend& backend, const Transformer& transformer, const DecodePlan& plan,
                const Selection& selection, const Sampler& sampler, const Pass& pass);

}  // namespace tidal
