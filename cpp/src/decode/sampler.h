// Sampler: logits to next tokens, by each sequence's own parameters.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "backend/device_tensors.h"

namespace tidal {

// Throws InvalidArgument naming the field that is out of range.
void ValidateSamplingParams(const SamplingParams& params);

// `slot`: the row of `seen` the sequence owns.
SamplingRow MakeSamplingRow(const SamplingParams& params, int32_t slot);

class Sampler {
 public:
  // Slots 0 to max_batch_size - 1 are for sequences; scratch_slot() is for draws nobody keeps.
  Sampler(Backend& backend, int64_t vocab_size, int64_t max_batch_size);

  int32_t scratch_slot() const { return static_cast<int32_t>(seen_.dim(0) - 1); }

  // Forgets what the slot has seen and marks the prompt's tokens (for the repetition penalty).
  void StartSlot(int32_t slot, const std::vector<int32_t>& prompt);

  // Before a step: the parameters of its rows.
  void SetRows(const std::vector<SamplingRow>& rows);

  // Queues the draw for the first seq_lens.dim(0) rows of logits().
  void Sample(const TensorView& seq_lens) const;

  // The drawn ids; waits for the step.
  std::vector<int32_t> Read(int64_t batch_size) const;

  TensorView logits(int64_t batch_size) const { return logits_.Rows(0, batch_size); }
  int64_t vocab_size() const { return logits_.dim(1); }
  int64_t bytes() const { return tensors_.bytes(); }

 private:
  Backend& backend_;
  DeviceTensors tensors_;
  TensorView logits_;     // [max_batch_size, V] float32
  TensorView rows_;       // [max_batch_size, sizeof(SamplingRow)] uint8
  TensorView seen_;       // [max_batch_size + 1, V] uint8
  TensorView token_ids_;  // [max_batch_size] int32
};

}  // namespace tidal
