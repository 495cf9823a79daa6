// Position persistent sparse attention: a decode query attends to a list of positions chosen by an
// earlier layer (TidalDecode, arXiv 2410.05076, sec. 3.2). Rows of K and V are gathered through the
// page table, 128 or 256 contiguous bytes each. Splits and merging are those of attention_full.cuh;
// the inner loop is common/decode_warp.cuh.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/decode_warp.cuh"
#include "common/paged_kv.cuh"
#include "kernels/attention_run.h"
#include "kernels/combine_splits.h"

namespace tidal {

template <typename T>
struct AttentionSparseParams {
  const T* q;  // [B, Hq, D]
  PagedKvView<T> kv;
  float sm_scale;
  int num_q_heads;
  int group_size;            // query heads of one KV head
  int heads_per_block;       // that share a list: group_size, or 1 if each query head has its own
  int num_sets;              // lists of a row: Hkv, Hq or 1
  const int32_t* token_idx;  // [B, num_sets, token_budget]
  AttendedTokens attended;
  PartialResults partials;
};

// Token i of a row is the i-th position of a list, or position i if the row is dense.
template <typename T>
struct ListedPositions {
  const PagedKvView<T>& kv;
  int batch;
  int kv_head;
  const int32_t* list;  // nullptr: dense
  int seq_len;

  // -1 for a position outside the sequence: an entry that no selection writes must not become a
  // read of memory that is not ours.
  __device__ __forceinline__ int Row(int i) const {
    int position = list == nullptr ? i : __ldg(list + i);
    return static_cast<unsigned>(position) < static_cast<unsigned>(seq_len)
               ? kv.Row(batch, kv_head, position)
               : -1;
  }
};

// grid (num_splits, num_q_heads / heads_per_block, batch_size), 4 warps: a block takes one split of
// one list for the heads that share it and a KV head; a warp takes every fourth tile of 16
// positions. Shared: 24 KB a warp.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocksPerSm)
    AttentionSparseKernel(const AttentionSparseParams<T> params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  int split = blockIdx.x, num_splits = gridDim.x, batch = blockIdx.z;
  int first_head = blockIdx.y * params.heads_per_block;
  SplitSpan span = SpanOfSplit(split, num_splits, params.attended.Count(batch));
  if (span.begin >= span.end) return;

  using Warp = DecodeWarp<T, kHeadDim>;
  T* shared = reinterpret_cast<T*>(shared_bytes);
  int64_t first_query = int64_t{batch} * params.num_q_heads + first_head;
  Warp warp(shared + threadIdx.x / kWarpSize * (Warp::kSharedBytes / sizeof(T)), params.kv.k,
            params.kv.v, params.q + first_query * kHeadDim, params.heads_per_block);

  int64_t set = int64_t{batch} * params.num_sets + (params.num_sets == 1 ? 0 : blockIdx.y);
  const int32_t* list = params.token_idx + set * params.attended.token_budget;
  ListedPositions<T> positions{.kv = params.kv,
                               .batch = batch,
                               .kv_head = first_head / params.group_size,
                               .list = params.attended.IsDense(batch) ? nullptr : list,
                               .seq_len = __ldg(params.kv.seq_lens + batch)};
  warp.Attend(positions, span, params.sm_scale, [](int, const float(&)[4], unsigned) {});
  warp.MergeWarps(shared, params.partials, params.heads_per_block, [&](int head) {
    return PartialResults::Row(batch, params.num_q_heads, first_head + head, num_splits, split);
  });
}

template <typename T, int kHeadDim>
void RunAttentionSparse(const AttentionSparseArgs& args, const AttentionScratch& scratch,
                        cudaStream_t stream) {
  constexpr const char* kOp = "attention_sparse";
  const AttentionArgs& attention = args.attention;
  int64_t batch_size = attention.q.dim(0), num_q_heads = attention.q.dim(1);
  if (batch_size == 0) return;
  PagedKvView<T> kv = MakePagedKvView<T>(kOp, attention.kv);
  int group_size = static_cast<int>(num_q_heads / kv.num_kv_heads);
  int64_t num_sets = args.token_idx.dim(1), token_budget = args.token_idx.dim(2);
  int heads_per_block = num_sets == num_q_heads ? 1 : group_size;
  int64_t num_blocks = num_q_heads / heads_per_block;
  int num_splits = ChooseNumSplits(batch_size * num_blocks, scratch.num_sms,
                                   std::max(token_budget, args.dense_len));
  AttendedTokens attended{
      .seq_lens = kv.seq_lens,
      .num_selected = args.num_selected.data<int32_t>(),
      .dense_len = static_cast<int>(std::min<int64_t>(args.dense_len, INT32_MAX)),
      .token_budget = static_cast<int>(token_budget)};
  AttentionSparseParams<T> params{
      .q = static_cast<const T*>(attention.q.ptr),
      .kv = kv,
      .sm_scale = attention.sm_scale,
      .num_q_heads = static_cast<int>(num_q_heads),
      .group_size = group_size,
      .heads_per_block = heads_per_block,
      .num_sets = static_cast<int>(num_sets),
      .token_idx = args.token_idx.data<int32_t>(),
      .attended = attended,
      .partials = TakePartials(kOp, scratch, batch_size * num_q_heads * num_splits, kHeadDim)};

  auto kernel = AttentionSparseKernel<T, kHeadDim>;
  constexpr int kSharedBytes = kDecodeWarps * DecodeWarp<T, kHeadDim>::kSharedBytes;
  TIDAL_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  dim3 grid(num_splits, static_cast<unsigned>(num_blocks), static_cast<unsigned>(batch_size));
  kernel<<<grid, kDecodeThreads, kSharedBytes, stream>>>(params);
  TIDAL_LAUNCH_CHECK("attention_sparse");

  LaunchCombineSplits({.partials = params.partials,
                       .attended = attended,
                       .num_splits = num_splits,
                       .batch_size = batch_size,
                       .num_q_heads = num_q_heads,
                       .head_dim = kHeadDim,
                       .dtype = attention.out.dtype,
                       .out = attention.out.ptr,
                       .lse = nullptr},
                      stream);
}

}  // namespace tidal
