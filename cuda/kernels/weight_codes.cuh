// Weights kept in codes, as the skinny products read them: where a lane's codes lie in shared
// memory, and what they become, two numbers of T in a register.
//
// A lane takes 8 neighbouring inputs of a row, as of 16-bit weights; within a register they pair up
// otherwise, as a few operations on four or eight codes at once give them, and the tokens' inputs
// are put into the same order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/float8.cuh"
#include "kernels/skinny_layout.h"
#include "tidal/dtype.h"

namespace tidal {

template <typename T>
struct Int4Ops;

template <>
struct Int4Ops<__nv_bfloat16> {
  static constexpr uint32_t kIntegers = 0x43004300;  // 128, whose last bits count by 1

  __device__ static uint32_t Subtract(uint32_t a, uint32_t b) {
    __nv_bfloat162 difference =
        __hsub2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
    return *reinterpret_cast<uint32_t*>(&difference);
  }
};

template <>
struct Int4Ops<__half> {
  static constexpr uint32_t kIntegers = 0x64006400;  // 1024

  __device__ static uint32_t Subtract(uint32_t a, uint32_t b) {
    __half2 difference = __hsub2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<uint32_t*>(&difference);
  }
};

// Two int4 in the lowest bits of both halves of a register, less `zeros`: two kIntegers + zero.
template <typename T>
__device__ __forceinline__ uint32_t DecodeInt4Pair(uint32_t codes, uint32_t zeros) {
  using Ops = Int4Ops<T>;
  return Ops::Subtract((codes & 0x000f000fu) | Ops::kIntegers, zeros);
}

// What differs between kinds:
//   int Place(int row, int offset): where byte `offset` of a row of a tile lies in the row's bytes,
//     so that the loads of the lanes that read together meet in no bank;
//   uint4 Load(const unsigned char* codes, uint32_t zeros): 8 inputs of a row;
//   uint4 Order(const uint4& inputs): those of a token, in the same order.
template <typename T, WeightKind kKind>
struct WeightReader;

template <typename T>
struct WeightReader<T, WeightKind::kHalf> {
  __device__ static int Place(int row, int offset) { return SwapHalves(row, offset); }
  __device__ static uint4 Load(const unsigned char* numbers, uint32_t) {
    return *reinterpret_cast<const uint4*>(numbers);
  }
  __device__ static uint4 Order(const uint4& inputs) { return inputs; }
};

// Pairs 1 and 3, 0 and 2; 5 and 7, 4 and 6.
template <typename T>
struct Float8Reader {
  __device__ static int Place(int row, int offset) { return offset ^ ((row & 3) * 32); }
  __device__ static uint4 Load(const unsigned char* codes, uint32_t) {
    uint2 packed = *reinterpret_cast<const uint2*>(codes);
    return make_uint4(DecodeFloat8Pair<T>(packed.x), DecodeFloat8Pair<T>(packed.x << 8),
                      DecodeFloat8Pair<T>(packed.y), DecodeFloat8Pair<T>(packed.y << 8));
  }
  __device__ static uint4 Order(const uint4& inputs) {
    return make_uint4(__byte_perm(inputs.x, inputs.y, kUpperHalves),
                      __byte_perm(inputs.x, inputs.y, kLowerHalves),
                      __byte_perm(inputs.z, inputs.w, kUpperHalves),
                      __byte_perm(inputs.z, inputs.w, kLowerHalves));
  }
};
template <typename T>
struct WeightReader<T, WeightKind::kFloat8> : Float8Reader<T> {};
template <typename T>
struct WeightReader<T, WeightKind::kFloat8Grouped> : Float8Reader<T> {};

// Pairs 0 and 4, 1 and 5, 2 and 6, 3 and 7.
template <typename T>
struct WeightReader<T, WeightKind::kInt4> {
  __device__ static int Place(int row, int offset) { return offset ^ ((row & 6) * 8); }
  __device__ static uint4 Load(const unsigned char* codes, uint32_t zeros) {
    uint32_t packed = *reinterpret_cast<const uint32_t*>(codes);
    return make_uint4(DecodeInt4Pair<T>(packed, zeros), DecodeInt4Pair<T>(packed >> 4, zeros),
                      DecodeInt4Pair<T>(packed >> 8, zeros),
                      DecodeInt4Pair<T>(packed >> 12, zeros));
  }
  __device__ static uint4 Order(const uint4& inputs) {
    return make_uint4(__byte_perm(inputs.x, inputs.z, kLowerHalves),
                      __byte_perm(inputs.x, inputs.z, kUpperHalves),
                      __byte_perm(inputs.y, inputs.w, kLowerHalves),
                      __byte_perm(inputs.y, inputs.w, kUpperHalves));
  }
};

// Scales and zeros [num_groups, num_outputs] beside the codes.
struct WeightScales {
  const unsigned char* scales;
  const uint8_t* zeros;  // null: 8 everywhere
  DType dtype;           // of the scales
  int num_groups;
  int groups_per_chunk;  // 1, 2 or 4
  int chunks_per_group;  // 1 if groups_per_chunk is more

  __device__ int scale_bytes() const { return dtype == DType::kFloat32 ? 4 : 2; }
};

__device__ __forceinline__ float ReadScale(const unsigned char* scale, DType dtype) {
  if (dtype == DType::kFloat32) return *reinterpret_cast<const float*>(scale);
  if (dtype == DType::kBFloat16) {
    return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(scale));
  }
  return __half2float(*reinterpret_cast<const __half*>(scale));
}

}  // namespace tidal
