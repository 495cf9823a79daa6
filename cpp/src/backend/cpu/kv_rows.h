// Rows of the KV cache on the CPU, written from and read as float32: a row is one token's head.
#pragma once

#include <cstdint>

#include "backend/cpu/context.h"
#include "backend/op_args.h"

namespace tidal {

// Where a token's KV head lies: its row of the cache seen as [num_pages * Hkv * page_size, D].
int64_t KvRow(const PagedKv& kv, int64_t seq, int64_t position, int64_t head);

// The keys or the values of a cache.
struct KvHalf {
  const TensorView& pages;
  const TensorView& scales;  // absent but for int8
  float scale;
};
inline KvHalf KeysOf(const PagedKv& kv) {
  return {kv.k_pages, kv.k_scales, kv.k_scale};
}
inline KvHalf ValuesOf(const PagedKv& kv) {
  return {kv.v_pages, kv.v_scales, kv.v_scale};
}

// Writes x [D] as row `row`, with its scale if it has one.
void StoreKvRow(const KvHalf& half, int64_t row, const float* x);

// Reads `count` rows from `row` on into dst [count, D].
void LoadKvRows(const CpuContext& context, const KvHalf& half, int64_t row, int64_t count,
                float* dst);

}  // namespace tidal
