// EngineBuffers: the memory of passes and steps, all of it but weights, cache and the backend's own
// scratch. The engine holds one; memory_plan.cc makes one on a backend that only counts.
#pragma once

#include <optional>

#include "backend/backend.h"
#include "backend/device_tensors.h"
#include "decode/pass.h"
#include "decode/sampler.h"
#include "decode/selection.h"
#include "decode/verifier.h"
#include "tidal/plan.h"

namespace tidal {

struct EngineBuffers {
  // `config` with all automatic values filled in, but for num_pages.
  EngineBuffers(Backend& backend, const ModelConfig& model, const DecodeConfig& config,
                const DecodePlan& plan);
  EngineBuffers(const EngineBuffers&) = delete;  // its parts refer to each other
  EngineBuffers& operator=(const EngineBuffers&) = delete;

  PassBuffers prefill;
  PassBuffers step;
  Selection selection;
  SeenTokens seen;
  Sampler sampler;
  std::optional<Verifier> verifier;  // none: the decoder does not verify
  DeviceTensors tensors;
  TensorView q_starts;     // [2] int32: {0, tokens of the prefill chunk}
  TensorView gather_rows;  // [max_batch_size] int32
  TensorView gathered;     // [max_batch_size, H] float32
};

// Of a sequence of max_seq_len tokens.
int64_t PagesOfLongest(const DecodeConfig& config);

// Whether the decoder checks what sparse steps draft. A dense one has nothing to draft with.
bool Verifies(const DecodeConfig& config, const DecodePlan& plan);

// Of the largest step.
int64_t TokensPerRow(const DecodeConfig& config, const DecodePlan& plan);

}  // namespace tidal
