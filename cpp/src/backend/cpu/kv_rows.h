// Rows of the KV cache on the CPU, written from and read as float32: a row is one token's head.
#pragma once

#include <cstdint>

#include "backend/cpu/context.h"
#include "backend/op_args.h"

namespace tidal {

// Where a token's KV head lies: its row of the cache seen as [num_pages * Hkv * page_size, D].
int64_t KvRow(const PagedKv& kv, int64_t seq, int64_t position, int64_t head);

// Writes x [D] as row `row` of k_pages or v_pages, with its scale if `scales` is there.
void StoreKvRow(const TensorView& pages, const TensorView& scales, int64_t row, const float* x);

// Reads `count` rows from `row` on into dst [count, D].
void LoadKvRows(const CpuContext& context, const TensorView& pages, const TensorView& scales,
                int64_t row, int64_t count, float* dst);

}  // namespace tidal
