// How products read a weight: kWidth neighbouring inputs of one output at a time, as float32.
//
// A code gives (code - zero) * scale, rounded once: what the decoded float32 weight holds, in the
// same lane. So a product does not tell codes from the numbers they stand for.
#pragma once

#include "backend/cpu/kernels/kernels.h"
#include "backend/cpu/simd/simd.h"
#include "core/mxfp4.h"

namespace tidal::TIDAL_CPU_ISA {

// Asks for the line behind that of a number that each output has one of, for outputs to come.
inline void PrefetchNext(const void* number) {
  __builtin_prefetch(static_cast<const char*>(number) + 64);
}

// Numbers [i, i + count) of a type as float32; `lanes` has whole vectors.
template <typename T>
inline void LoadLanes(const T* numbers, int64_t count, float* lanes) {
  PrefetchNext(numbers);
  ForVectors(
      count, [&](int64_t i) { Store(lanes + i, Load(numbers + i)); },
      [&](int64_t i, int rest) { Store(lanes + i, LoadPartial(numbers + i, rest)); });
}
inline void LoadLanes(const void* numbers, DType dtype, int64_t i, int64_t count, float* lanes) {
  switch (dtype) {
    case DType::kBFloat16:
      return LoadLanes(static_cast<const BFloat16*>(numbers) + i, count, lanes);
    case DType::kFloat16:
      return LoadLanes(static_cast<const Float16*>(numbers) + i, count, lanes);
    default:
      return LoadLanes(static_cast<const float*>(numbers) + i, count, lanes);
  }
}

constexpr int WholeVectors(int count) {
  return (count + kWidth - 1) / kWidth * kWidth;
}

// What differs between the kinds of weights:
//   kBits: of one input
//   Group, Open(weight, n, g, group): what the inputs of group g have in common, of some outputs
//     from n on
//   Load(p, group): kWidth inputs of a group
//   LoadPartial(p, group, count): the first `count` of them; no other memory is touched
template <typename T>
struct Numbers {
  static constexpr int kBits = 8 * sizeof(T);
  struct Group {};

  template <int kOutputs>
  static void Open(const WeightRows&, int64_t, int64_t, Group (&)[kOutputs]) {}
  static Vec Load(const uint8_t* p, Group) {
    return TIDAL_CPU_ISA::Load(reinterpret_cast<const T*>(p));
  }
  static Vec LoadPartial(const uint8_t* p, Group, int count) {
    return TIDAL_CPU_ISA::LoadPartial(reinterpret_cast<const T*>(p), count);
  }
};

// The scales of group g of some outputs from n on.
inline void LoadScales(const WeightRows& weight, int64_t n, int64_t g, int count, float* lanes) {
  LoadLanes(weight.scales, weight.scale_dtype, g * weight.group_stride + n, count, lanes);
}

// Loads the first `count` of kWidth codes; what the other lanes hold is a number.
template <typename Codes>
inline Vec LoadPartialCodes(const uint8_t* p, const typename Codes::Group& group, int count) {
  uint8_t codes[kWidth * Codes::kBits / 8] = {};
  __builtin_memcpy(codes, p, static_cast<size_t>(count * Codes::kBits / 8));
  return Codes::Load(codes, group);
}

struct Float8Codes {
  static constexpr int kBits = 8;
  using Group = Vec;  // the scale x 2^8

  template <int kOutputs>
  static void Open(const WeightRows& weight, int64_t n, int64_t g, Vec (&group)[kOutputs]) {
    float scales[WholeVectors(kOutputs)];
    LoadScales(weight, n, g, kOutputs, scales);
#pragma GCC unroll 8
    for (int c = 0; c < kOutputs; ++c) group[c] = Set1(scales[c] * 256.0f);
  }
  static Vec Load(const uint8_t* p, Vec scale) {
    return Mul(LoadFloat8(p), scale);
  }
  static Vec LoadPartial(const uint8_t* p, Vec scale, int count) {
    return LoadPartialCodes<Float8Codes>(p, scale, count);
  }
};

struct Int4Codes {
  static constexpr int kBits = 4;
  using Group = CodeTable;

  template <int kOutputs>
  static void Open(const WeightRows& weight, int64_t n, int64_t g, CodeTable (&group)[kOutputs]) {
    float scales[WholeVectors(kOutputs)];
    LoadScales(weight, n, g, kOutputs, scales);
    const uint8_t* zeros =
        weight.zeros == nullptr ? nullptr : weight.zeros + g * weight.group_stride + n;
    if (zeros != nullptr) PrefetchNext(zeros);
#pragma GCC unroll 8
    for (int c = 0; c < kOutputs; ++c) {
      const float zero = zeros == nullptr ? 8.0f : static_cast<float>(zeros[c]);
      group[c] = Int4Table(Set1(zero), Set1(scales[c]));
    }
  }
  static Vec Load(const uint8_t* p, const CodeTable& table) {
    return LookUp(table, p);
  }
  static Vec LoadPartial(const uint8_t* p, const CodeTable& table, int count) {
    return LoadPartialCodes<Int4Codes>(p, table, count);
  }
};

struct Mxfp4Codes : Int4Codes {
  template <int kOutputs>
  static void Open(const WeightRows& weight, int64_t n, int64_t g, CodeTable (&group)[kOutputs]) {
    const uint8_t* scales =
        static_cast<const uint8_t*>(weight.scales) + g * weight.group_stride + n;
    PrefetchNext(scales);
#pragma GCC unroll 8
    for (int c = 0; c < kOutputs; ++c) {
      group[c] = ScaledTable(kFloat4Values.data(), Set1(E8m0ToFloat(scales[c])));
    }
  }
};

// So many bytes are under way from memory while a core works.
inline constexpr int64_t kLeastAhead = 8 * 1024;

// Bytes of `inputs` neighbouring inputs.
template <typename W>
constexpr int64_t BytesOf(int64_t inputs) {
  return inputs * W::kBits / 8;
}

template <typename W>
void Decode(const WeightRows& weight, float* dst) {
  const int64_t size = weight.in_features;
  const uint8_t* row = static_cast<const uint8_t*>(weight.data);
  for (int64_t n = 0; n < weight.num_outputs; ++n) {
    for (int64_t begin = 0, g = 0; begin < size; begin += weight.group_size, ++g) {
      typename W::Group group[1];
      W::Open(weight, n, g, group);
      const uint8_t* from = row + BytesOf<W>(begin);
      float* to = dst + begin;
      ForVectors(
          Smaller(weight.group_size, size - begin),
          [&](int64_t k) {
            __builtin_prefetch(from + BytesOf<W>(k) + kLeastAhead);
            Store(to + k, W::Load(from + BytesOf<W>(k), group[0]));
          },
          [&](int64_t k, int rest) {
            StorePartial(to + k, W::LoadPartial(from + BytesOf<W>(k), group[0], rest), rest);
          });
    }
    row += BytesOf<W>(size);
    dst += size;
  }
}

}  // namespace tidal::TIDAL_CPU_ISA
