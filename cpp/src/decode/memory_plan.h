// The plan of an engine's memory: made before anything is loaded, by the code that allocates.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "model/weights.h"
#include "tidal/config.h"
#include "tidal/memory_plan.h"
#include "tidal/plan.h"

namespace tidal {

// Settings with every automatic value filled in, and the memory they need. Whether that is there:
// MemoryPlan::problem.
struct ResolvedSettings {
  DecodeConfig config;
  MemoryPlan memory;
};

// Throws UnsupportedError for shapes that the backend does not run, ConfigError for settings that
// the weights do not fit.
ResolvedSettings ResolveSettings(const Backend& backend, const ModelConfig& model,
                                 const DecodeConfig& config, const DecodePlan& plan,
                                 const WeightMemory& weights);

// The largest step of these (resolved) settings, but for decoded_bytes and quantized_inputs.
StepLimits LimitsFor(const Backend& backend, const ModelConfig& model, const DecodeConfig& config,
                     const DecodePlan& plan);

// Returns the bytes that a plan beside a decoder's takes of the device: sets and shadow, and where
// steps are recorded, those of every number of rows. `config`: the decoder's, resolved, with the
// plan's settings in place of its own.
int64_t AddedPlanBytes(const Backend& backend, const ModelConfig& model, const DecodeConfig& config,
                       const DecodePlan& plan);

// The steps that a device which records them will ever be asked for, in the order in which they are
// best recorded; at most BackendInfo::max_recorded_steps. Empty where none is recorded.
std::vector<StepKey> RecordedSteps(const Backend& backend, const DecodeConfig& config,
                                   const DecodePlan& plan);

}  // namespace tidal
