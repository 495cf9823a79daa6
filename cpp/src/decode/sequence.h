// Sequence: a prompt and what was generated after it (in a session perhaps several times in turn),
// with the memory it owns.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "backend/op_args.h"
#include "kv/paged_kv_cache.h"

namespace tidal {

struct Sequence {
  uint64_t id = 0;  // unique in the decoder's life; a new one with other pages or parameters
  std::vector<int32_t> tokens;
  int64_t prompt_len = 0;  // tokens up to here are read densely, those behind were generated
  int64_t cached = 0;      // tokens whose K and V are in the cache
  int64_t num_sparse = 0;  // the last of those: K and V are from sparse steps
  // Tokens whose keys are in the shadow cache of this id as they are in the cache, from the first
  // on.
  uint64_t shadow_id = 0;
  int64_t shadowed = 0;
  SequencePages pages;          // for the longest the sequence, or its turn, can become
  std::vector<float> inv_freq;  // [head_dim / 2]
  SamplingRow sampling;

  bool prefilled() const { return cached >= prompt_len; }
};

}  // namespace tidal
