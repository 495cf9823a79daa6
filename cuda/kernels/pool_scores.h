// The keys that positions are ranked by, made by all processors before a cluster of blocks a set
// chooses among them (select_top_k.cu).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/op_args.h"

namespace tidal {

// What the ranking of the sets [B, num_sets] works on, in device memory.
struct RankedKeys {
  // [B, num_sets, row_length]: order-preserving keys of the pooled scores, up to a row's last.
  uint32_t* keys;
  int64_t row_length;  // a multiple of kKeyRun
  // [B, num_sets, kRadixBins]: how many of the keys that compete have each first digit.
  uint32_t* first_digits;
};

inline constexpr int kKeyRun = 16;  // adjacent keys that a thread of the choice takes

// Makes the keys and counts their first digits, which are zeros before.
void LaunchPoolScores(const SelectTopKArgs& args, const RankedKeys& ranked, cudaStream_t stream);

}  // namespace tidal
