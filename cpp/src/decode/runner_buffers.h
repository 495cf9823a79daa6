// RunnerBuffers: the memory of passes and draws, all of it but weights, cache, sets and the
// backend's own scratch. The runner holds one; memory_plan.cc makes one on a backend that only
// counts.
#pragma once

#include "backend/backend.h"
#include "decode/pass.h"
#include "decode/pass_inputs.h"
#include "decode/pass_outputs.h"
#include "decode/sampler.h"
#include "decode/sampling_slots.h"
#include "tidal/plan.h"

namespace tidal {

struct RunnerBuffers {
  // `config` with all automatic values filled in, but for num_pages.
  RunnerBuffers(Backend& backend, const ModelConfig& model, const DecodeConfig& config,
                const DecodePlan& plan);
  RunnerBuffers(const RunnerBuffers&) = delete;  // its parts refer to each other
  RunnerBuffers& operator=(const RunnerBuffers&) = delete;

  PassBuffers passes;
  PassInputs inputs;
  SamplingSlots slots;
  Sampler sampler;
  PassOutputs outputs;
};

}  // namespace tidal
