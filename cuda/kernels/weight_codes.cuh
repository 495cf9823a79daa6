// Weights kept in codes, as the products of few tokens read them: what codes become, two numbers of
// T in a register, and where they lie in shared memory.
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
  uint32_t integers;  // (codes & 0x000f000f) | kIntegers, for which the compiler takes two
  asm("lop3.b32 %0, %1, %2, %3, 0xea;"
      : "=r"(integers)
      : "r"(codes), "n"(0x000f000f), "r"(Int4Ops<T>::kIntegers));
  return Int4Ops<T>::Subtract(integers, zeros);
}

// What differs between kinds:
//   Codes: a run of 8 inputs of a row, as it is stored;
//   uint4 Decode(const Codes& codes, uint32_t zeros): their numbers;
//   uint4 Order(const uint4& inputs): those of a token, in the same order.
// And for kinds in codes (coded_linear.cuh):
//   kRunsOfLoad: in 16 bytes; Codes Run(const uint4& load, int index): one of them;
//   int Place(int row, int column): where 16 bytes of a row of a copied box lie in that row.
template <typename T, WeightKind kKind>
struct WeightReader;

template <typename T>
struct WeightReader<T, WeightKind::kHalf> {
  using Codes = uint4;
  __device__ static uint4 Decode(const uint4& numbers, uint32_t) { return numbers; }
  __device__ static uint4 Order(const uint4& inputs) { return inputs; }
};

// Pairs 1 and 3, 0 and 2; 5 and 7, 4 and 6.
template <typename T>
struct Float8Reader {
  using Codes = uint2;
  static constexpr int kRunsOfLoad = 2;
  __device__ static int Place(int row, int column) { return column ^ row; }
  __device__ static uint2 Run(const uint4& load, int index) {
    return index == 0 ? make_uint2(load.x, load.y) : make_uint2(load.z, load.w);
  }
  __device__ static uint4 Decode(const uint2& packed, uint32_t) {
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
  using Codes = uint32_t;
  static constexpr int kRunsOfLoad = 4;
  __device__ static int Place(int, int column) { return column; }
  __device__ static uint32_t Run(const uint4& load, int index) {
    return index == 0 ? load.x : index == 1 ? load.y : index == 2 ? load.z : load.w;
  }
  __device__ static uint4 Decode(uint32_t packed, uint32_t zeros) {
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
  int num_sets;          // ScaleSets

  __device__ int scale_bytes() const { return dtype == DType::kFloat32 ? 4 : 2; }
  // The group of a chunk's first input.
  __device__ int FirstGroup(int chunk) const {
    return chunks_per_group == 1 ? chunk * groups_per_chunk : chunk / chunks_per_group;
  }
};

__device__ __forceinline__ float ReadScale(const unsigned char* scale, DType dtype) {
  if (dtype == DType::kFloat32) return *reinterpret_cast<const float*>(scale);
  if (dtype == DType::kBFloat16) {
    return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(scale));
  }
  return __half2float(*reinterpret_cast<const __half*>(scale));
}

}  // namespace tidal
