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

namespace tidal {

// Tokens of a split: whole tiles of a warp, as even as these allow, but no fewer than a block's
// warps take at a time, since a split that is not needed costs a merge. num_tokens <=
// kMaxAttendedTokens.
__host__ __device__ __forceinline__ int SpanLength(int num_tokens, int num_splits) {
  int num_tiles = (num_tokens + kDecodeWarpTile - 1) / kDecodeWarpTile;
  int length = (num_tiles + num_splits - 1) / num_splits * kDecodeWarpTile;
  return length < kDecodeTile ? kDecodeTile : length;
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

  __device__ __forceinline__ RowSplits(int num_tokens_in, int num_splits)
      : num_tokens(num_tokens_in),
        length(SpanLength(num_tokens, num_splits)),
        num_used((num_tokens + length - 1) / length) {}

  __device__ __forceinline__ SplitSpan Span(int split) const {
    return {.begin = split * length, .end = min((split + 1) * length, num_tokens)};
  }
};

// Unnormalised results of splits, row (batch * Hq + q_head) * num_splits + split; rows of unused
// splits are neither written nor read.
struct PartialResults {
  float* out;         // [rows, D]: sum of exp(score - max) * v
  float2* state;      // [rows]: max of the scores, sum of exp(score - max)
  uint32_t* counter;  // [B * blocks for the heads of a row]: splits that are written
};

// Cuts the scratch of one op for num_rows = batch_size x num_q_heads rows; it is an internal error
// if it is too small.
inline PartialResults TakePartials(const char* op, const AttentionScratch& scratch,
                                   int64_t num_rows, int num_splits, int64_t head_dim) {
  if (num_splits == 1) return {};  // nothing to merge
  int64_t counter_bytes = CounterBytes(scratch.num_sms);
  int64_t needed = counter_bytes + PartialBytes(num_rows * num_splits, head_dim);
  TIDAL_CHECK(needed <= scratch.bytes, BackendError, op, ": needs ", needed,
              " bytes of attention scratch, has ", scratch.bytes,
              "; reserve the backend for the largest step that will run");
  auto* counter = static_cast<uint32_t*>(scratch.memory);
  auto* out = reinterpret_cast<float*>(static_cast<char*>(scratch.memory) + counter_bytes);
  return {.out = out,
          .state = reinterpret_cast<float2*>(out + num_rows * num_splits * head_dim),
          .counter = counter};
}

}  // namespace tidal
