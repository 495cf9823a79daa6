#include "decode/runner_buffers.h"

#include <algorithm>

#include "decode/settings.h"

namespace tidal {
namespace {

int64_t MaxDraws(const DecodeConfig& config, const DecodePlan& plan) {
  return config.max_batch_size * TokensPerRow(config, plan);
}

}  // namespace

RunnerBuffers::RunnerBuffers(Backend& backend, const ModelConfig& model, const DecodeConfig& config,
                             const DecodePlan& plan)
    : passes(backend, model, backend.activation_dtype(config.dtype),
             {.num_tokens = std::max(config.prefill_chunk, MaxDraws(config, plan)),
              .batch_size = config.max_batch_size},
             PagesOfLongest(config)),
      inputs(backend),
      slots(backend, model.vocab_size, config.max_batch_size),
      sampler(backend, slots, MaxDraws(config, plan), config.max_batch_size),
      outputs(backend, sampler, model,
              Verifies(config, plan) ? "verification" : "activations of a step") {}

}  // namespace tidal
