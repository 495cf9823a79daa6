// Device memory for the partial results of decode attention: one output row, maximum and sum for
// each (query, query head, split), and a counter for each set of splits that are merged
// (merge_splits.cuh).
#pragma once

#include <cstdint>

#include "common/launch_config.h"

namespace tidal {

struct AttentionScratch {
  // Device memory, 256-byte aligned: counters, then partial results. Zeros when it is new; every
  // op leaves the counters 0.
  void* memory = nullptr;
  int64_t bytes = 0;  // AttentionScratchBytes() of the largest head_dim
  int num_sms = 0;    // of the device
};

// The counters have a place of their own, the same for all shapes, so that no op's partial results
// ever lie where another op counts. Rows are split only as far as the blocks run at once
// (ChooseNumSplits), so fewer than that many are counted, for each of the blocks of a row.
inline int64_t CounterBytes(int num_sms) {
  constexpr int64_t kAlignment = 256;
  int64_t bytes = int64_t{kDecodeBlocksPerSm} * num_sms * kMaxBlocksOfRow *
                  static_cast<int64_t>(sizeof(uint32_t));
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Bytes for num_rows = batch_size x num_q_heads x num_splits partial rows.
inline int64_t PartialBytes(int64_t num_rows, int64_t head_dim) {
  constexpr int64_t kStateFloats = 2;  // maximum and sum
  return num_rows * (head_dim + kStateFloats) * static_cast<int64_t>(sizeof(float));
}

// Enough for every batch: where rows are split at all, ChooseNumSplits keeps num_splits x (batch
// rows x heads of the grid) within the blocks that run at once, and what a row's blocks for one KV
// head and split serve is at most kMaxFewQueries times a group.
inline int64_t AttentionScratchBytes(int64_t head_dim, int num_sms) {
  int64_t num_rows = int64_t{kDecodeBlocksPerSm} * num_sms * kMaxBlocksOfRow * kFewQueriesColumns;
  return CounterBytes(num_sms) + PartialBytes(num_rows, head_dim);
}

}  // namespace tidal
