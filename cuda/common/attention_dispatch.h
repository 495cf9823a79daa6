// From a run-time dtype and head_dim to the attention kernels that are compiled in (cuda/inst).
#pragma once

#include <cstdint>

#include "backend/op_args.h"
#include "common/dispatch.h"
#include "common/head_dims.h"
#include "common/launch_config.h"
#include "core/float8.h"
#include "tidal/error.h"

namespace tidal {

// Calls fn(TypeTag<T>, std::integral_constant<int, head_dim>) for a query [.., Hq, D];
// UnsupportedError for what no kernel was compiled for.
template <typename Fn>
void DispatchAttention(const char* op, const TensorView& q, const PagedKv& kv, Fn&& fn) {
  int64_t num_q_heads = q.dim(1), head_dim = q.dim(2), num_kv_heads = kv.k_pages.dim(1);
  TIDAL_CHECK(num_kv_heads > 0 && num_q_heads % num_kv_heads == 0 &&
                  num_q_heads / num_kv_heads <= kMaxGroupSize,
              UnsupportedError, op, ": ", num_q_heads, " query heads over ", num_kv_heads,
              " KV heads on CUDA; expected a group of 1 to ", kMaxGroupSize,
              " query heads for each KV head (or use device=\"cpu\")");
  CheckHeadDim(op, head_dim, q.dtype);
  DispatchHalf(q.dtype, op, [&](auto type) {
    DispatchHeadDim<typename decltype(type)::Type>(head_dim, [&](auto dim) { fn(type, dim); });
  });
}

// Calls fn(TypeTag<T>, TypeTag<Stored>, head_dim) with the type of the cache's numbers too.
template <typename Fn>
void DispatchCachedAttention(const char* op, const TensorView& q, const PagedKv& kv, Fn&& fn) {
  DispatchAttention(op, q, kv, [&](auto type, auto head_dim) {
    if (kv.k_pages.dtype == DType::kFloat8) {
      fn(type, TypeTag<Float8>{}, head_dim);
    } else {
      fn(type, type, head_dim);
    }
  });
}

}  // namespace tidal
