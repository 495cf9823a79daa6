// Attention of few queries per row, cut into spans of tokens: the core of the decode ops and of
// prefill chunks of a few tokens (flash decoding, https://pytorch.org/blog/flash-decoding).
#pragma once

#include <cstdint>

#include "backend/cpu/context.h"
#include "backend/op_args.h"

namespace tidal {

// Tokens of one span. A constant: the cut decides the rounding, which may not depend on page_size,
// batch or threads. 512 tokens of one KV head (256 KiB at head_dim 64, float32) are far longer than
// a task switch, and an 8K context still gives 16 spans a head.
inline constexpr int64_t kSpanTokens = 512;

// Queries of one row of the cache and what they attend to.
struct AttendRow {
  int64_t row = 0;           // of page_table
  const float* q = nullptr;  // [num_tokens, Hq, D]
  float* out = nullptr;      // [num_tokens, Hq, D]; absent where values are not read
  int64_t num_tokens = 0;    // the last query sees `length` tokens, the one before it one less, ...
  int64_t length = 0;  // tokens that the last query sees or is behind; with lists, of the longest
  // Positions attended to, one list of set_lengths[set] per set at token_idx + set * set_stride;
  // absent: all. With lists num_tokens is 1.
  const int32_t* token_idx = nullptr;
  const int32_t* set_lengths = nullptr;  // [num_sets]
  int64_t num_sets = 0;                  // Hq, Hkv or 1
  int64_t set_stride = 0;
  float* scores = nullptr;  // [Hq, scores_stride], or absent
  int64_t scores_stride = 0;
  float* lse = nullptr;  // [Hq], or absent

  // Set by PlanAttendRows: the first token that is read, a multiple of kTokenBlock; and where the
  // row's tasks, records and queries begin among all rows'.
  int64_t begin = 0;
  int64_t first_task = 0;
  int64_t first_record = 0;
  int64_t first_query = 0;
};

struct AttendBatch {
  const PagedKv* kv = nullptr;
  int64_t num_q_heads = 0;
  AttentionRule rule;
  bool reads_values = true;   // false: only scores and lse are wanted
  AttendRow* rows = nullptr;  // [num_rows]; num_tokens 0 = skipped
  int64_t num_rows = 0;
};

void AttendRows(CpuContext& context, const AttendBatch& batch);

// Floats of scratch for rows of `length` tokens, for Reserve.
int64_t AttendRecordFloats(int64_t num_rows, int64_t num_tokens, int64_t num_q_heads,
                           int64_t head_dim, int64_t length);

}  // namespace tidal
