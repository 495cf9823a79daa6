// Device memory for the partial results of attention: one output row, maximum and sum for each
// (query, query head, split), and a counter for each set of splits that are merged
// (merge_splits.cuh, attention_prefill_hopper.cuh).
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/launch_config.h"

namespace tidal {

struct AttentionScratch {
  // Device memory, 256-byte aligned: counters, then partial results. Zeros when it is new; every
  // op leaves the counters 0.
  void* memory = nullptr;
  int64_t bytes = 0;
  // The counters have a place of their own, the same for all shapes, so that no op's partial
  // results ever lie where another op counts.
  int64_t counter_bytes = 0;
  int num_sms = 0;  // of the device
  Splitting splitting = Splitting::kByBatch;
};

// Bytes for num_rows = batch_size x num_q_heads x num_splits partial rows.
inline int64_t PartialBytes(int64_t num_rows, int64_t head_dim) {
  constexpr int64_t kStateFloats = 2;  // maximum and sum
  return num_rows * (PaddedHeadDim(head_dim) + kStateFloats) * static_cast<int64_t>(sizeof(float));
}

// Bytes for what num_blocks blocks of attention_prefill_hopper leave to be merged: of each row an
// output, and its maximum and sum for each of the four threads that share it.
inline constexpr int64_t PromptPartBytes(int64_t num_blocks, int64_t head_dim) {
  constexpr int64_t kStateFloats = 4 * 2;
  return num_blocks * kPromptRows * (head_dim + kStateFloats) * static_cast<int64_t>(sizeof(float));
}

// What AttentionScratch needs.
struct AttentionScratchSize {
  int64_t counter_bytes = 0;
  int64_t partial_bytes = 0;

  int64_t Total() const { return counter_bytes + partial_bytes; }
};

// Enough for every batch that is split by batch: where rows are split at all, ChooseNumSplits keeps
// num_splits x (batch rows x heads of the grid) within the blocks that run at once, fewer are
// counted, for each of the blocks of a row, and what a row's blocks for one KV head and split serve
// is at most kMaxFewQueries times a group; ChoosePromptSplits keeps within kMaxPromptWaves. Where
// each row is split as if alone, for one row of few queries, and decode attention of all rows.
inline AttentionScratchSize SizeOfAttentionScratch(Splitting splitting, int64_t batch_size,
                                                   int64_t num_q_heads, int64_t head_dim,
                                                   int num_sms) {
  constexpr int64_t kAlignment = 256;
  int64_t num_counters = int64_t{kDecodeBlocksPerSm} * num_sms * kMaxBlocksOfRow;
  int64_t num_rows = num_counters * kFewQueriesColumns;
  if (splitting == Splitting::kByRow) {
    num_counters = std::max(num_counters, batch_size * num_q_heads);
    num_rows = std::max(num_rows, batch_size * num_q_heads * kMaxSplits);
  }
  int64_t counter_bytes = num_counters * static_cast<int64_t>(sizeof(uint32_t));
  counter_bytes = (counter_bytes + kAlignment - 1) / kAlignment * kAlignment;
  int64_t partial_bytes = PartialBytes(num_rows, head_dim);
  if (splitting == Splitting::kByBatch && IsPromptHeadDim(head_dim)) {
    int64_t num_blocks = int64_t{kMaxPromptWaves} * num_sms;
    partial_bytes = std::max(partial_bytes, PromptPartBytes(num_blocks, head_dim));
  }
  return {.counter_bytes = counter_bytes, .partial_bytes = partial_bytes};
}

}  // namespace tidal
