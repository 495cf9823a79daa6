// The product of expert_linear.cuh with experts in MXFP4. A lane reads the 32 codes of a group at
// once, and the four lanes of a row four groups, which meet in one mma: so a group's scale
// multiplies its numbers before. All codes and scales of six such spans are on their way while none
// is needed: of 2,880 inputs that is a warp's whole part.
#pragma once

#include <cstdint>

#include "core/mxfp4.h"
#include "kernels/expert_linear.cuh"

namespace tidal {

template <typename T>
struct Float4Ops;

// Exponent and mantissa of a float4 go to the lowest bits of the exponent and the highest of the
// mantissa, where they mean kBelow powers of 2 less; all 16 bits twice.
template <>
struct Float4Ops<__nv_bfloat16> {
  static constexpr uint32_t kMagnitude = 0x01c001c0;
  static constexpr int kShift = 6;
  static constexpr int kBelow = 126;

  // Two of 2^exponent, of a number that is not subnormal.
  __device__ static uint32_t Power(int exponent) {
    return static_cast<uint32_t>(exponent + 127) * 0x00800080u;
  }
};

template <>
struct Float4Ops<__half> {
  static constexpr uint32_t kMagnitude = 0x0e000e00;
  static constexpr int kShift = 9;
  static constexpr int kBelow = 14;

  // Likewise as float32; rounded.
  __device__ static uint32_t Power(int exponent) {
    __half2 power = __float2half2_rn(__uint_as_float(static_cast<uint32_t>(exponent + 127) << 23));
    return *reinterpret_cast<uint32_t*>(&power);
  }
};

// What multiplies the numbers of a group. Of both types a scale up to kMostAtOnce fits into one
// factor with 2^kBelow.
template <typename T, bool kHasLarge>
struct GroupScale {
  static constexpr int kMostAtOnce = 128;
  uint32_t factor, more;

  __device__ explicit GroupScale(int scale)
      : factor(Float4Ops<T>::Power(min(scale, kMostAtOnce) - 127 + Float4Ops<T>::kBelow)),
        more(Float4Ops<T>::Power(max(scale - kMostAtOnce, 0))) {}

  __device__ uint32_t Times(uint32_t placed) const {
    const uint32_t number = Float8Ops<T>::Multiply(placed, factor);
    return kHasLarge ? Float8Ops<T>::Multiply(number, more) : number;
  }
};

// Eight float4 as numbers, in the order of WeightReader<T, kInt4>. Left shifts alone, but for one,
// share the work out to two pipes.
template <typename T, bool kHasLarge>
__device__ __forceinline__ uint4 DecodeFloat4(uint32_t codes,
                                              const GroupScale<T, kHasLarge>& scale) {
  using Ops = Float4Ops<T>;
  auto pair = [&](uint32_t from, int place) {
    const uint32_t size = (from << (Ops::kShift - 4 * place)) & Ops::kMagnitude;
    return scale.Times(((from << (12 - 4 * place)) & 0x80008000u) | size);
  };
  const uint32_t upper = codes >> 8;
  return make_uint4(pair(codes, 0), pair(codes, 1), pair(upper, 0), pair(upper, 1));
}

template <typename T, bool kGated>
class ExpertBlock<T, WeightKind::kMxfp4, kGated> : public ExpertTileBlock<T, kGated> {
  using Base = ExpertTileBlock<T, kGated>;
  static constexpr int kGroup = static_cast<int>(kMxfp4Group);
  static constexpr int kSpanGroups = 4;  // one of each lane of a row
  static constexpr int kAhead = 6;       // spans
  static constexpr int kWords = kGroup / 8;

 public:
  using Base::Base;

  // As of other kinds. Rows and choices that are not there are others' once more.
  __device__ float4 Multiply(int part) {
    const int num_groups = this->p_.num_inputs / kGroup;
    const int num_spans = (num_groups + kSpanGroups - 1) / kSpanGroups;
    const auto [begin, end] = StepsOfPart(num_spans, part);
    const Sources from(*this);
    TileSums sums = {};
    StartSums(this->ReadBiases(part), sums);
    for (int span = begin; span < end; span += kAhead) {
      Spans read;
      int largest = 0;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int group = (span + i) * kSpanGroups + this->lane_ % 4;
        read.is_there[i] = span + i < end && group < num_groups;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          read.codes[i][half] = {};
          read.scales[i][half] = 0;
          if (!read.is_there[i]) continue;
          read.codes[i][half] =
              __ldcg(reinterpret_cast<const uint4*>(from.codes[half] + group * (kGroup / 2)));
          read.scales[i][half] = from.scales[half][group * this->p_.num_rows];
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        largest = max(largest, max(read.scales[i][0], read.scales[i][1]));
      }
      const T* x = from.x + (span * kSpanGroups + this->lane_ % 4) * kGroup;
      if (__any_sync(0xffffffffu, largest > GroupScale<T, true>::kMostAtOnce)) {
        MultiplySpans<true>(read, x, sums);
      } else {
        MultiplySpans<false>(read, x, sums);
      }
    }
    return TakePart(sums);
  }

 private:
  // Where a lane reads: rows of both halves, their scales in the first group, and a token.
  struct Sources {
    const unsigned char* codes[2];
    const unsigned char* scales[2];
    const T* x;

    __device__ explicit Sources(const ExpertBlock& block) {
      const ExpertParams<T>& p = block.p_;
      const int outputs[2] = {
          min(block.rows_.first + block.lane_ / 4, block.rows_.first_end - 1),
          min(block.rows_.second + block.lane_ / 4, block.rows_.second_end - 1)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = int64_t{block.tile_.expert} * p.num_outputs + outputs[half];
        codes[half] = p.weight + row * (p.num_inputs / 2);
        scales[half] = p.weight_scales.scales + row;
      }
      const int choice = block.ChoiceOf(min(block.lane_ / 4, block.tile_.count - 1));
      x = p.x + int64_t{choice / p.choices_of_row} * p.num_inputs;
    }
  };
  struct Spans {
    uint4 codes[kAhead][2];
    int scales[kAhead][2];
    bool is_there[kAhead];
  };

  // x: of a lane's group in the first span.
  template <bool kHasLarge>
  __device__ static void MultiplySpans(const Spans& read, const T* x, TileSums& sums) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const GroupScale<T, kHasLarge> low(read.scales[i][0]), high(read.scales[i][1]);
      uint4 inputs[kWords];
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        inputs[word] = {};
        if (!read.is_there[i]) continue;
        inputs[word] = *reinterpret_cast<const uint4*>(x + i * kSpanGroups * kGroup + word * 8);
      }
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        MultiplyStep<T>(DecodeFloat4<T>(WordOf(read.codes[i][0], word), low),
                        DecodeFloat4<T>(WordOf(read.codes[i][1], word), high),
                        WeightReader<T, WeightKind::kInt4>::Order(inputs[word]), sums);
      }
    }
  }
  __device__ static uint32_t WordOf(const uint4& codes, int word) {
    return word == 0 ? codes.x : word == 1 ? codes.y : word == 2 ? codes.z : codes.w;
  }
};

}  // namespace tidal
