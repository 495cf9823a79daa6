// Sampler: logits to next tokens, by each sequence's own parameters.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/device_tensors.h"
#include "decode/batch.h"
#include "decode/mirror.h"
#include "decode/sampling_slots.h"
#include "tidal/request.h"

namespace tidal {

// Throws InvalidArgument naming the field that is out of range.
void ValidateSamplingParams(const SamplingParams& params, int64_t vocab_size);

// `slot`: the one of SamplingSlots that the sequence owns.
SamplingRow MakeSamplingRow(const SamplingParams& params, int32_t slot);

// Makes the sequence's next tokens be drawn by the parameters; its tokens so far count as given.
void SetSampling(const SamplingParams& params, int64_t vocab_size, int32_t slot,
                 Sequence& sequence);

// One row of logits to draw from: the draw `index` of a batch row, the first is 0. Without a batch
// row nobody keeps the draw.
struct DrawRow {
  const BatchRow* row = nullptr;
  int64_t index = 0;
  bool keeps_logits = false;  // the logits are wanted afterwards
};

// A token whose log-probabilities are wanted.
struct LogprobsWanted {
  int64_t row = 0;  // of the logits
  int32_t token_id = -1;
  int64_t num_top = 0;  // of the most likely tokens, at most kMaxLogprobs
};

class Sampler {
 public:
  // For up to max_rows draws at once, max_batch_size of them with logits that are kept; `slots`
  // must outlive it.
  Sampler(Backend& backend, const SamplingSlots& slots, int64_t max_rows, int64_t max_batch_size);

  // Greedy parameters for rows whose draw nobody keeps.
  SamplingRow scratch_row() const { return scratch_row_; }

  // Sets how the first rows are drawn, before they are; uploads what is not there.
  void SetRows(std::span<const DrawRow> draws);

  // Queues the draw for the seq_lens.dim(0) rows of logits() from `first` on. Of rows that keep
  // their logits there may be so many as max_batch_size, and they come first.
  void Sample(const TensorView& seq_lens, int64_t first = 0) const;

  // The drawn ids of `count` rows from `first` on; waits for the step.
  std::vector<int32_t> Read(int64_t count, int64_t first = 0) const;

  // The log-probabilities of tokens of rows that have not been drawn from, or have kept their
  // logits; waits.
  std::vector<TokenLogprobs> ReadLogprobs(std::span<const LogprobsWanted> wanted) const;

  TensorView logits(int64_t num_rows) const { return logits_.Rows(0, num_rows); }
  int64_t max_rows() const { return logits_.dim(0); }
  int64_t vocab_size() const { return logits_.dim(1); }

  // Copies `count` rows of logits from `first` on to `out`; waits.
  void ReadLogits(int64_t first, int64_t count, float* out) const;

 private:
  SamplingRow RowOf(const DrawRow& draw, int64_t index);
  // Uploads the mask of a row unless it is there.
  void SetMask(int64_t index, std::vector<uint32_t> mask);
  // Appends those of at most max_batch_size tokens.
  void AppendLogprobs(std::span<const LogprobsWanted> wanted,
                      std::vector<TokenLogprobs>& out) const;

  Backend& backend_;
  const SamplingSlots& slots_;
  SamplingRow scratch_row_;
  DeviceTensors tensors_;
  TensorView logits_;       // [max_rows, V] float32
  TensorView rows_;         // [max_rows, sizeof(SamplingRow)] uint8
  TensorView masks_;        // [max_rows, NumMaskWords(V)] int32
  TensorView copies_;       // [max_batch_size, V] float32
  TensorView token_ids_;    // [max_rows] int32
  TensorView scored_;       // [2 max_batch_size] int32: of n tokens the rows [n], then the ids
  TensorView logprobs_;     // [max_batch_size * (1 + kMaxLogprobs)] float32
  TensorView logprob_ids_;  // [max_batch_size * (1 + kMaxLogprobs)] int32
  Mirror<SamplingRow> written_;
  std::vector<std::vector<uint32_t>> written_masks_;  // by row, to the last used; empty: not known
};

}  // namespace tidal
