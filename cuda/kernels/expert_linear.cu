#include "kernels/expert_linear.h"

#include <algorithm>
#include <type_traits>

#include "common/check.h"
#include "common/dispatch.h"
#include "kernels/expert_linear.cuh"
#include "kernels/expert_mxfp4.cuh"
#include "kernels/expert_stream.cuh"
#include "kernels/skinny_launch.cuh"
#include "kernels/skinny_linear.h"
#include "kernels/tiled_linear.cuh"

namespace tidal {
namespace {

constexpr int64_t kMaxInputs = 1 << 20;  // keeps byte counts within 32 bits
constexpr int kMaxGridY = 65535;

// The epilogue of a tile of many choices (skinny_block.cuh): ExpertLinear, or with GateMul behind
// it.
template <typename T, bool kGated>
struct ExpertEpilogue {
  const ExpertParams<T>& params;
  const int32_t* choices;  // of the tile
  int num_choices;
  int expert;

  __device__ TileRows Rows(int tile) const {
    ExpertRows<kGated> rows(tile, params.num_outputs);
    return {rows.first, rows.second};
  }

  struct Lane : FinishLane {
    const ExpertEpilogue& e;
    __device__ Lane(const ExpertEpilogue& epilogue, int lane, int first_token)
        : FinishLane(lane, first_token), e(epilogue) {}
    __device__ Started Begin(int) const { return {}; }
    __device__ void Finish(int tile, const Started&, const float (&values)[4]) const {
      ExpertRows<kGated> rows(tile, e.params.num_outputs);
      const float2 bias = ReadExpertBiases(rows, row, e.expert, e.params);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (token + i >= e.num_choices) continue;
        StoreExpertOutputs(rows, row, values[i] + bias.x, values[i + 2] + bias.y,
                           e.choices[token + i], e.params);
      }
    }
  };
};

template <typename T>
struct InputsOfChoices {
  const T* x;
  const int32_t* choices;
  int choices_of_row;
  int num_inputs;
  __device__ const T* Row(int token) const {
    return x + int64_t{choices[token] / choices_of_row} * num_inputs;
  }
};

// grid (most tiles, tiles of 128 outputs); kTiledThreads threads.
template <typename T, bool kGated>
__global__ void __launch_bounds__(kTiledThreads, 1)
    TiledExpertKernel(const __grid_constant__ ExpertParams<T> p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  WaitForPreviousKernel();
  LetNextKernelStart();
  if (static_cast<int>(blockIdx.x) >= *p.order.num_tiles) return;
  const ExpertTile tile = p.order.tiles[blockIdx.x];
  SkinnyParams<T> params = {};
  params.weight = p.weight + int64_t{tile.expert} * p.num_outputs * p.num_inputs * int{sizeof(T)};
  params.num_outputs = p.num_outputs;
  params.num_inputs = p.num_inputs;
  params.num_tokens = tile.count;
  params.num_tiles = (p.num_outputs + kTileRows - 1) / kTileRows;
  params.x = p.x;
  const int32_t* choices = p.order.order + tile.first;
  const InputsOfChoices<T> inputs = {p.x, choices, p.choices_of_row, p.num_inputs};
  const ExpertEpilogue<T, kGated> epilogue = {p, choices, tile.count, tile.expert};
  TiledBlock<T, ExpertEpilogue<T, kGated>, InputsOfChoices<T>> block(params, epilogue, inputs,
                                                                     shared_bytes);
  block.Run(0);
#endif
}

template <typename T>
ExpertParams<T> MakeParams(const ExpertLinearArgs& args, const GateMulArgs* gate_mul,
                           const ExpertOrder& order) {
  ExpertParams<T> p = {};
  p.weight = static_cast<const unsigned char*>(args.weight.data.ptr);
  if (args.weight.is_coded()) p.weight_scales = MakeWeightScales(args.weight);
  p.group_inputs =
      static_cast<int>(args.weight.is_coded() ? args.weight.group_size : args.x.dim(1));
  p.num_rows = args.weight.num_outputs();
  p.bias = static_cast<const T*>(args.bias.ptr);
  p.x = static_cast<const T*>(args.x.ptr);
  p.choices_of_row = static_cast<int>(args.out.dim(0) / args.x.dim(0));
  p.order = order;
  p.out = static_cast<T*>(gate_mul != nullptr ? gate_mul->out.ptr : args.out.ptr);
  p.num_outputs = static_cast<int>(args.out.dim(1));
  p.num_inputs = static_cast<int>(args.x.dim(1));
  if (gate_mul != nullptr) p.rule = RuleOf(*gate_mul);
  return p;
}

template <typename T, WeightKind kKind, bool kGated>
void LaunchStreamed(const ExpertParams<T>& params, cudaStream_t stream) {
  const int64_t row_tiles = CeilDiv(params.num_outputs, kTileRows);
  const auto blocks = static_cast<unsigned>(CeilDiv(row_tiles, kExpertRowTiles));
  for (int first = 0; first < params.order.max_tiles; first += kMaxGridY) {
    const int tiles = std::min(params.order.max_tiles - first, kMaxGridY);
    LaunchShape shape = {.grid = dim3(blocks, static_cast<unsigned>(tiles)),
                         .block = kExpertThreads};
    LaunchOverlapped("expert_linear", ExpertLinearKernel<T, kKind, kGated>, shape, stream, params,
                     first);
  }
}

// Rows so long are read faster through shared memory: those of 2,048 inputs, but not of 768.
constexpr int64_t kLeastCopiedInputs = 1024;

// Whether the copy engine brings the weight (expert_stream.cuh).
bool CopiesWeight(const Weight& weight) {
  constexpr int kCopiedNumbers = 8;  // rows and the weight begin at multiples of 16 bytes
  return !weight.is_coded() && weight.num_inputs() >= kLeastCopiedInputs &&
         weight.num_outputs() <= INT32_MAX &&
         IsVectorizable(weight.data, weight.num_inputs(), kCopiedNumbers) && HasSharedMemory() &&
         RunsHopperCode(ExpertStreamKernel<__nv_bfloat16, false>);
}

// Its boxes.
template <typename T>
CUtensorMap MapOfExperts(const Weight& weight) {
  static const auto encode = FindTensorMapEncode();
  return MakeTensorMap<T, 2>(
      encode, weight.data.ptr,
      {static_cast<uint64_t>(weight.num_inputs()), static_cast<uint64_t>(weight.num_outputs())},
      {kBoxSteps * kStepInputs, kBoxRows});
}

template <typename T, bool kGated>
void LaunchCopied(const ExpertParams<T>& params, const Weight& weight, int num_sms,
                  cudaStream_t stream) {
  LaunchShape shape = {.grid = static_cast<unsigned>(num_sms),
                       .block = kUnitThreads,
                       .shared_bytes = static_cast<size_t>(kRingsBytes)};
  auto kernel = ExpertStreamKernel<T, kGated>;
  TIDAL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shape.shared_bytes)));
  LaunchOverlapped("expert_linear", kernel, shape, stream, params, MapOfExperts<T>(weight));
}

template <typename T, bool kGated>
void LaunchTiledExperts(const ExpertParams<T>& params, cudaStream_t stream) {
  const int64_t row_tiles = CeilDiv(params.num_outputs, kTileRows);
  LaunchShape shape = {.grid = dim3(static_cast<unsigned>(params.order.max_tiles),
                                    static_cast<unsigned>(CeilDiv(row_tiles, kBlockTiles))),
                       .block = kTiledThreads,
                       .shared_bytes = kTiledSharedBytes};
  auto kernel = TiledExpertKernel<T, kGated>;
  TIDAL_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTiledSharedBytes));
  LaunchOverlapped("expert_linear", kernel, shape, stream, params);
}

}  // namespace

bool TakesExperts(const Weight& weight, int64_t num_outputs) {
  const int64_t num_inputs = weight.num_inputs();
  // Loads of 8 inputs, and of groups of whole steps.
  bool divides = num_inputs % 8 == 0;
  if (weight.is_coded()) {
    const int64_t group = weight.group_size;
    const bool is_mxfp4 = weight.codes == WeightCodes::kMxfp4;
    divides = num_inputs % kStepInputs == 0 &&
              (is_mxfp4 ? group == kMxfp4Group : group == num_inputs || group % kStepInputs == 0);
  }
  return divides && num_inputs <= kMaxInputs && num_outputs % 2 == 0 && num_outputs <= INT32_MAX;
}

bool TilesExperts(const Weight& weight) {
  return !weight.is_coded() && RunsHopperCode(TiledExpertKernel<__nv_bfloat16, false>);
}

void LaunchExpertLinear(const ExpertLinearArgs& args, const GateMulArgs* gate_mul,
                        const ExpertOrder& order, int num_sms, cudaStream_t stream) {
  const bool is_tiled = order.tile_choices == kTiledChoices;
  DispatchHalf(args.x.dtype, "expert_linear", [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const ExpertParams<T> params = MakeParams<T>(args, gate_mul, order);
    auto launch = [&](auto gated) {
      if (is_tiled) {
        LaunchTiledExperts<T, gated()>(params, stream);
        return;
      }
      if (CopiesWeight(args.weight)) {
        LaunchCopied<T, gated()>(params, args.weight, num_sms, stream);
        return;
      }
      if (args.weight.codes == WeightCodes::kMxfp4) {
        LaunchStreamed<T, WeightKind::kMxfp4, gated()>(params, stream);
        return;
      }
      DispatchKind(args.weight,
                   [&](auto kind) { LaunchStreamed<T, kind(), gated()>(params, stream); });
    };
    if (gate_mul != nullptr) {
      launch(std::true_type());
    } else {
      launch(std::false_type());
    }
  });
}

}  // namespace tidal
