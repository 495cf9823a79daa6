// Dense decode attention over the paged cache, with or without its scores written: layers of kind F
// and S of a step (TidalDecode, arXiv 2410.05076, sec. 3.2). Split-K flash decoding;
// combine_splits.cuh merges the splits. The inner loop is common/decode_warp.cuh.
#pragma once

#include <cstdint>
#include <limits>

#include "common/decode_warp.cuh"
#include "common/paged_kv.cuh"
#include "kernels/attention_run.h"
#include "kernels/combine_splits.h"

namespace tidal {

template <typename T>
struct AttentionFullParams {
  const T* q;  // [B, Hq, D]
  PagedKvView<T> kv;
  float sm_scale;
  int group_size;
  PartialResults partials;
  float* scores;    // [B, Hq, max_len] with kStore: sm_scale * q.k for positions < seq_len
  int64_t max_len;  // row length of scores
};

// Token i of a row is position i.
template <typename T>
struct AllPositions {
  const PagedKvView<T>& kv;
  int batch;
  int kv_head;

  __device__ __forceinline__ int Row(int i) const { return kv.Row(batch, kv_head, i); }
};

// grid (num_splits, num_kv_heads, batch_size), 4 warps: a block takes one split of one row's tokens
// for all query heads of one KV head; a warp takes every fourth tile of 16 tokens. Shared: 24 KB a
// warp.
template <typename T, int kHeadDim, ScoreOutput kScores>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocksPerSm)
    AttentionFullKernel(const AttentionFullParams<T> params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  int split = blockIdx.x, num_splits = gridDim.x, kv_head = blockIdx.y, batch = blockIdx.z;
  int num_q_heads = params.kv.num_kv_heads * params.group_size;
  int first_head = kv_head * params.group_size;
  SplitSpan span = SpanOfSplit(split, num_splits, __ldg(params.kv.seq_lens + batch));
  if (span.begin >= span.end) return;

  using Warp = DecodeWarp<T, kHeadDim>;
  T* shared = reinterpret_cast<T*>(shared_bytes);
  int64_t first_query = int64_t{batch} * num_q_heads + first_head;
  Warp warp(shared + threadIdx.x / kWarpSize * (Warp::kSharedBytes / sizeof(T)), params.kv.k,
            params.kv.v, params.q + first_query * kHeadDim, params.group_size);

  auto store_scores = [&](int first, const float(&scores)[4], unsigned valid) {
    if constexpr (kScores == ScoreOutput::kStore) {
      int lane = threadIdx.x % kWarpSize;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        int head = lane % 4 * 2 + c % 2, token = lane / 4 + c / 2 * 8;
        if (head < params.group_size && ((valid >> token) & 1u) != 0) {
          params.scores[(first_query + head) * params.max_len + first + token] = scores[c];
        }
      }
    }
  };
  AllPositions<T> positions{params.kv, batch, kv_head};
  warp.Attend(positions, span, params.sm_scale, store_scores);
  warp.MergeWarps(shared, params.partials, params.group_size, [&](int head) {
    return PartialResults::Row(batch, num_q_heads, first_head + head, num_splits, split);
  });
}

template <typename T, int kHeadDim, ScoreOutput kScores>
void RunAttentionFull(const AttentionSelectArgs& args, const AttentionScratch& scratch,
                      cudaStream_t stream) {
  constexpr const char* kOp =
      kScores == ScoreOutput::kStore ? "attention_select" : "attention_full";
  const AttentionArgs& attention = args.attention;
  int64_t batch_size = attention.q.dim(0), num_q_heads = attention.q.dim(1);
  if (batch_size == 0) return;
  PagedKvView<T> kv = MakePagedKvView<T>(kOp, attention.kv);
  // Not bounded by the table's capacity, which page_size rounds: it must not change results.
  int num_splits = ChooseNumSplits(batch_size * kv.num_kv_heads, scratch.num_sms,
                                   std::numeric_limits<int32_t>::max());
  AttentionFullParams<T> params{
      .q = static_cast<const T*>(attention.q.ptr),
      .kv = kv,
      .sm_scale = attention.sm_scale,
      .group_size = static_cast<int>(num_q_heads / kv.num_kv_heads),
      .partials = TakePartials(kOp, scratch, batch_size * num_q_heads * num_splits, kHeadDim),
      .scores = kScores == ScoreOutput::kStore ? args.scores.data<float>() : nullptr,
      .max_len = kScores == ScoreOutput::kStore ? args.scores.dim(2) : 0};

  auto kernel = AttentionFullKernel<T, kHeadDim, kScores>;
  constexpr int kSharedBytes = kDecodeWarps * DecodeWarp<T, kHeadDim>::kSharedBytes;
  TIDAL_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  dim3 grid(num_splits, kv.num_kv_heads, static_cast<unsigned>(batch_size));
  kernel<<<grid, kDecodeThreads, kSharedBytes, stream>>>(params);
  TIDAL_LAUNCH_CHECK("attention_full");

  LaunchCombineSplits({.partials = params.partials,
                       .attended = {.seq_lens = kv.seq_lens,
                                    .num_selected = nullptr,
                                    .dense_len = 0,
                                    .token_budget = 0},
                       .num_splits = num_splits,
                       .batch_size = batch_size,
                       .num_q_heads = num_q_heads,
                       .head_dim = kHeadDim,
                       .dtype = attention.out.dtype,
                       .out = attention.out.ptr,
                       .lse = kScores == ScoreOutput::kStore ? args.lse.data<float>() : nullptr},
                      stream);
}

}  // namespace tidal
