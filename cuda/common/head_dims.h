// The head_dims that kernels are compiled for: 64 and 128, and, but for float16, 80, 96 and 256.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/tensor_view.h"
#include "tidal/error.h"

namespace tidal {

// dtype: of the queries, or of a cache that is read alone.
inline bool HasHeadDim(int64_t head_dim, DType dtype) {
  bool is_common = head_dim == 64 || head_dim == 128;
  bool is_less_common = head_dim == 80 || head_dim == 96 || head_dim == 256;
  return is_common || (is_less_common && dtype != DType::kFloat16);
}

// what: whose heads they are, an op or the model.
inline void CheckHeadDim(const char* what, int64_t head_dim, DType dtype) {
  TIDAL_CHECK(HasHeadDim(head_dim, DType::kBFloat16), UnsupportedError, what, ": head_dim ",
              head_dim, " on CUDA; expected 64, 80, 96, 128 or 256 (or use device=\"cpu\")");
  TIDAL_CHECK(HasHeadDim(head_dim, dtype), UnsupportedError, what, ": head_dim ", head_dim,
              " in float16 on CUDA; expected bfloat16: set dtype=\"bfloat16\", or use "
              "device=\"cpu\"");
}

// Calls fn(std::integral_constant<int, head_dim>) with what CheckHeadDim lets pass for T's dtype.
template <typename T, typename Fn>
void DispatchHeadDim(int64_t head_dim, Fn&& fn) {
  if (head_dim == 64) {
    fn(std::integral_constant<int, 64>{});
  } else if (head_dim == 128) {
    fn(std::integral_constant<int, 128>{});
  } else if constexpr (!std::is_same_v<T, __half>) {
    if (head_dim == 80) {
      fn(std::integral_constant<int, 80>{});
    } else if (head_dim == 96) {
      fn(std::integral_constant<int, 96>{});
    } else {
      fn(std::integral_constant<int, 256>{});
    }
  }
}

}  // namespace tidal
