// Pass: the tensors of one trip of T tokens, from B sequences, through the model. A decode step is
// a pass with one token per sequence, a prefill chunk one with many tokens of one sequence.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "backend/backend.h"
#include "backend/device_tensors.h"
#include "kv/sequence.h"

namespace tidal {

struct Pass {
  // What the host writes. The first three are parts of `inputs`, in this order, so that one copy
  // brings them.
  TensorView inputs;     // [2 T + B] int32
  TensorView token_ids;  // [T] int32
  TensorView positions;  // [T] int32; -1 = idle row
  TensorView seq_lens;  // [B] int32: tokens in the cache, those of this pass included; 0 = idle row
  TensorView seq_idx;   // [T] int32: which of the B sequences a token belongs to
  TensorView page_table;  // [B, max_pages] int32
  TensorView inv_freq;    // [B, D / 2] float32

  // What the layers write.
  TensorView hidden;         // [T, H] float32: the residual stream
  TensorView normed;         // [T, H] act
  TensorView cos_sin;        // [T, D] float32
  TensorView qkv;            // [T, (Hq + 2 Hkv) * D] act
  TensorView q;              // [T, Hq, D] act
  TensorView attention_out;  // [T, Hq, D] act
  TensorView gate_up;        // [T, 2 I] act
  TensorView mlp;            // [T, I] act
};

// Memory for passes of up to max_tokens tokens of up to max_batch_size sequences; the addresses
// never change, so a recorded step can be replayed.
class PassBuffers {
 public:
  // `what` names their purpose.
  PassBuffers(Backend& backend, const std::string& what, const ModelConfig& model, DType act,
              int64_t max_tokens, int64_t max_batch_size, int64_t max_pages);

  // The leading parts of all tensors.
  Pass Take(int64_t num_tokens, int64_t batch_size) const;

 private:
  DeviceTensors tensors_;
  Pass full_;
};

// How many rows (or tokens of a row) a step is made for: all of them on the CPU; on a device that
// records its steps few sizes serve all.
int64_t StepSize(DeviceType device, int64_t count, int64_t max_count);

// The page tables and rotary frequencies of a pass's sequences: what stays the same while the same
// ones go through the model together. Batch rows past them are idle.
void UploadSequences(Backend& backend, std::span<Sequence* const> rows, const Pass& pass);

}  // namespace tidal
