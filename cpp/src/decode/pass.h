// Pass: the tensors of one trip of T tokens, from B sequences, through the model. A decode step is
// a pass with one token per sequence; any other pass reads its tokens densely (chunk_pass.h).
#pragma once

#include <cstdint>
#include <string>

#include "backend/backend.h"
#include "backend/device_tensors.h"

namespace tidal {

// How many tokens, of how many sequences.
struct PassSize {
  int64_t num_tokens = 0;
  int64_t batch_size = 0;
};

struct Pass {
  // What the host writes (pass_inputs.h). The first three are parts of `inputs`, in this order, so
  // that one copy brings them.
  TensorView inputs;     // [2 T + B] int32
  TensorView token_ids;  // [T] int32
  TensorView positions;  // [T] int32; -1 = idle row
  TensorView seq_lens;  // [B] int32: tokens in the cache, those of this pass included; 0 = idle row
  TensorView seq_idx;   // [T] int32: which of the B sequences a token belongs to
  TensorView q_starts;  // [B + 1] int32: where each sequence's tokens begin in the pass
  TensorView page_table;  // [B, max_pages] int32
  TensorView inv_freq;    // [B, D / 2] float32

  // Host bounds of a chunk pass: at least the tokens of any sequence in the pass, and at least all
  // of seq_lens.
  int64_t max_q_len = 0;
  int64_t max_seq_len = 0;

  // What the layers write.
  TensorView hidden;   // [T, H] float32: the residual stream
  TensorView normed;   // [T, H] act
  TensorView cos_sin;  // [T, D] float32
  // For layers without rope, if the model has some: frequencies of 0 and what follows from them.
  TensorView still_freq;     // [B, D / 2] float32
  TensorView still_cos_sin;  // [T, D] float32
  TensorView qkv;            // [T, (Hq + 2 Hkv) * D] act
  TensorView q;              // [T, Hq, D] act
  TensorView attention_out;  // [T, Hq, D] act
  TensorView gate_up;        // [T, 2 I] act
  TensorView mlp;            // [T, I] act
  TensorView branch;         // [T, H] float32: what a layer adds; absent without norms of it
};

// Memory for one pass after the other, of up to `largest`; the addresses never change, so a
// recorded step can be replayed.
class PassBuffers {
 public:
  // `max_pages`: of one sequence.
  PassBuffers(Backend& backend, const ModelConfig& model, DType act, const PassSize& largest,
              int64_t max_pages);

  // The leading parts of all tensors.
  Pass Take(const PassSize& size) const;

  const PassSize& largest() const { return largest_; }

 private:
  PassSize largest_;
  DeviceTensors inputs_;
  DeviceTensors activations_;
  Pass full_;
};

// Returns how many rows (or tokens of a row) a step of `count` is made for: all of them on the CPU;
// on a device that records its steps few sizes serve all.
int64_t StepSize(DeviceType device, int64_t count, int64_t max_count);

}  // namespace tidal
