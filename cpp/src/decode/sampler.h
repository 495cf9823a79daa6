// Sampler: logits to next tokens, by each sequence's own parameters.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/device_tensors.h"
#include "decode/mirror.h"

namespace tidal {

// Throws InvalidArgument naming the field that is out of range.
void ValidateSamplingParams(const SamplingParams& params);

// `slot`: the row of `seen` the sequence owns.
SamplingRow MakeSamplingRow(const SamplingParams& params, int32_t slot);

// The tokens that sequences hold, for the repetition penalty; a sequence owns one slot.
class SeenTokens {
 public:
  // Slots 0 to max_batch_size - 1 are for sequences; scratch_slot() is for draws nobody keeps.
  SeenTokens(Backend& backend, int64_t vocab_size, int64_t max_batch_size);

  int32_t scratch_slot() const { return static_cast<int32_t>(seen_.dim(0) - 1); }

  // Forgets what the slot has seen and marks these tokens. A draw marks its own.
  void Set(int32_t slot, std::span<const int32_t> tokens);

  const TensorView& view() const { return seen_; }

 private:
  Backend& backend_;
  DeviceTensors tensors_;
  TensorView seen_;  // [max_batch_size + 1, V] uint8
};

class Sampler {
 public:
  // For up to max_rows draws at once; `seen` must outlive it.
  Sampler(Backend& backend, const SeenTokens& seen, int64_t max_rows);

  // Greedy parameters for rows whose draw nobody keeps.
  SamplingRow scratch_row() const { return scratch_row_; }

  // Sets the parameters of the first rows, before they are drawn; uploads what is not there.
  void SetRows(const std::vector<SamplingRow>& rows);

  // Queues the draw for the seq_lens.dim(0) rows of logits() from `first` on.
  void Sample(const TensorView& seq_lens, int64_t first = 0) const;

  // The drawn ids of the first rows; waits for the step.
  std::vector<int32_t> Read(int64_t num_rows) const;

  TensorView logits(int64_t num_rows) const { return logits_.Rows(0, num_rows); }
  int64_t max_rows() const { return logits_.dim(0); }

  // Appends `count` rows of logits from `first` on to `out`.
  void AppendLogits(int64_t first, int64_t count, std::vector<float>& out) const;

 private:
  Backend& backend_;
  const SeenTokens& seen_;
  SamplingRow scratch_row_;
  DeviceTensors tensors_;
  TensorView logits_;     // [max_rows, V] float32
  TensorView rows_;       // [max_rows, sizeof(SamplingRow)] uint8
  TensorView token_ids_;  // [max_rows] int32
  Mirror<SamplingRow> written_;
};

}  // namespace tidal
