// How many queries and tokens each row of a pass has and where its queries begin, in the form that
// cuDNN takes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/tensor_view.h"

namespace tidal {

struct RowExtents {
  int32_t* q_lens;     // [B] queries
  int32_t* kv_lens;    // [B] tokens in the cache
  int32_t* q_offsets;  // [B + 1] elements of q in front of each row's, and in all
};

// q_starts [B + 1], seq_lens [B]: as in AttentionPrefillArgs.
void LaunchRowExtents(const TensorView& q_starts, const TensorView& seq_lens,
                      int64_t elements_per_query, const RowExtents& out, cudaStream_t stream);

}  // namespace tidal
