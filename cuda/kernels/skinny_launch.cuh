// From the arguments of the skinny products to kernel launches; instantiated in cuda/inst.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/check.h"
#include "common/dispatch.h"
#include "kernels/coded_linear.cuh"
#include "kernels/int4_linear.cuh"
#include "kernels/skinny_epilogue.cuh"
#include "kernels/skinny_linear.cuh"
#include "kernels/skinny_run.h"
#include "kernels/tiled_linear.cuh"

namespace tidal {

struct SkinnyGrid {
  int num_tiles;
  int max_stages;
};

// Blocks of a cluster: so that the blocks of the last wave are many, and waves few, as each costs
// as much again as a few hundredths of a product (estimated).
inline unsigned TiledClusterSize(int64_t num_tiles, int num_sms) {
  constexpr double kCostOfWave = 0.05;
  unsigned best = 1;
  double best_cost = 0.0;
  for (unsigned size = 1; size <= kMultiplyWarps; size *= 2) {
    auto waves = static_cast<double>(CeilDiv(num_tiles * size, num_sms));
    double cost = waves * (1.0 / size + kCostOfWave);
    if (size == 1 || cost < best_cost) {
      best = size;
      best_cost = cost;
    }
  }
  return best;
}

// As LaunchSkinny.
template <typename T, typename Epilogue>
void LaunchTiled(SkinnyParams<T> params, const SkinnyGrid& grid, const Epilogue& epilogue,
                 const SkinnyRun& run) {
  params.num_tiles = grid.num_tiles;
  int64_t token_tiles = CeilDiv(params.num_tokens, kBlockTokens);
  int64_t row_tiles = CeilDiv(grid.num_tiles, kBlockTiles);
  unsigned cluster = TiledClusterSize(token_tiles * row_tiles, run.num_sms);
  auto kernel = TiledLinearKernel<T, Epilogue>;
  LaunchShape shape = {
      .grid = dim3(cluster * static_cast<unsigned>(token_tiles), static_cast<unsigned>(row_tiles)),
      .block = dim3(kTiledThreads),
      .shared_bytes = kTiledSharedBytes,
      .cluster_size = cluster};
  TIDAL_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTiledSharedBytes));
  LaunchOverlapped("linear", kernel, shape, run.stream, params, epilogue);
}

// A weight's codes in boxes of half a tile's rows by a chunk.
template <WeightKind kKind, typename T>
CUtensorMap MapOfCodes(const SkinnyParams<T>& params) {
  static const auto encode = FindTensorMapEncode();
  auto row_bytes = static_cast<uint64_t>(params.num_inputs) * BitsOf(kKind) / 8;
  return MakeTensorMap<uint8_t, 2>(encode, params.weight,
                                   {row_bytes, static_cast<uint64_t>(params.num_outputs)},
                                   {kChunk * BitsOf(kKind) / 8, kTileRows / 2});
}

// Launches a kernel whose blocks each take an SM: as many as there are, or fewer for few tiles.
template <typename Shape, typename Kernel, typename T, typename Epilogue, typename... More>
void LaunchBlocks(Kernel kernel, const SkinnyParams<T>& params, const Epilogue& epilogue,
                  const SkinnyRun& run, const More&... more) {
  LaunchShape shape = {.grid = dim3(static_cast<unsigned>(std::min(run.num_sms, params.num_tiles))),
                       .block = dim3(Shape::kThreads),
                       .shared_bytes = static_cast<size_t>(params.layout.Total())};
  TIDAL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shape.shared_bytes)));
  LaunchOverlapped("linear", kernel, shape, run.stream, params, epilogue, more...);
}

// Three or four tokens take so long to become digits that only blocks of so many tiles make up for
// it: gate and up of an 8B model (14 tiles) 28.0 us instead of 33, but o (2 tiles) 10.6 instead of
// 8.4.
constexpr int kLeastTilesInDigits = 8;

// With up to 2 kPairs tokens, kRowTiles tiles at a time; returns false where there is no room.
template <typename T, bool kNormed, int kPairs, int kRowTiles, typename Epilogue>
bool LaunchDigits(SkinnyParams<T> params, const SkinnyGrid& grid, const Epilogue& epilogue,
                  const SkinnyRun& run) {
  using Shape = SkinnyShape<kTileTokens, WeightKind::kInt4, kRowTiles>;
  params.num_tiles = grid.num_tiles;
  params.layout = MakeSkinnyLayout<Shape>({.num_inputs = params.num_inputs,
                                           .num_tokens = params.num_tokens,
                                           .normed = kNormed,
                                           .max_stages = grid.max_stages,
                                           .scale_sets = params.weight_scales.num_sets,
                                           .in_digits = true});
  if (params.layout.Total() > kMaxSharedBytes) return false;
  LaunchBlocks<Shape>(Int4LinearKernel<T, Epilogue, kNormed, kPairs, Shape>, params, epilogue, run,
                      MapOfCodes<WeightKind::kInt4>(params));
  return true;
}

// As LaunchSkinny; returns false where that is not for int4_linear.cuh.
template <typename T, bool kNormed, typename Epilogue>
bool LaunchInDigits(const SkinnyParams<T>& params, const SkinnyGrid& grid, const Epilogue& epilogue,
                    const SkinnyRun& run) {
  const int num_tokens = params.num_tokens;
  if (run.in_one_order || params.weight_scales.groups_per_chunk != 1) return false;
  if (num_tokens > 2) {
    return num_tokens <= kMaxDigitTokens && grid.num_tiles >= kLeastTilesInDigits * run.num_sms &&
           LaunchDigits<T, kNormed, 2, 2>(params, grid, epilogue, run);
  }
  if (grid.num_tiles > 4 * run.num_sms &&
      LaunchDigits<T, kNormed, 1, 4>(params, grid, epilogue, run)) {
    return true;
  }
  return LaunchDigits<T, kNormed, 1, 2>(params, grid, epilogue, run);
}

template <typename T, bool kNormed, int kTokens, WeightKind kKind, typename Epilogue>
void LaunchSkinny(SkinnyParams<T> params, const SkinnyGrid& grid, const Epilogue& epilogue,
                  const SkinnyRun& run) {
  if constexpr (kTokens > kMaxSkinnyTokens) {
    LaunchTiled(params, grid, epilogue, run);
    return;
  } else {
    if constexpr (kTokens == kTileTokens && kKind == WeightKind::kInt4) {
      if (LaunchInDigits<T, kNormed>(params, grid, epilogue, run)) return;
    }
    using Shape = SkinnyShape<kTokens, kKind>;
    params.num_tiles = grid.num_tiles;
    params.layout = MakeSkinnyLayout<Shape>({.num_inputs = params.num_inputs,
                                             .num_tokens = params.num_tokens,
                                             .normed = kNormed,
                                             .max_stages = grid.max_stages,
                                             .scale_sets = params.weight_scales.num_sets});
    if constexpr (kKind == WeightKind::kHalf) {
      LaunchBlocks<Shape>(SkinnyLinearKernel<T, Epilogue, kNormed, kTokens>, params, epilogue, run);
    } else {
      LaunchBlocks<Shape>(CodedLinearKernel<T, Epilogue, kNormed, kTokens, kKind>, params, epilogue,
                          run, MapOfCodes<kKind>(params));
    }
  }
}

// What the kernels are told of a coded weight's scales.
inline WeightScales MakeWeightScales(const Weight& weight) {
  auto chunks = [](int64_t inputs) { return static_cast<int>(CeilDiv(inputs, kChunk)); };
  return {.scales = static_cast<const unsigned char*>(weight.scales.ptr),
          .zeros = static_cast<const uint8_t*>(weight.zeros.ptr),
          .dtype = weight.scales.dtype,
          .num_groups = static_cast<int>(weight.scales.dim(0)),
          .groups_per_chunk = GroupsPerChunk(weight),
          .chunks_per_group = chunks(weight.group_size),
          .num_sets = ScaleSets(weight)};
}

template <typename T>
SkinnyParams<T> MakeSkinnyParams(const LinearArgs& linear, const SkinnyRun& run) {
  SkinnyParams<T> params = {};
  params.weight = static_cast<const unsigned char*>(linear.weight.data.ptr);
  if (linear.weight.is_coded()) params.weight_scales = MakeWeightScales(linear.weight);
  params.num_outputs = static_cast<int>(linear.weight.num_outputs());
  params.num_inputs = static_cast<int>(linear.weight.num_inputs());
  params.num_tokens = static_cast<int>(linear.x.dim(0));
  params.x = static_cast<const T*>(linear.x.ptr);
  params.scales = run.scales;
  if (run.norm != nullptr) {
    params.hidden = run.norm->x.data<float>();
    params.norm_weight = static_cast<const T*>(run.norm->weight.ptr);
    params.norm_eps = run.norm->eps;
  }
  return params;
}

// With the norm in the kernel if there is one; bfloat16 and few tokens only (FitsNorm).
template <typename T, int kTokens, WeightKind kKind, typename Epilogue>
void LaunchSkinnyMaybeNormed(const LinearArgs& linear, const SkinnyGrid& grid,
                             const Epilogue& epilogue, const SkinnyRun& run) {
  SkinnyParams<T> params = MakeSkinnyParams<T>(linear, run);
  if constexpr (std::is_same_v<T, __nv_bfloat16> && kTokens == kTileTokens) {
    if (run.norm != nullptr) {
      LaunchSkinny<T, true, kTokens, kKind>(params, grid, epilogue, run);
      return;
    }
  }
  LaunchSkinny<T, false, kTokens, kKind>(params, grid, epilogue, run);
}

template <typename T, int kTokens, WeightKind kKind>
void RunSkinnyLinear(const LinearArgs& args, const SkinnyRun& run) {
  int num_outputs = static_cast<int>(args.weight.num_outputs());
  int num_tokens = static_cast<int>(args.x.dim(0));
  auto* bias = static_cast<const T*>(args.bias.ptr);
  SkinnyGrid grid = {.num_tiles = static_cast<int>(CeilDiv(num_outputs, kTileRows)),
                     .max_stages = kMaxStages};
  if (args.output == LinearOutput::kAccumulate) {
    AccumulateEpilogue<T> epilogue = {args.out.data<float>(), bias, num_outputs, num_tokens};
    LaunchSkinny<T, false, kTokens, kKind>(MakeSkinnyParams<T>(args, run), grid, epilogue, run);
  } else if (args.out.dtype == DType::kFloat32) {
    StoreEpilogue<T, float> epilogue = {args.out.data<float>(), bias, num_outputs, num_tokens};
    LaunchSkinnyMaybeNormed<T, kTokens, kKind>(args, grid, epilogue, run);
  } else {
    StoreEpilogue<T, T> epilogue = {static_cast<T*>(args.out.ptr), bias, num_outputs, num_tokens};
    LaunchSkinnyMaybeNormed<T, kTokens, kKind>(args, grid, epilogue, run);
  }
}

template <typename T, int kTokens, WeightKind kKind>
void RunLinearRopeAppend(const LinearArgs& linear, const RopeAppendKvArgs& append,
                         const SkinnyRun& run) {
  RopeAppendEpilogue<T> epilogue = {};
  epilogue.bias = static_cast<const T*>(linear.bias.ptr);
  epilogue.k_cos_sin = append.cos_sin.data<float>();
  epilogue.q_cos_sin = append.q_cos_sin ? append.q_cos_sin.data<float>() : epilogue.k_cos_sin;
  epilogue.positions = append.positions.data<int32_t>();
  epilogue.seq_idx = append.seq_idx.data<int32_t>();
  epilogue.page_table = append.kv.page_table.data<int32_t>();
  epilogue.q = static_cast<T*>(append.q.ptr);
  epilogue.k_pages = append.kv.k_pages.ptr;
  epilogue.v_pages = append.kv.v_pages.ptr;
  epilogue.is_float8 = append.kv.k_pages.dtype == DType::kFloat8;
  epilogue.k_scale = append.kv.k_scale;
  epilogue.v_scale = append.kv.v_scale;
  epilogue.max_pages = append.kv.page_table.dim(1);
  epilogue.num_q_heads = static_cast<int>(append.q.dim(1));
  epilogue.num_kv_heads = static_cast<int>(append.kv.k_pages.dim(1));
  epilogue.head_dim = static_cast<int>(append.q.dim(2));
  epilogue.page_size = static_cast<int>(append.kv.k_pages.dim(2));
  epilogue.num_tokens = static_cast<int>(append.q.dim(0));
  // Few stages leave room for a block of the sparse attention that follows, which reads its keys
  // and values early.
  SkinnyGrid grid = {.num_tiles = static_cast<int>(linear.weight.num_outputs() / kTileRows),
                     .max_stages = kStagesBeforeAttention};
  LaunchSkinnyMaybeNormed<T, kTokens, kKind>(linear, grid, epilogue, run);
}

template <typename T, int kTokens, WeightKind kKind>
void RunLinearGateMul(const LinearArgs& linear, const GateMulArgs& gate_mul, const SkinnyRun& run) {
  GateMulEpilogue<T> epilogue = {};
  epilogue.out = static_cast<T*>(gate_mul.out.ptr);
  epilogue.bias = static_cast<const T*>(linear.bias.ptr);
  epilogue.rule = RuleOf(gate_mul);
  epilogue.intermediate_size = static_cast<int>(gate_mul.out.dim(1));
  epilogue.num_tokens = static_cast<int>(gate_mul.out.dim(0));
  SkinnyGrid grid = {.num_tiles = epilogue.intermediate_size / (kTileRows / 2),
                     .max_stages = kMaxStages};
  LaunchSkinnyMaybeNormed<T, kTokens, kKind>(linear, grid, epilogue, run);
}

}  // namespace tidal
