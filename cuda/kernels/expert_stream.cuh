// The products of few tokens with their experts, of weights in 16 bits: bound by reading the
// weights of each chosen expert once, at memory speed. Which these are is known only when the
// kernel in front has ended; from then on as much as finds room is under way at once.
//
// A warp takes a unit, 16 outputs of a tile of choices (expert_choices.h), by itself. The copy
// engine brings its weights in boxes of 8 rows by 64 inputs, through stages that are the warp's
// own. Sums are those of expert_linear.cuh to the bit: four parts of the inputs, which are added
// up.
#pragma once

#include <cstdint>

#include "common/async_copy.cuh"
#include "common/tensor_copy.cuh"
#include "kernels/expert_linear.cuh"

namespace tidal {

inline constexpr int kUnitWarps = 8;
inline constexpr int kUnitThreads = kUnitWarps * kWarpSize;
inline constexpr int kBoxRows = kTileRows / 2;
inline constexpr int kBoxSteps = 2;  // of 32 inputs
inline constexpr int kBoxRowBytes = kBoxSteps * kStepInputs * 2;
inline constexpr int kBoxBytes = kBoxRows * kBoxRowBytes;
inline constexpr int kUnitStages = 12;
inline constexpr int kRingBytes = kUnitStages * 2 * kBoxBytes;  // of a warp
inline constexpr int kRingsBytes = kUnitWarps * (kRingBytes + kUnitStages * 8);

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

// All units, dealt to the warps of all blocks: the tile of a warp's i-th, or -1 behind the last,
// and which of an expert's tiles of outputs.
struct DealtUnits {
  int first, stride, row_tiles, count;
  __device__ int tile(int i) const {
    const int unit = first + i * stride;
    return unit < count ? unit / row_tiles : -1;
  }
  __device__ int row_tile(int i) const { return (first + i * stride) % row_tiles; }
};

// A warp's way through its units.
template <typename T, bool kGated>
class ExpertUnits {
 public:
  // shared: of kRingsBytes, a multiple of 1 KiB.
  __device__ ExpertUnits(const ExpertParams<T>& params, const CUtensorMap& weight,
                         unsigned char* shared, int warp, int lane)
      : p_(params), weight_(&weight), lane_(lane) {
    ring_ = shared + warp * kRingBytes;
    full_ = reinterpret_cast<SharedBarrier*>(shared + kUnitWarps * kRingBytes) + warp * kUnitStages;
    // The 16-byte loads of 8 lanes, of two rows, meet in no bank if these are 4 apart.
    row_ = lane / 8 + lane / 4 % 2 * 4;
    num_steps_ = (p_.num_inputs + kStepInputs - 1) / kStepInputs;
  }

  // Before the kernel in front has ended.
  __device__ void Begin() {
    if (lane_ < kUnitStages) InitBarrier(full_ + lane_, 1);
    if (lane_ == 0) PrefetchMap(weight_);
    PublishBarriers();
    __syncwarp();
  }

  __device__ void Run(const DealtUnits& units) {
    Place ahead(units, *this);
    StartFirst(units, ahead);
    for (int i = 0; units.tile(i) >= 0; ++i) {
      const ExpertTile tile = p_.order.tiles[units.tile(i)];
      const int choice = ChoiceOf(tile, lane_ / 4);
      const int choices[2] = {ChoiceOf(tile, lane_ % 4 * 2), ChoiceOf(tile, lane_ % 4 * 2 + 1)};
      const ExpertRows<kGated> rows(units.row_tile(i), p_.num_outputs);
      const float2 bias = ReadExpertBiases(rows, row_, tile.expert, p_);
      float4 parts[kExpertParts];
#pragma unroll
      for (int part = 0; part < kExpertParts; ++part) {
        TileSums sums = {};
        if (part == 0) StartSums(make_float4(bias.x, bias.x, bias.y, bias.y), sums);
        MultiplyPart(StepsOf(part), choice, units, ahead, sums);
        parts[part] = TakePart(sums);
      }
      StoreExpertSums(rows, row_, AddTree(parts), choices, p_);
    }
  }

 private:
  static constexpr int kStepsAhead = 8;

  __device__ static void PrefetchMap(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
  }
  __device__ int ChoiceOf(const ExpertTile& tile, int index) const {
    return index < tile.count ? p_.order.order[tile.first + index] : -1;
  }
  __device__ StepRange StepsOf(int part) const {
    return StepsOfPart(num_steps_, part);
  }

  // Where a copy comes from.
  struct Place {
    int unit = 0, part = 0, step = 0;
    int first_row, second_row;  // of the weight; negative: no unit

    __device__ Place(const DealtUnits& units, const ExpertUnits& all) {
      Find(units, all);
      Settle(units, all);
    }
    __device__ void Next(const DealtUnits& units, const ExpertUnits& all) {
      step += kBoxSteps;
      Settle(units, all);
    }
    // Goes on to the next step that there is: few inputs leave parts empty.
    __device__ void Settle(const DealtUnits& units, const ExpertUnits& all) {
      while (first_row >= 0 && step >= all.StepsOf(part).end) {
        if (++part == kExpertParts) {
          part = 0;
          ++unit;
          Find(units, all);
        }
        step = all.StepsOf(part).begin;
      }
    }
    __device__ void Find(const DealtUnits& units, const ExpertUnits& all) {
      const int tile = units.tile(unit);
      first_row = -1;
      if (tile < 0) return;
      const ExpertRows<kGated> rows(units.row_tile(unit), all.p_.num_outputs);
      const int base = all.p_.order.tiles[tile].expert * all.p_.num_outputs;
      first_row = base + rows.first;
      second_row = base + rows.second;
    }
  };

  // A lane each.
  __device__ void StartFirst(const DealtUnits& units, Place& ahead) {
    Place own = ahead;
#pragma unroll 1
    for (int i = 0; i < kUnitStages; ++i) {
      if (lane_ == i) own = ahead;
      ahead.Next(units, *this);
    }
    if (lane_ < kUnitStages) Start(lane_, own);
  }

  __device__ void Start(int slot, const Place& at) const {
    if (at.first_row < 0) return;
    unsigned char* stage = ring_ + slot * 2 * kBoxBytes;
    const int input = at.step * kStepInputs;
    ArriveExpecting(full_ + slot, 2 * kBoxBytes);
    CopyBox(stage, weight_, full_ + slot, input, at.first_row, policy_);
    CopyBox(stage + kBoxBytes, weight_, full_ + slot, input, at.second_row, policy_);
  }

  // A part of a unit; choice: of this lane's inputs, or -1. Each stage that is done with is filled
  // anew.
  __device__ void MultiplyPart(const StepRange& range, int choice, const DealtUnits& units,
                               Place& ahead, TileSums& sums) {
    const T* x = p_.x + int64_t{max(choice, 0) / p_.choices_of_row} * p_.num_inputs;
    for (int step = range.begin; step < range.end; step += kStepsAhead) {
      uint4 inputs[kStepsAhead];
#pragma unroll
      for (int j = 0; j < kStepsAhead; ++j) {
        const int input = (step + j) * kStepInputs + lane_ % 4 * 8;
        inputs[j] = {};
        if (step + j < range.end && input < p_.num_inputs && choice >= 0) {
          inputs[j] = *reinterpret_cast<const uint4*>(x + input);
        }
      }
#pragma unroll
      for (int j = 0; j < kStepsAhead; j += kBoxSteps) {
        if (step + j >= range.end) break;
        WaitBarrier(full_ + slot_, parity_);
        MultiplyBox(slot_, range.end - step - j, inputs + j, sums);
        __syncwarp();
        if (IsElected()) Start(slot_, ahead);
        ahead.Next(units, *this);
        if (++slot_ == kUnitStages) {
          slot_ = 0;
          parity_ ^= 1;
        }
      }
    }
  }

  __device__ void MultiplyBox(int slot, int num_steps, const uint4* inputs, TileSums& sums) const {
    const unsigned char* low = ring_ + slot * 2 * kBoxBytes + row_ * kBoxRowBytes;
#pragma unroll
    for (int i = 0; i < kBoxSteps; ++i) {
      if (i >= num_steps) break;
      const int column = ((i * 4 + lane_ % 4) ^ row_) * 16;
      MultiplyStep<T>(*reinterpret_cast<const uint4*>(low + column),
                      *reinterpret_cast<const uint4*>(low + kBoxBytes + column), inputs[i], sums);
    }
  }

  const ExpertParams<T>& p_;
  const CUtensorMap* weight_;
  int lane_, row_, num_steps_;
  unsigned char* ring_;  // [kUnitStages] two boxes
  SharedBarrier* full_;  // [kUnitStages]
  int slot_ = 0;         // of the stage that comes next, and the parity of its barrier's phase
  uint32_t parity_ = 0;
  uint64_t policy_ = EvictFirstPolicy();
};

#endif

// grid: a block for each SM; kUnitThreads.
template <typename T, bool kGated>
__global__ void __launch_bounds__(kUnitThreads, 1)
    ExpertStreamKernel(const __grid_constant__ ExpertParams<T> p,
                       const __grid_constant__ CUtensorMap weight) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  ExpertUnits<T, kGated> units(p, weight, shared_bytes, warp, lane);
  units.Begin();
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int blocks = static_cast<int>(gridDim.x),
            row_tiles = (p.num_outputs + kTileRows - 1) / kTileRows;
  const DealtUnits dealt = {static_cast<int>(blockIdx.x) + warp * blocks, blocks * kUnitWarps,
                            row_tiles, *p.order.num_tiles * row_tiles};
  units.Run(dealt);
#endif
}

}  // namespace tidal
