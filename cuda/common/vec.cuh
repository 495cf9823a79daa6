// Element conversions to and from float32, and loads and stores of several elements at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>

#include "common/float8.cuh"

namespace tidal {

__device__ __forceinline__ float ToFloat32(float value) {
  return value;
}
__device__ __forceinline__ float ToFloat32(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ __forceinline__ float ToFloat32(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float ToFloat32(Float8 value) {
  return DecodeFloat8(value);
}

// Round to nearest even.
template <typename T>
__device__ __forceinline__ T FromFloat32(float value);
template <>
__device__ __forceinline__ float FromFloat32<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat32<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half FromFloat32<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ Float8 FromFloat32<Float8>(float value) {
  return EncodeFloat8(value);
}

// The most bytes of one load or store.
inline constexpr size_t kVecBytes = 16;

// N elements that travel as one load or store, or as several of kVecBytes; must be aligned to its
// size.
template <typename T, int N>
struct alignas(sizeof(T) * N < kVecBytes ? sizeof(T) * N : kVecBytes) Vec {
  T elements[N];
};

template <int N, typename T>
__device__ __forceinline__ void LoadFloats(const T* source, float (&values)[N]) {
  Vec<T, N> packed = *reinterpret_cast<const Vec<T, N>*>(source);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = ToFloat32(packed.elements[i]);
}

template <int N, typename T>
__device__ __forceinline__ void CopyVec(const T* source, T* destination) {
  *reinterpret_cast<Vec<T, N>*>(destination) = *reinterpret_cast<const Vec<T, N>*>(source);
}

template <int N, typename T>
__device__ __forceinline__ void StoreFloats(T* destination, const float (&values)[N]) {
  Vec<T, N> packed;
#pragma unroll
  for (int i = 0; i < N; ++i) packed.elements[i] = FromFloat32<T>(values[i]);
  *reinterpret_cast<Vec<T, N>*>(destination) = packed;
}

}  // namespace tidal
