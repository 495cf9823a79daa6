// The product of few tokens with their experts: bound by reading the weights of each chosen expert
// once, at memory speed. A tile is up to 8 choices of one expert; a block has 32 of its outputs.
// Four warps share the inputs of 16 outputs, read them straight into registers, as the fragments of
// an mma (skinny_sums.cuh), and add up. Long rows of 16 bits come otherwise: expert_stream.cuh.
#pragma once

#include <cstdint>

#include "common/dependent_launch.cuh"
#include "common/elementwise.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "kernels/expert_choices.h"
#include "kernels/skinny_sums.cuh"
#include "kernels/weight_codes.cuh"

namespace tidal {

inline constexpr int kExpertParts = 4;     // of the inputs, a warp each
inline constexpr int kExpertRowTiles = 2;  // of a block
inline constexpr int kExpertThreads = kExpertParts * kExpertRowTiles * kWarpSize;

// Blocks that must find room for their registers in an SM; 0: the compiler's choice is as good.
constexpr int LeastBlocks(WeightKind kind, bool gated) {
  if (kind == WeightKind::kMxfp4) return 2;
  return kind == WeightKind::kFloat8 && gated ? 3 : 0;
}

template <typename T>
struct ExpertParams {
  const unsigned char* weight;  // [E * N, K], as the kernel's WeightKind says
  WeightScales weight_scales;   // unless kHalf
  int group_inputs;             // of a scale; K without groups
  int64_t num_rows;             // E * N
  const T* bias;                // [E * N] or null
  const T* x;                   // [T, K], or [T * k, K]
  int choices_of_row;           // of x: k, or 1
  ExpertOrder order;
  T* out;           // [T * k, N]; gated [T * k, N / 2]
  int num_outputs;  // N
  int num_inputs;   // K
  GateRule rule;
};

// The outputs of a tile, within an expert: 8 from `first` on and 8 from `second` on, before `end`
// of each.
template <bool kGated>
struct ExpertRows {
  int first, second, first_end, second_end;

  __device__ ExpertRows(int tile, int num_outputs) {
    constexpr int kHalf = kTileRows / 2;
    if constexpr (kGated) {
      first = tile * kHalf;
      first_end = num_outputs / 2;
      second = first_end + first;
    } else {
      first = tile * kTileRows;
      first_end = num_outputs;
      second = first + kHalf;
    }
    second_end = num_outputs;
  }
};

// The steps of 32 inputs that belong to a part.
struct StepRange {
  int begin, end;
};
__device__ __forceinline__ StepRange StepsOfPart(int num_steps, int part) {
  return {num_steps * part / kExpertParts, num_steps * (part + 1) / kExpertParts};
}

__device__ __forceinline__ void StartSums(const float4& from, TileSums& sums) {
  sums[0][0] = from.x;
  sums[0][1] = from.y;
  sums[0][2] = from.z;
  sums[0][3] = from.w;
}

// Reads the biases of two of an expert's outputs in a tile, the row-th of both halves.
template <typename T, bool kGated>
__device__ __forceinline__ float2 ReadExpertBiases(const ExpertRows<kGated>& rows, int row,
                                                   int expert, const ExpertParams<T>& p) {
  const T* bias = p.bias == nullptr ? nullptr : p.bias + int64_t{expert} * p.num_outputs;
  const int first = rows.first + row, second = rows.second + row;
  return make_float2(first < rows.first_end ? BiasOf(bias, first) : 0.0f,
                     second < rows.second_end ? BiasOf(bias, second) : 0.0f);
}

// Stores what a product gives for two of a tile's outputs, the row-th of both halves, for a choice.
template <typename T, bool kGated>
__device__ __forceinline__ void StoreExpertOutputs(const ExpertRows<kGated>& rows, int row,
                                                   float first, float second, int choice,
                                                   const ExpertParams<T>& p) {
  if constexpr (kGated) {
    const int output = rows.first + row;
    if (output >= rows.first_end) return;
    p.out[int64_t{choice} * rows.first_end + output] =
        FromFloat32<T>(ActivationTimes(p.rule, first, second));
  } else {
    T* out = p.out + int64_t{choice} * p.num_outputs;
    if (rows.first + row < rows.first_end) out[rows.first + row] = FromFloat32<T>(first);
    if (rows.second + row < rows.second_end) out[rows.second + row] = FromFloat32<T>(second);
  }
}

// Likewise, the sums of two choices, of which -1 is none.
template <typename T, bool kGated>
__device__ __forceinline__ void StoreExpertSums(const ExpertRows<kGated>& rows, int row,
                                                const float4& sums, const int (&choices)[2],
                                                const ExpertParams<T>& p) {
  if (choices[0] >= 0) StoreExpertOutputs(rows, row, sums.x, sums.z, choices[0], p);
  if (choices[1] >= 0) StoreExpertOutputs(rows, row, sums.y, sums.w, choices[1], p);
}

// A tile and 16 outputs: what does not depend on how the weight is kept.
template <typename T, bool kGated>
class ExpertTileBlock {
 public:
  __device__ ExpertTileBlock(const ExpertParams<T>& params, const ExpertTile& tile)
      : p_(params),
        tile_(tile),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        rows_(static_cast<int>(blockIdx.x) * kExpertRowTiles + RowTile(), params.num_outputs) {}

  // The sums of a tile: lane l has outputs l / 4 of both halves, of choices 2 (l % 4) and the next.
  __device__ void Store(const float4& sums) const {
    const int first = lane_ % 4 * 2;
    StoreExpertSums(rows_, lane_ / 4, sums, {ChoiceOf(first), ChoiceOf(first + 1)}, p_);
  }

  __device__ static int RowTile() {
    return static_cast<int>(threadIdx.x) / kWarpSize / kExpertParts;
  }

 protected:
  // The index-th of the tile, or -1.
  __device__ int ChoiceOf(int index) const {
    return index < tile_.count ? p_.order.order[tile_.first + index] : -1;
  }
  __device__ float4 ReadBiases(int part) const {
    if (part != 0) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float2 of = ReadExpertBiases(rows_, lane_ / 4, tile_.expert, p_);
    return make_float4(of.x, of.x, of.y, of.y);
  }

  const ExpertParams<T>& p_;
  ExpertTile tile_;
  int lane_;
  ExpertRows<kGated> rows_;
};

template <typename T, WeightKind kKind, bool kGated>
class ExpertBlock : public ExpertTileBlock<T, kGated> {
  using Base = ExpertTileBlock<T, kGated>;
  using Base::lane_, Base::p_, Base::rows_, Base::tile_;
  using Codes = typename WeightReader<T, kKind>::Codes;
  using Reader = WeightReader<T, kKind>;
  static constexpr int kLaneInputs = 8;
  static constexpr int kAhead = kKind == WeightKind::kHalf ? 4 : 8;  // steps that are read at once
  static constexpr bool kGrouped = IsGrouped(kKind);

 public:
  using Base::Base;

  // Returns a warp's part of the sums of its 16 outputs. Those of the first part start at the bias,
  // which is so read with the weight and not behind it, unless a row's scale is yet to come.
  __device__ float4 Multiply(int part) {
    const int64_t row_bytes = int64_t{p_.num_inputs} * BitsOf(kKind) / 8;
    const int64_t row[2] = {FirstRow(), SecondRow()};
    const unsigned char* codes[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) codes[half] = p_.weight + max(row[half], 0l) * row_bytes;
    const int choice = this->ChoiceOf(lane_ / 4);
    const T* x = p_.x + int64_t{max(choice, 0) / p_.choices_of_row} * p_.num_inputs;

    const int num_steps = (p_.num_inputs + kStepInputs - 1) / kStepInputs;
    const auto [begin, end] = StepsOfPart(num_steps, part);
    TileSums sums = {};
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if constexpr (kGrouped) total = this->ReadBiases(part);
    if constexpr (kKind == WeightKind::kHalf) StartSums(this->ReadBiases(part), sums);
    for (int step = begin; step < end; step += kAhead) {
      Codes read[kAhead][2];
      uint4 inputs[kAhead];
      ScalesOfStep scales[kGrouped ? kAhead : 1] = {};
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int input = (step + i) * kStepInputs + lane_ % 4 * kLaneInputs;
        const bool is_there = step + i < end && input < p_.num_inputs;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          read[i][half] = {};
          if (is_there && row[half] >= 0) {
            read[i][half] =
                __ldcg(reinterpret_cast<const Codes*>(codes[half] + input * BitsOf(kKind) / 8));
          }
        }
        inputs[i] = {};
        if (is_there && choice >= 0) inputs[i] = *reinterpret_cast<const uint4*>(x + input);
        if constexpr (kGrouped) scales[i] = ReadScales(row, (step + i) * kStepInputs, is_there);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const ScalesOfStep& of = scales[kGrouped ? i : 0];
        const uint4 low = Decode(read[i][0], of.zeros[0]), high = Decode(read[i][1], of.zeros[1]);
        MultiplyStep<T>(low, high, Reader::Order(inputs[i]), sums);
        if constexpr (kGrouped) AddScaled(TakePart(sums), of, total);
      }
    }
    if constexpr (!kGrouped) total = TakePart(sums);
    return total;
  }

  __device__ void Store(const float4& sums) const {
    if constexpr (kKind == WeightKind::kFloat8) {
      Base::Store(WithRowScales(sums));
    } else {
      Base::Store(sums);
    }
  }

 private:
  // Scales and zeros of one step, for the rows of both halves.
  struct ScalesOfStep {
    float scale[2];
    uint32_t zeros[2];
  };

  // The weight's row of a lane, or -1.
  __device__ int64_t RowOf(int first, int end) const {
    const int row = first + lane_ / 4;
    return row < end ? int64_t{tile_.expert} * p_.num_outputs + row : -1;
  }
  __device__ int64_t FirstRow() const {
    return RowOf(rows_.first, rows_.first_end);
  }
  __device__ int64_t SecondRow() const {
    return RowOf(rows_.second, rows_.second_end);
  }
  __device__ float ScaleOf(int64_t row, int group) const {
    const WeightScales& s = p_.weight_scales;
    return ReadScale(s.scales + (group * p_.num_rows + row) * s.scale_bytes(), s.dtype);
  }
  __device__ float4 WithRowScales(const float4& sums) const {
    const int64_t first = FirstRow(), second = SecondRow();
    const ScalesOfStep scales = {
        {first < 0 ? 0.0f : ScaleOf(first, 0), second < 0 ? 0.0f : ScaleOf(second, 0)}, {}};
    float4 total = this->ReadBiases(0);
    AddScaled(sums, scales, total);
    return total;
  }
  __device__ ScalesOfStep ReadScales(const int64_t (&row)[2], int first_input,
                                     bool is_there) const {
    ScalesOfStep read = {};
    if (!is_there) return read;
    const int group = first_input / p_.group_inputs;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row[half] < 0) continue;
      read.scale[half] = ScaleOf(row[half], group);
      if constexpr (kKind == WeightKind::kInt4) {
        const uint8_t* zeros = p_.weight_scales.zeros;
        const uint32_t zero = zeros == nullptr ? 8 : zeros[group * p_.num_rows + row[half]];
        read.zeros[half] = Int4Ops<T>::kIntegers + zero * 0x00010001u;
      }
    }
    return read;
  }
  __device__ static uint4 Decode(const Codes& codes, uint32_t zeros) {
    return Reader::Decode(codes, zeros);
  }
  __device__ static void AddScaled(const float4& part, const ScalesOfStep& scales, float4& total) {
    total.x = __fmaf_rn(part.x, scales.scale[0], total.x);
    total.y = __fmaf_rn(part.y, scales.scale[0], total.y);
    total.z = __fmaf_rn(part.z, scales.scale[1], total.z);
    total.w = __fmaf_rn(part.w, scales.scale[1], total.w);
  }
};

// grid (ceil(outputs / 32), tiles from first_tile on, some of which may not be there);
// kExpertThreads threads.
template <typename T, WeightKind kKind, bool kGated>
__global__ void __launch_bounds__(kExpertThreads, LeastBlocks(kKind, kGated))
    ExpertLinearKernel(const __grid_constant__ ExpertParams<T> p, int first_tile) {
  __shared__ float4 parts[kExpertRowTiles][kExpertParts][kWarpSize];
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int tile = first_tile + static_cast<int>(blockIdx.y);
  if (tile >= *p.order.num_tiles) return;
  ExpertBlock<T, kKind, kGated> block(p, p.order.tiles[tile]);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int part = static_cast<int>(threadIdx.x) / kWarpSize % kExpertParts;
  float4(&own)[kExpertParts][kWarpSize] = parts[block.RowTile()];
  own[part][lane] = block.Multiply(part);
  __syncthreads();
  if (part != 0) return;
  float4 sums[kExpertParts];
#pragma unroll
  for (int i = 0; i < kExpertParts; ++i) sums[i] = own[i][lane];
  block.Store(AddTree(sums));
}

}  // namespace tidal
