// Pass: the tensors of one trip of T tokens, from B sequences, through the model. A decode step is
// a pass with one token per sequence; any other pass reads its tokens densely (chunk_pass.h).
#pragma once

#include <array>
#include <cstddef>
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

// Ways to rotate q and k, of which a layer has one.
enum class RotationKind : size_t {
  kOfSequence,  // by frequencies that each sequence has
  kWindow,      // by those of layers with a window
  kStill,       // not at all: by frequencies of 0
};
inline constexpr size_t kNumRotations = 3;

RotationKind RotationOf(const ModelConfig& model, int64_t layer);

// Absent if no layer of the model has it.
struct Rotation {
  TensorView inv_freq;   // [B, D / 2] float32; but for kOfSequence written once, for all rows
  TensorView cos_sin;    // [T, D] float32
  TensorView q_cos_sin;  // [T, D] float32: of queries that are scaled by position, or absent
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

  // Host bounds of a chunk pass: at least the tokens of any sequence in the pass, and at least all
  // of seq_lens.
  int64_t max_q_len = 0;
  int64_t max_seq_len = 0;
  // Whether products round their inputs where their weight says so: of passes over prompts.
  bool quantizes_inputs = false;

  // What the layers write.
  TensorView hidden;         // [T, H] float32: the residual stream
  TensorView normed;         // [T, H] act
  TensorView qkv;            // [T, (Hq + 2 Hkv) * D] act
  TensorView q;              // [T, Hq, D] act
  TensorView attention_out;  // [T, Hq, D] act
  TensorView gate_up;        // [T, 2 I] act
  TensorView mlp;            // [T, I] act
  // For layers with experts, if the model has some: k of E for each token, each of size I'.
  TensorView router_logits;   // [T, E] float32
  TensorView expert_ids;      // [T, k] int32
  TensorView expert_weights;  // [T, k] float32
  TensorView expert_gate_up;  // [T * k, 2 I'] act
  TensorView expert_mlp;      // [T * k, I'] act
  TensorView expert_out;      // [T * k, H] act
  // For the expert that all tokens have, if there is one, of size S.
  TensorView shared_gate_up;  // [T, 2 S] act
  TensorView shared_mlp;      // [T, S] act
  TensorView branch;          // [T, H] float32: what a layer adds; absent without norms of it

  std::array<Rotation, kNumRotations> rotations;  // by RotationKind

  const Rotation& rotation(RotationKind kind) const { return rotations[static_cast<size_t>(kind)]; }
};

// Memory for one pass after the other, of up to `largest`; the addresses never change, so a
// recorded step can be replayed.
class PassBuffers {
 public:
  // `max_pages`: of one sequence.
  PassBuffers(Backend& backend, const ModelConfig& model, DType act, const PassSize& largest,
              int64_t max_pages);

  // Writes what is the same in every pass: to be called once, before the first.
  void WriteConstants(Backend& backend, const ModelConfig& model) const;

  // The leading parts of all tensors.
  Pass Take(const PassSize& size) const;

  const PassSize& largest() const { return largest_; }

 private:
  // Memory for layers with experts.
  void MakeExperts(const ModelConfig& model, DType act);
  // Memory of the rotations that the model's layers have.
  void MakeRotations(const ModelConfig& model);

  PassSize largest_;
  DeviceTensors inputs_;
  DeviceTensors activations_;
  Pass full_;
};

// Returns how many rows (or tokens of a row) a step of `count` is made for: all of them on the CPU;
// on a device that records its steps few sizes serve all.
int64_t StepSize(DeviceType device, int64_t count, int64_t max_count);

}  // namespace tidal
