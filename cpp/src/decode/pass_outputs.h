// PassOutputs: what is wanted after tokens of a chunk pass: logits, and draws from them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/device_tensors.h"
#include "decode/batch.h"
#include "decode/pass.h"
#include "decode/sampler.h"
#include "decode/transformer.h"

namespace tidal {

// A token of a pass after which something is wanted.
struct PassOutput {
  size_t row = 0;       // of the batch
  int64_t token = 0;    // index in the pass
  int64_t seq_len = 0;  // the sequence's tokens up to that one
  int64_t turn = 0;     // 0 for the first of its row, 1 for the second, ...
  int64_t draw = -1;    // which of its row's draws it is, from 0 on; -1: none
  int64_t logits = -1;  // which of its row's logits
  bool is_scored = false;

  bool is_drawn() const { return draw >= 0; }
};

// All that a batch wants, turn by turn.
std::vector<PassOutput> OutputsOf(const Batch& batch);

class PassOutputs {
 public:
  // For up to sampler.max_rows() outputs at once; `what` names the memory's purpose, and the
  // sampler must outlive it.
  PassOutputs(Backend& backend, Sampler& sampler, const ModelConfig& model, const char* what);

  int64_t max_rows() const { return sampler_.max_rows(); }

  // Uploads which tokens' logits the first num_rows rows hold, and how each is drawn. Rows past the
  // outputs are idle.
  void Write(const Batch& batch, std::span<const PassOutput> outputs, int64_t num_rows);

  // Queues the logits of the first num_rows rows; a pure function of device memory.
  void Logits(const Transformer& transformer, const Pass& pass, int64_t num_rows) const;

  // Writes logits, draws, and appends to `drawn` what else the outputs want. `num_rows` as written.
  void Take(const Batch& batch, std::span<const PassOutput> outputs, int64_t num_rows,
            Drawn& drawn) const;

 private:
  void TakeLogits(const Batch& batch, std::span<const PassOutput> outputs) const;
  void Draw(const Batch& batch, std::span<const PassOutput> outputs, int64_t num_rows,
            Drawn& drawn) const;
  void TakeScores(const Batch& batch, std::span<const PassOutput> outputs, Drawn& drawn) const;
  void TakeLogprobs(const Batch& batch, std::span<const PassOutput> outputs, int64_t first,
                    Drawn& drawn) const;
  // Parts of written_ for num_rows rows: the tokens, and how many precede each draw.
  TensorView TokensOf(int64_t num_rows) const { return written_.Rows(0, num_rows); }
  TensorView LensOf(int64_t num_rows) const { return written_.Rows(num_rows, num_rows); }

  Backend& backend_;
  Sampler& sampler_;
  DeviceTensors tensors_;
  // R: sampler.max_rows().
  TensorView written_;   // [2 R] int32: of n rows the tokens [n], then their seq_lens, 0 = no draw
  TensorView gathered_;  // [R, H] float32
};

}  // namespace tidal
