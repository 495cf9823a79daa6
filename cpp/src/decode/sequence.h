// Sequence: one prompt and what was generated after it, with the memory it owns.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "backend/op_args.h"
#include "kv/paged_kv_cache.h"

namespace tidal {

struct Sequence {
  uint64_t id = 0;              // unique in the decoder's life
  std::vector<int32_t> tokens;  // prompt, then generated
  int64_t prompt_len = 0;
  int64_t cached = 0;           // tokens whose K and V are in the cache
  int64_t num_sparse = 0;       // the last of those: K and V are from sparse steps
  SequencePages pages;          // for the longest the sequence can become
  std::vector<float> inv_freq;  // [head_dim / 2]
  SamplingRow sampling;

  bool prefilled() const { return cached >= prompt_len; }
};

}  // namespace tidal
