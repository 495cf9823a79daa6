// The products of few tokens with their experts by the kernels that stream a weight
// (skinny_linear.cuh): a tile of outputs is one of an expert and of up to 8 choices of it, which
// are known when the kernel in front has ended.
#pragma once

#include "kernels/expert_linear.cuh"
#include "kernels/expert_run.h"
#include "kernels/skinny_epilogue.cuh"
#include "kernels/skinny_launch.cuh"

namespace tidal {

// Tiles in the order of the choices' tiles, row_tiles of outputs for each.
template <typename T>
struct ChosenTokens {
  static constexpr bool kAreChosen = true;
  const ExpertParams<T>& params;
  int row_tiles;

  __device__ int NumTiles() const { return *params.order.num_tiles * row_tiles; }
  __device__ const ExpertTile& Of(int tile) const { return params.order.tiles[tile / row_tiles]; }
  __device__ const T* Row(int tile, int token) const {
    const ExpertTile& of = Of(tile);
    if (token >= of.count) return nullptr;
    const int choice = params.order.order[of.first + token];
    return params.x + int64_t{choice / params.choices_of_row} * params.num_inputs;
  }
};

template <typename T, bool kGated>
struct StreamedExpertEpilogue {
  ChosenTokens<T> tokens;

  __device__ ExpertRows<kGated> RowsOf(int tile) const {
    return {tile % tokens.row_tiles, tokens.params.num_outputs};
  }
  // Of all experts' rows. Those past an expert's are another's: they are read, and not stored.
  __device__ TileRows Rows(int tile) const {
    const ExpertRows<kGated> rows = RowsOf(tile);
    const int before = tokens.Of(tile).expert * tokens.params.num_outputs;
    return {before + rows.first, before + rows.second};
  }

  struct Lane : FinishLane {
    struct Started {
      int choices[2];  // -1: none
    };
    const StreamedExpertEpilogue& e;
    __device__ Lane(const StreamedExpertEpilogue& epilogue, int lane, int first_token)
        : FinishLane(lane, first_token), e(epilogue) {}
    __device__ Started Begin(int tile) const {
      const ExpertTile& of = e.tokens.Of(tile);
      Started started;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool is_there = token + i < of.count;
        started.choices[i] = is_there ? e.tokens.params.order.order[of.first + token + i] : -1;
      }
      return started;
    }
    __device__ void Finish(int tile, const Started& started, const float (&values)[4]) const {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (started.choices[i] < 0) continue;
        StoreExpertOutputs(e.RowsOf(tile), row, values[i], values[i + 2], started.choices[i],
                           e.tokens.params);
      }
    }
  };
};

// grid: at most one block for each SM.
template <typename T, WeightKind kKind, bool kGated>
__global__ void __launch_bounds__(SkinnyShape<kTileTokens, kKind>::kThreads, 1)
    StreamedExpertKernel(const __grid_constant__ SkinnyParams<T> params,
                         const __grid_constant__ ExpertParams<T> experts, int row_tiles) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  const ChosenTokens<T> tokens = {experts, row_tiles};
  const StreamedExpertEpilogue<T, kGated> epilogue = {tokens};
  SkinnyBlock<T, StreamedExpertEpilogue<T, kGated>, false, kTileTokens, kKind, ChosenTokens<T>>
      block(params, epilogue, shared_bytes, tokens);
  if (threadIdx.x == 0) block.InitBarriers();
  __syncthreads();
  if (threadIdx.x / kWarpSize >= SkinnyShape<kTileTokens, kKind>::kWarps) {
    block.Finish();
  } else {
    block.Multiply();
  }
#endif
}

template <typename T, WeightKind kKind, bool kGated>
void LaunchStreamedExperts(const ExpertParams<T>& experts, const Weight& weight,
                           const ExpertRun& run) {
  using Shape = SkinnyShape<kTileTokens, kKind>;
  SkinnyParams<T> params = {};
  params.weight = experts.weight;
  params.weight_scales = experts.weight_scales;
  params.num_outputs = static_cast<int>(experts.num_rows);
  params.num_inputs = experts.num_inputs;
  params.num_tokens = kTileTokens;
  params.x = experts.x;
  params.layout =
      MakeSkinnyLayout<kTileTokens, kKind>({.num_inputs = params.num_inputs,
                                            .num_tokens = kTileTokens,
                                            .normed = false,
                                            .max_stages = kMaxStages,
                                            .scale_bytes_per_row = ScaleBytesPerRow(weight)});
  const int64_t groups = CeilDiv(experts.num_outputs, kTileRows * Shape::kRowTiles);
  const int64_t most = groups * experts.order.max_tiles;
  auto kernel = StreamedExpertKernel<T, kKind, kGated>;
  LaunchShape shape = {.grid = static_cast<unsigned>(std::min<int64_t>(run.num_sms, most)),
                       .block = Shape::kThreads,
                       .shared_bytes = static_cast<size_t>(params.layout.Total())};
  TIDAL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shape.shared_bytes)));
  LaunchOverlapped("expert_linear", kernel, shape, run.stream, params, experts,
                   static_cast<int>(groups * Shape::kRowTiles));
}

template <typename T, WeightKind kKind>
void RunStreamedExperts(const ExpertParams<T>& experts, const Weight& weight, bool is_gated,
                        const ExpertRun& run) {
  if (is_gated) {
    LaunchStreamedExperts<T, kKind, true>(experts, weight, run);
  } else {
    LaunchStreamedExperts<T, kKind, false>(experts, weight, run);
  }
}

}  // namespace tidal
