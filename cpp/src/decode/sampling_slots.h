// SamplingSlots: what the device keeps of a sequence for its draws: marks of its tokens, for the
// penalties, and its biases. A sequence owns one slot while it runs.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/device_tensors.h"
#include "kv/sequence.h"

namespace tidal {

class SamplingSlots {
 public:
  // Slots 0 to max_batch_size - 1 are for sequences; scratch_slot() is for draws nobody keeps.
  SamplingSlots(Backend& backend, int64_t vocab_size, int64_t max_batch_size);

  int32_t scratch_slot() const { return static_cast<int32_t>(history_.dim(0) - 1); }

  // Makes the sequence's slot what draws behind its first num_tokens tokens go by, as far as its
  // parameters ask for it; uploads what is not there. MarkDrawn must follow the draws.
  void Prepare(const Sequence& sequence, int64_t num_tokens);

  // Draws of the sequence gave these tokens, one after the other; -1 is none.
  void MarkDrawn(const Sequence& sequence, std::span<const int32_t> drawn);

  const TensorView& history() const { return history_; }
  const TensorView& biases() const { return biases_; }

 private:
  // The tokens that penalties look at; none without penalties.
  struct History {
    std::span<const int32_t> given;
    std::span<const int32_t> generated;
  };
  // What is in a slot. Tokens that a sequence was given do not change as long as its id does not.
  struct Content {
    uint64_t sequence_id = 0;
    size_t num_given = 0;
    std::vector<int32_t> generated;
    bool is_drawing = false;  // draws may have marked more
  };

  void UploadBiases(const Sequence& sequence);
  void UploadHistory(int32_t slot, const History& history);

  Backend& backend_;
  DeviceTensors tensors_;
  TensorView history_;  // [max_batch_size + 1, V] int32
  TensorView biases_;   // [max_batch_size + 1, kMaxLogitBiases * sizeof(TokenBias)] uint8
  std::vector<std::optional<Content>> contents_;  // by slot, to the last used; nothing: not known
};

}  // namespace tidal
