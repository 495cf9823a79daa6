// What the attention kernels of a decode step and the combine kernel agree on: how many tokens a
// row attends to, which of them each split takes, and where its partial result lies.
//
// Everything here is computed on the device from lengths in device memory, so that one captured
// graph stays right while sequences grow. Spans are cut by tokens, never by pages: page_size
// changes nothing.
#pragma once

#include <cstdint>

#include "common/attention_scratch.h"
#include "common/check.h"

namespace tidal {

// How many tokens a row attends to: all of its seq_len, or its selection.
struct AttendedTokens {
  const int32_t* seq_lens;      // [B]; 0 = idle row
  const int32_t* num_selected;  // [B], or nullptr: every row is dense
  int dense_len;                // rows with seq_len <= dense_len are dense
  int token_budget;             // positions a set has room for

  __device__ __forceinline__ bool IsDense(int batch) const {
    return num_selected == nullptr || __ldg(seq_lens + batch) <= dense_len;
  }
  __device__ __forceinline__ int Count(int batch) const {
    return IsDense(batch) ? __ldg(seq_lens + batch)
                          : min(__ldg(num_selected + batch), token_budget);
  }
};

// Tokens [begin, end) of the attended ones; empty if begin >= end.
struct SplitSpan {
  int begin;
  int end;
};

// Equal spans of whole tiles; the last used one may be shorter and those after it are empty.
__device__ __forceinline__ SplitSpan SpanOfSplit(int split, int num_splits, int count) {
  int num_tiles = (count + kDecodeTile - 1) / kDecodeTile;
  int span = (num_tiles + num_splits - 1) / num_splits * kDecodeTile;
  return {.begin = split * span, .end = min((split + 1) * span, count)};
}

// Unnormalised results of splits. Row (batch * Hq + q_head) * num_splits + split; rows of empty
// splits are neither written nor read.
struct PartialResults {
  float* out;     // [rows, D]: sum of exp(score - max) * v
  float2* state;  // [rows]: max of the scores, sum of exp(score - max)

  __device__ __forceinline__ static int64_t Row(int64_t batch, int num_q_heads, int q_head,
                                                int num_splits, int split) {
    return (batch * num_q_heads + q_head) * num_splits + split;
  }
};

// Cuts the scratch of one op; it is an internal error if it is too small.
inline PartialResults TakePartials(const char* op, const AttentionScratch& scratch,
                                   int64_t num_rows, int64_t head_dim) {
  int64_t needed = PartialBytes(num_rows, head_dim);
  TIDAL_CHECK(needed <= scratch.bytes, BackendError, op, ": needs ", needed,
              " bytes of attention scratch, has ", scratch.bytes,
              "; reserve the backend for the largest step that will run");
  auto* out = static_cast<float*>(scratch.partial);
  return {.out = out, .state = reinterpret_cast<float2*>(out + num_rows * head_dim)};
}

}  // namespace tidal
