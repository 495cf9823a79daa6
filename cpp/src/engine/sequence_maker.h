// SequenceMaker: sequences of an engine, with ids that no other has had and pages of its pool.
#pragma once

#include <cstdint>
#include <vector>

#include "decode/model_runner.h"
#include "kv/sequence.h"

namespace tidal {

class SequenceMaker {
 public:
  // `runner` must outlive it.
  explicit SequenceMaker(ModelRunner& runner) : runner_(runner) {}

  // Makes a sequence with pages for max_len tokens, rotated as its prompt's length asks. Throws
  // CapacityError.
  Sequence Make(std::vector<int32_t> prompt, int64_t max_len, const SamplingRow& sampling);

  // Makes one without tokens and pages that may grow to max_len tokens (OwnPages), rotated as that
  // length asks.
  Sequence MakeEmpty(int64_t max_len);

  // Makes another sequence of the same tokens. The pages of those that are cached belong to both.
  Sequence Fork(const Sequence& sequence);

  // Gives the sequence, before tokens from position `first` on are cached, pages for num_tokens
  // tokens, of which no other sequence owns those that are written. Throws CapacityError, changing
  // nothing.
  void OwnPages(Sequence& sequence, int64_t num_tokens, int64_t first);

  // Returns an id that no sequence has had.
  uint64_t NextId() { return next_id_++; }

 private:
  ModelRunner& runner_;
  uint64_t next_id_ = 1;
};

}  // namespace tidal
