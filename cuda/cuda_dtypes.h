// What the kernels ask of dtypes.
#pragma once

#include <initializer_list>

#include "backend/op_args.h"
#include "tidal/error.h"

namespace tidal {

inline void CheckDType(DType dtype, const char* what) {
  TIDAL_CHECK(dtype == DType::kBFloat16 || dtype == DType::kFloat16, UnsupportedError, what, ": ",
              DTypeName(dtype),
              " on CUDA; expected bfloat16 or float16: set dtype, or use device=\"cpu\"");
}

// Kernels are compiled for one 16-bit type in all the places where the seam says act or weight.
inline void CheckSameDType(const char* op, std::initializer_list<const TensorView*> tensors) {
  const TensorView* first = *tensors.begin();
  CheckDType(first->dtype, op);
  for (const TensorView* tensor : tensors) {
    TIDAL_CHECK(!*tensor || tensor->dtype == first->dtype, UnsupportedError, op, ": ",
                DTypeName(tensor->dtype), " beside ", DTypeName(first->dtype),
                "; on CUDA activations and weights share one dtype, and a cache that is not fp8");
  }
}

// The weights of a norm may be float32 instead.
inline void CheckNormDType(const char* op, const TensorView& act, const TensorView& weight) {
  if (weight.dtype != DType::kFloat32) CheckSameDType(op, {&act, &weight});
}

// A cache may be of fp8 instead.
inline void CheckCacheDType(const char* op, const TensorView& act, const PagedKv& kv) {
  if (kv.k_pages.dtype == DType::kFloat8) return;  // and V: backend/check_args.cc
  CheckSameDType(op, {&act, &kv.k_pages, &kv.v_pages});
}

inline void CheckSameDType(const char* op, const AttentionArgs& args) {
  CheckSameDType(op, {&args.q, &args.out});
  CheckCacheDType(op, args.q, args.kv);
}

}  // namespace tidal
