// Device memory for the partial results of decode attention: one output row, maximum and sum for
// each (batch row, query head, split), written by the attention kernels and merged by
// combine_splits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/launch_config.h"

namespace tidal {

struct AttentionScratch {
  void* partial = nullptr;  // device memory, 16-byte aligned; contents do not outlive one op
  int64_t bytes = 0;        // AttentionScratchBytes() of the largest step
  int num_sms = 0;          // of the device
};

// Bytes for num_rows = batch_size x num_q_heads x num_splits partial rows.
inline int64_t PartialBytes(int64_t num_rows, int64_t head_dim) {
  constexpr int64_t kStateFloats = 2;  // maximum and sum
  return num_rows * (head_dim + kStateFloats) * static_cast<int64_t>(sizeof(float));
}

// Enough for every batch of at most max_batch_size rows. ChooseNumSplits keeps num_splits x (batch
// rows x heads of the grid) within the blocks that run at once, or num_splits is 1; each block
// serves at most kMaxGroupSize query heads.
inline int64_t AttentionScratchBytes(int64_t max_batch_size, int64_t num_q_heads, int64_t head_dim,
                                     int num_sms) {
  int64_t split_rows = int64_t{kDecodeBlocksPerSm} * num_sms * kMaxGroupSize;
  return PartialBytes(std::max(split_rows, max_batch_size * num_q_heads), head_dim);
}

}  // namespace tidal
