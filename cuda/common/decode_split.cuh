// How the tokens that a row attends to are cut into splits, one for each block, and where the
// splits' partial results lie.
//
// Everything here is computed on the device from lengths in device memory, so that one captured
// graph stays right while sequences grow. Spans are cut by tokens, never by pages: page_size
// changes nothing.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/attention_scratch.h"
#include "common/check.h"
#include "common/launch_config.h"

namespace tidal {

// The query heads of one of the blocks for all KV heads.
struct BlockHeads {
  int kv_head;
  int first;
  int count;

  __device__ __forceinline__ BlockHeads(const HeadParts& parts, int block)
      : kv_head(parts.count == 1 ? block : block / parts.count) {
    int of_group = (block - kv_head * parts.count) * parts.heads;
    first = kv_head * parts.group_size + of_group;
    count = min(parts.heads, parts.group_size - of_group);
  }
};

// Tokens of a split: whole units, as even as these allow, but no fewer than the least, since a
// split that is not needed costs a merge. num_tokens <= kMaxAttendedTokens.
__host__ __device__ __forceinline__ int SpanLength(int num_tokens, const SplitRule& rule) {
  int num_units = (num_tokens + rule.unit - 1) / rule.unit;
  int length = (num_units + rule.num_splits - 1) / rule.num_splits * rule.unit;
  return length < rule.least ? rule.least : length;
}

// Up to how many tokens the splits have this length, which is SpanLength of some number.
__host__ __device__ __forceinline__ int64_t MostTokens(int length, const SplitRule& rule) {
  return int64_t{rule.num_splits} * length;
}

// Tokens [begin, end) of the attended ones.
struct SplitSpan {
  int begin;
  int end;
};

// The splits [0, num_used) of a row have SpanLength tokens each, the last of them what is left; the
// others have none.
struct RowSplits {
  int num_tokens;
  int length;
  int num_used;

  __device__ __forceinline__ RowSplits(int num_tokens_in, const SplitRule& rule)
      : RowSplits(num_tokens_in, SpanLength(num_tokens_in, rule)) {}
  __device__ __forceinline__ RowSplits(int num_tokens_in, int length_in)
      : num_tokens(num_tokens_in),
        length(length_in),
        num_used((num_tokens + length - 1) / length) {}

  __device__ __forceinline__ SplitSpan Span(int split) const {
    return {.begin = split * length, .end = min((split + 1) * length, num_tokens)};
  }
};

// Unnormalised results of splits, row (batch * Hq + q_head) * num_splits + split; rows of unused
// splits are neither written nor read.
struct PartialResults {
  float* out;         // [rows, PaddedHeadDim]: sum of exp(score - max) * v
  float2* state;      // [rows]: max of the scores, sum of exp(score - max)
  uint32_t* counter;  // [B * blocks for the heads of a row]: splits that are written
};

// Cuts the scratch of one op for num_rows = batch_size x num_q_heads rows, of which no more are
// counted; it is an internal error if it is too small.
inline PartialResults TakePartials(const char* op, const AttentionScratch& scratch,
                                   int64_t num_rows, int num_splits, int64_t head_dim) {
  if (num_splits == 1) return {};  // nothing to merge
  int64_t counter_bytes = scratch.counter_bytes;
  int64_t needed = counter_bytes + PartialBytes(num_rows * num_splits, head_dim);
  TIDAL_CHECK(needed <= scratch.bytes, BackendError, op, ": needs ", needed,
              " bytes of attention scratch, has ", scratch.bytes,
              "; reserve the backend for the largest step that will run");
  auto* counter = static_cast<uint32_t*>(scratch.memory);
  auto* out = reinterpret_cast<float*>(static_cast<char*>(scratch.memory) + counter_bytes);
  return {.out = out,
          .state = reinterpret_cast<float2*>(out + num_rows * num_splits * PaddedHeadDim(head_dim)),
          .counter = counter};
}

}  // namespace tidal
