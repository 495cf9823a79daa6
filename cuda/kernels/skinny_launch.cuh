// From the arguments of the skinny products to kernel launches; instantiated in cuda/inst.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/check.h"
#include "common/dispatch.h"
#include "kernels/skinny_epilogue.cuh"
#include "kernels/skinny_linear.cuh"
#include "kernels/skinny_run.h"

namespace tidal {

struct SkinnyGrid {
  int num_tiles;
  int max_stages;
  int num_sms;
};

template <typename T, bool kNormed, typename Epilogue>
void LaunchSkinny(SkinnyParams<T> params, const SkinnyGrid& grid, const Epilogue& epilogue,
                  cudaStream_t stream) {
  params.num_tiles = grid.num_tiles;
  params.layout = MakeSkinnyLayout(params.num_inputs, params.num_tokens, kNormed, grid.max_stages);
  auto kernel = SkinnyLinearKernel<T, Epilogue, kNormed>;
  LaunchShape shape = {.grid = dim3(static_cast<unsigned>(std::min(grid.num_sms, grid.num_tiles))),
                       .block = dim3(kSkinnyThreads),
                       .shared_bytes = static_cast<size_t>(params.layout.Total())};
  TIDAL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shape.shared_bytes)));
  LaunchOverlapped("linear", kernel, shape, stream, params, epilogue);
}

template <typename T>
SkinnyParams<T> MakeSkinnyParams(const LinearArgs& linear, const RmsNormArgs* norm) {
  SkinnyParams<T> params = {};
  params.weight = static_cast<const T*>(linear.weight.ptr);
  params.num_outputs = static_cast<int>(linear.weight.dim(0));
  params.num_inputs = static_cast<int>(linear.weight.dim(1));
  params.num_tokens = static_cast<int>(linear.x.dim(0));
  params.x = static_cast<const T*>(linear.x.ptr);
  if (norm != nullptr) {
    params.hidden = norm->x.data<float>();
    params.norm_weight = static_cast<const T*>(norm->weight.ptr);
    params.norm_eps = norm->eps;
  }
  return params;
}

// With the norm in the kernel if there is one; bfloat16 only (FitsNorm).
template <typename T, typename Epilogue>
void LaunchSkinnyMaybeNormed(const LinearArgs& linear, const RmsNormArgs* norm,
                             const SkinnyGrid& grid, const Epilogue& epilogue,
                             cudaStream_t stream) {
  SkinnyParams<T> params = MakeSkinnyParams<T>(linear, norm);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (norm != nullptr) {
      LaunchSkinny<T, true>(params, grid, epilogue, stream);
      return;
    }
  }
  LaunchSkinny<T, false>(params, grid, epilogue, stream);
}

template <typename T>
void RunSkinnyLinear(const LinearArgs& args, const RmsNormArgs* norm, int num_sms,
                     cudaStream_t stream) {
  int num_outputs = static_cast<int>(args.weight.dim(0));
  int num_tokens = static_cast<int>(args.x.dim(0));
  auto* bias = static_cast<const T*>(args.bias.ptr);
  SkinnyGrid grid = {.num_tiles = static_cast<int>(CeilDiv(num_outputs, kTileRows)),
                     .max_stages = kMaxStages,
                     .num_sms = num_sms};
  if (args.output == LinearOutput::kAccumulate) {
    AccumulateEpilogue<T> epilogue = {args.out.data<float>(), bias, num_outputs, num_tokens};
    LaunchSkinny<T, false>(MakeSkinnyParams<T>(args, nullptr), grid, epilogue, stream);
  } else if (args.out.dtype == DType::kFloat32) {
    StoreEpilogue<T, float> epilogue = {args.out.data<float>(), bias, num_outputs, num_tokens};
    LaunchSkinnyMaybeNormed<T>(args, norm, grid, epilogue, stream);
  } else {
    StoreEpilogue<T, T> epilogue = {static_cast<T*>(args.out.ptr), bias, num_outputs, num_tokens};
    LaunchSkinnyMaybeNormed<T>(args, norm, grid, epilogue, stream);
  }
}

template <typename T>
void RunLinearRopeAppend(const LinearArgs& linear, const RmsNormArgs* norm,
                         const RopeAppendKvArgs& append, int num_sms, cudaStream_t stream) {
  RopeAppendEpilogue<T> epilogue = {};
  epilogue.bias = static_cast<const T*>(linear.bias.ptr);
  epilogue.cos_sin = append.cos_sin.data<float>();
  epilogue.positions = append.positions.data<int32_t>();
  epilogue.seq_idx = append.seq_idx.data<int32_t>();
  epilogue.page_table = append.kv.page_table.data<int32_t>();
  epilogue.q = static_cast<T*>(append.q.ptr);
  epilogue.k_pages = static_cast<T*>(append.kv.k_pages.ptr);
  epilogue.v_pages = static_cast<T*>(append.kv.v_pages.ptr);
  epilogue.max_pages = append.kv.page_table.dim(1);
  epilogue.num_q_heads = static_cast<int>(append.q.dim(1));
  epilogue.num_kv_heads = static_cast<int>(append.kv.k_pages.dim(1));
  epilogue.head_dim = static_cast<int>(append.q.dim(2));
  epilogue.page_size = static_cast<int>(append.kv.k_pages.dim(2));
  epilogue.num_tokens = static_cast<int>(append.q.dim(0));
  // Few stages leave room for a block of the sparse attention that follows, which reads its keys
  // and values early.
  SkinnyGrid grid = {.num_tiles = static_cast<int>(linear.weight.dim(0) / kTileRows),
                     .max_stages = kStagesBeforeAttention,
                     .num_sms = num_sms};
  LaunchSkinnyMaybeNormed<T>(linear, norm, grid, epilogue, stream);
}

template <typename T>
void RunLinearSiluMul(const LinearArgs& linear, const RmsNormArgs* norm,
                      const SiluMulArgs& silu_mul, int num_sms, cudaStream_t stream) {
  SiluMulEpilogue<T> epilogue = {};
  epilogue.out = static_cast<T*>(silu_mul.out.ptr);
  epilogue.bias = static_cast<const T*>(linear.bias.ptr);
  epilogue.intermediate_size = static_cast<int>(silu_mul.out.dim(1));
  epilogue.num_tokens = static_cast<int>(silu_mul.out.dim(0));
  SkinnyGrid grid = {.num_tiles = epilogue.intermediate_size / (kTileRows / 2),
                     .max_stages = kMaxStages,
                     .num_sms = num_sms};
  LaunchSkinnyMaybeNormed<T>(linear, norm, grid, epilogue, stream);
}

}  // namespace tidal
