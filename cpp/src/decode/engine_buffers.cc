#include "decode/engine_buffers.h"

namespace tidal {
namespace {

constexpr const char* kStepPurpose = "activations of a step";

}  // namespace

EngineBuffers::EngineBuffers(Backend& backend, const ModelConfig& model, const DecodeConfig& config,
                             const DecodePlan& plan) {
  int64_t b = config.max_batch_size;
  int64_t max_pages = (config.max_seq_len + config.page_size - 1) / config.page_size;
  DType act = backend.activation_dtype(config.dtype);
  prefill = std::make_unique<PassBuffers>(backend, "activations of a prefill chunk", model, act,
                                          config.prefill_chunk, int64_t{1}, max_pages);
  step = std::make_unique<PassBuffers>(backend, kStepPurpose, model, act, b, b, max_pages);
  selection = std::make_unique<Selection>(backend, model, config, plan);
  seen = std::make_unique<SeenTokens>(backend, model.vocab_size, b);
  sampler = std::make_unique<Sampler>(backend, "sampling", *seen, b);
  if (Verifies(config, plan)) {
    verifier =
        std::make_unique<Verifier>(backend, model, act, *seen,
                                   VerifierLimits{.device = config.device.type,
                                                  .max_batch_size = b,
                                                  .max_tokens_per_row = TokensPerRow(config, plan),
                                                  .max_seq_len = config.max_seq_len,
                                                  .max_pages = max_pages});
  }
  tensors = std::make_unique<DeviceTensors>(backend, kStepPurpose);
  q_starts = tensors->Make(DType::kInt32, {2});
  gather_rows = tensors->Make(DType::kInt32, {b});
  gathered = tensors->Make(DType::kFloat32, {b, model.hidden_size});
}

bool Verifies(const DecodeConfig& config, const DecodePlan& plan) {
  return config.verify && !plan.is_dense();
}

int64_t TokensPerRow(const DecodeConfig& config, const DecodePlan& plan) {
  if (!Verifies(config, plan)) return 1;
  return 1 + (config.draft_tokens == 0 ? kMaxAutomaticDrafts : config.draft_tokens);
}

}  // namespace tidal
