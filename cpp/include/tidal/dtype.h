// Element types of tensors. The float types are storage types: all arithmetic accumulates in
// float32. int8 and fp8 are codes of a KV cache (core/int8_row.h, core/float8.h).
#pragma once

#include <cstdint>

namespace tidal {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kInt32, kUInt8, kInt8, kFloat8 };

constexpr int64_t DTypeBytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kUInt8:
    case DType::kInt8:
    case DType::kFloat8:
      return 1;
  }
  return 0;
}

constexpr const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kInt32:
      return "int32";
    case DType::kUInt8:
      return "uint8";
    case DType::kInt8:
      return "int8";
    case DType::kFloat8:
      return "fp8";
  }
  return "unknown";
}

}  // namespace tidal
