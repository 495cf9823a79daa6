// TensorView: a typed, shaped look at memory somebody else owns. Always contiguous, row-major.
#pragma once

#include <array>
#include <cassert>
#include <cstdint>
#include <initializer_list>

#include "core/float16.h"
#include "core/float8.h"
#include "tidal/dtype.h"

namespace tidal {

template <typename T>
constexpr DType DTypeOf();
template <>
constexpr DType DTypeOf<float>() {
  return DType::kFloat32;
}
template <>
constexpr DType DTypeOf<BFloat16>() {
  return DType::kBFloat16;
}
template <>
constexpr DType DTypeOf<Float16>() {
  return DType::kFloat16;
}
template <>
constexpr DType DTypeOf<int32_t>() {
  return DType::kInt32;
}
template <>
constexpr DType DTypeOf<uint8_t>() {
  return DType::kUInt8;
}
template <>
constexpr DType DTypeOf<int8_t>() {
  return DType::kInt8;
}
template <>
constexpr DType DTypeOf<Float8>() {
  return DType::kFloat8;
}

struct TensorView {
  static constexpr int kMaxRank = 4;

  void* ptr = nullptr;  // device memory of the backend that runs the op; nullptr = absent
  DType dtype = DType::kFloat32;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};

  TensorView() = default;
  TensorView(void* data, DType type, std::initializer_list<int64_t> dims)
      : ptr(data), dtype(type), rank(static_cast<int>(dims.size())) {
    assert(rank <= kMaxRank);
    int axis = 0;
    for (int64_t dim : dims) shape[static_cast<size_t>(axis++)] = dim;
  }

  explicit operator bool() const { return ptr != nullptr; }
  int64_t dim(int axis) const {
    assert(axis < rank);
    return shape[static_cast<size_t>(axis)];
  }
  int64_t numel() const {
    int64_t count = 1;
    for (int axis = 0; axis < rank; ++axis) count *= shape[static_cast<size_t>(axis)];
    return count;
  }
  int64_t bytes() const { return numel() * DTypeBytes(dtype); }

  template <typename T>
  T* data() const {
    assert(DTypeOf<T>() == dtype);
    return static_cast<T*>(ptr);
  }

  // Rows [begin, begin + count) of the first axis.
  TensorView Rows(int64_t begin, int64_t count) const {
    assert(begin >= 0 && begin + count <= dim(0));
    TensorView rows = *this;
    int64_t row_bytes = dim(0) == 0 ? 0 : bytes() / dim(0);
    rows.ptr = static_cast<char*>(ptr) + begin * row_bytes;
    rows.shape[0] = count;
    return rows;
  }
};

}  // namespace tidal
