// Pages of an fp8 cache as numbers of 16 bits: what the kernels that read prompts take.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/op_args.h"

namespace tidal {

// Bytes for a row of num_tokens tokens in pages of one layer [Hkv, page_size, D], K and V, and in a
// page table. Tokens count in whole pages of the largest size, so that how many rows find room does
// not depend on page_size.
inline int64_t DecodedRowBytes(int64_t num_tokens, int64_t num_kv_heads, int64_t page_size,
                               int64_t head_dim) {
  constexpr int64_t kMaxPageSize = 256;
  const int64_t num_pages =
      (num_tokens + kMaxPageSize - 1) / kMaxPageSize * kMaxPageSize / page_size;
  const int64_t numbers = num_kv_heads * page_size * head_dim;
  return num_pages * (2 * numbers * DTypeBytes(DType::kFloat16) + DTypeBytes(DType::kInt32));
}

// Decodes the pages of all rows, of which none has more than pages_of_row, into `memory`, aligned
// to
// 16. Returns them as a cache of the queries' dtype, with the scales of the old one. Pages in front
// of the tile of kPromptTokens in which a row's first window begins are left as they are.
PagedKv LaunchDecodePages(const AttentionPrefillArgs& args, int64_t pages_of_row, void* memory,
                          cudaStream_t stream);

}  // namespace tidal
