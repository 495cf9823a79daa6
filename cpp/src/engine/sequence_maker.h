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

  // Makes one without tokens and pages that may grow to max_len tokens, rotated as that
  // length asks.
  Sequence MakeEmpty(int64_t max_len);

  // Makes another sequence of the same tokens. The pages of those that are cached belong to both.
  Sequence Fork(const Sequence& sequence);

  // Returns an id that no sequence has had.
  uint64_t NextId() { return next_id_++; }

 private:
  ModelRunner& runner_;
  uint64_t next_id_ = 1;
};

}  // namespace tidal
