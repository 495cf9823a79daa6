// Float8 e4m3 (core/float8.h) in registers: two codes at a time to two numbers of 16 bits, for the
// tensor cores; and numbers one by one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "core/float8.h"

namespace tidal {

// Selectors of __byte_perm: of two pairs of elements both lower ones, both upper ones.
inline constexpr uint32_t kLowerHalves = 0x5410, kUpperHalves = 0x7632;

template <typename T>
struct Float8Ops;

template <>
struct Float8Ops<__nv_bfloat16> {
  static constexpr uint32_t kMagnitude = 0x07f007f0;  // exponent and mantissa behind the sign
  static constexpr int kShift = 4;
  static constexpr uint32_t kScale = 0x7b807b80;  // 2^120: from a bias of 127 to one of 7

  __device__ static uint32_t Multiply(uint32_t a, uint32_t b) {
    __nv_bfloat162 product =
        __hmul2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
    return *reinterpret_cast<uint32_t*>(&product);
  }
};

template <>
struct Float8Ops<__half> {
  static constexpr uint32_t kMagnitude = 0x3f803f80;
  static constexpr int kShift = 1;
  static constexpr uint32_t kScale = 0x5c005c00;  // 2^8: from a bias of 15 to one of 7

  __device__ static uint32_t Multiply(uint32_t a, uint32_t b) {
    __half2 product = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<uint32_t*>(&product);
  }
};

// Two float8 in the upper bytes of both halves of a register. A NaN becomes 480.
template <typename T>
__device__ __forceinline__ uint32_t DecodeFloat8Pair(uint32_t codes) {
  using Ops = Float8Ops<T>;
  uint32_t bits = (codes & 0x80008000u) | ((codes >> Ops::kShift) & Ops::kMagnitude);
  return Ops::Multiply(bits, Ops::kScale);
}

// Whether one of four float8 is a NaN.
__device__ __forceinline__ bool HasFloat8Nan(uint32_t codes) {
  return (((codes & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) != 0;
}

// Decodes one number. NaN stays NaN.
__device__ __forceinline__ float DecodeFloat8(Float8 code) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(code.bits, __NV_E4M3)));
}

// The nearest code, of two the even one; beyond the largest, 448, that. NaN stays NaN.
__device__ __forceinline__ Float8 EncodeFloat8(float value) {
  return {__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3)};
}

}  // namespace tidal
