// From run-time element types and alignments to template parameters of kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/tensor_view.h"
#include "tidal/error.h"

namespace tidal {

// A type as a value, so that a generic lambda can take it.
template <typename T>
struct TypeTag {
  using Type = T;
};

// Calls fn(TypeTag<T>) with the device type of `dtype`; the CUDA backend computes in the 16-bit
// types.
template <typename Fn>
void DispatchHalf(DType dtype, const char* op, Fn&& fn) {
  switch (dtype) {
    case DType::kBFloat16:
      fn(TypeTag<__nv_bfloat16>{});
      return;
    case DType::kFloat16:
      fn(TypeTag<__half>{});
      return;
    default:
      throw UnsupportedError(
          Concat(op, ": dtype ", DTypeName(dtype),
                 " on CUDA; expected bfloat16 or float16 (or use device=\"cpu\")"));
  }
}

// Whether rows of `row_length` elements can be read `vector_length` elements at a time.
inline bool IsVectorizable(const TensorView& view, int64_t row_length, int vector_length) {
  auto address = reinterpret_cast<uintptr_t>(view.ptr);
  auto vector_bytes = static_cast<uintptr_t>(vector_length * DTypeBytes(view.dtype));
  return row_length % vector_length == 0 && address % vector_bytes == 0;
}

inline int64_t CeilDiv(int64_t numerator, int64_t denominator) {
  return (numerator + denominator - 1) / denominator;
}

}  // namespace tidal
