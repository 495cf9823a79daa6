#include "decode/engine_buffers.h"

namespace tidal {
namespace {

constexpr const char* kStepPurpose = "activations of a step";

DType ActivationDType(const Backend& backend, const DecodeConfig& config) {
  return backend.activation_dtype(config.dtype);
}

}  // namespace

EngineBuffers::EngineBuffers(Backend& backend, const ModelConfig& model, const DecodeConfig& config,
                             const DecodePlan& plan)
    : prefill(backend, "activations of a prefill chunk", model, ActivationDType(backend, config),
              config.prefill_chunk, int64_t{1}, PagesOfLongest(config)),
      step(backend, kStepPurpose, model, ActivationDType(backend, config), config.max_batch_size,
           config.max_batch_size, PagesOfLongest(config)),
      selection(backend, model, config, plan),
      seen(backend, model.vocab_size, config.max_batch_size),
      sampler(backend, "sampling", seen, config.max_batch_size),
      tensors(backend, kStepPurpose),
      q_starts(tensors.Make(DType::kInt32, {2})),
      gather_rows(tensors.Make(DType::kInt32, {config.max_batch_size})),
      gathered(tensors.Make(DType::kFloat32, {config.max_batch_size, model.hidden_size})) {
  if (!Verifies(config, plan)) return;
  verifier.emplace(backend, model, ActivationDType(backend, config), seen,
                   VerifierLimits{.device = config.device.type,
                                  .max_batch_size = config.max_batch_size,
                                  .max_tokens_per_row = TokensPerRow(config, plan),
                                  .max_seq_len = config.max_seq_len,
                                  .max_pages = PagesOfLongest(config)});
}

int64_t PagesOfLongest(const DecodeConfig& config) {
  return (config.max_seq_len + config.page_size - 1) / config.page_size;
}

bool Verifies(const DecodeConfig& config, const DecodePlan& plan) {
  return config.verify && !plan.is_dense();
}

int64_t TokensPerRow(const DecodeConfig& config, const DecodePlan& plan) {
  if (!Verifies(config, plan)) return 1;
  return 1 + (config.draft_tokens == 0 ? kMaxAutomaticDrafts : config.draft_tokens);
}

}  // namespace tidal
