// Causal attention of the last few tokens of each row over the paged cache: the dense pass of
// verified decoding. Split-K flash decoding as in attention_full.cuh, but a block serves the heads
// of several queries of one KV head, so that K and V are read once for all of them; blocks of
// further queries run beside it and find the same lines in the L2. The inner loop is
// common/decode_warp.cuh.
#pragma once

#include <cstdint>
#include <limits>

#include "common/decode_warp.cuh"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/merge_splits.cuh"
#include "common/paged_kv.cuh"
#include "kernels/attention_run.h"

namespace tidal {

template <typename T>
struct AttentionFewQueriesParams {
  const T* q;               // [T, Hq, D]
  const int32_t* q_starts;  // [B + 1]
  PagedKvView<T> kv;
  float sm_scale;
  int num_q_heads;
  int group_size;
  int queries_per_block;
  PartialResults partials;
  AttentionOutput<T> output;
};

template <typename T, int kHeadDim>
using FewQueriesWarp =
    DecodeWarp<T, kHeadDim, kDecodeStages<kHeadDim>, kFewQueriesColumns / kMaxGroupSize>;

// grid (num_splits, num_kv_heads x blocks for a row's queries, batch_size), 4 warps: a block
// takes one split of one row's tokens for some of its queries and all query heads of one KV head.
// Shared: 24 KB a warp.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocksPerSm)
    AttentionFewQueriesKernel(const AttentionFewQueriesParams<T> params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  using Warp = FewQueriesWarp<T, kHeadDim>;
  WaitForPreviousKernel();
  int batch = blockIdx.z, blocks_of_row = gridDim.y / params.kv.num_kv_heads;
  int kv_head = blockIdx.y / blocks_of_row;
  int first_query = blockIdx.y % blocks_of_row * params.queries_per_block;
  int first_token = __ldcg(params.q_starts + batch);
  int queries_left = __ldcg(params.q_starts + batch + 1) - first_token - first_query;
  int seq_len = __ldcg(params.kv.seq_lens + batch);
  if (queries_left <= 0 || seq_len <= 0) return;
  int num_queries = min(queries_left, params.queries_per_block);
  int num_visible = seq_len - queries_left + 1;  // to the block's first query
  RowSplits splits(num_visible + num_queries - 1, gridDim.x);
  int block = batch * gridDim.y + blockIdx.y;
  BlockWork work{.first_row = int64_t{first_token + first_query} * params.num_q_heads +
                              kv_head * params.group_size,
                 .first_partial = int64_t{block} * kFewQueriesColumns,
                 .num_heads = num_queries * params.group_size,
                 .split = static_cast<int>(blockIdx.x),
                 .num_splits = static_cast<int>(gridDim.x),
                 .num_used = splits.num_used,
                 .counter_index = block,
                 .heads_per_query = params.group_size,
                 .query_stride = params.num_q_heads};
  if (work.split >= work.num_used) {
    EndUnusedSplit<HeadResult<kHeadDim>>(work, params.output);
    return;
  }

  Warp warp(shared_bytes, params.kv);
  AttendedTokens<T> tokens{params.kv, batch, kv_head, seq_len, nullptr};
  DecodeQuery<T> query{.rows = params.q + work.first_row * kHeadDim,
                       .num_heads = work.num_heads,
                       .sm_scale = params.sm_scale,
                       .heads_per_query = work.heads_per_query,
                       .query_stride = work.query_stride,
                       .num_visible = num_visible};
  warp.Attend(tokens, splits.Span(work.split), query, Warp::kNoRow,
              [](int, const float(&)[4], unsigned, T*) {});
  warp.FinishBlock();
  MergeInLastBlock<T, kHeadDim>(work, params.partials, params.output,
                                [&](int head) { return warp.BlockResult(head); });
}

template <typename T, int kHeadDim>
void RunAttentionFewQueries(const AttentionPrefillArgs& args, const AttentionScratch& scratch,
                            cudaStream_t stream) {
  constexpr const char* kOp = "attention_few_queries";
  int64_t num_q_heads = args.q.dim(1), batch_size = args.kv.seq_lens.dim(0);
  if (args.max_q_len == 0 || batch_size == 0) return;
  PagedKvView<T> kv = MakePagedKvView<T>(kOp, args.kv);
  int64_t group_size = num_q_heads / kv.num_kv_heads;
  int64_t queries_per_block = kFewQueriesColumns / group_size;
  int64_t num_blocks = kv.num_kv_heads * CeilDiv(args.max_q_len, queries_per_block);
  // Whatever the bounds: neither they nor the table's capacity, which page_size rounds, may change
  // results.
  int num_splits = ChooseNumSplits(batch_size * kv.num_kv_heads, scratch.num_sms,
                                   std::numeric_limits<int32_t>::max());
  AttentionFewQueriesParams<T> params{
      .q = static_cast<const T*>(args.q.ptr),
      .q_starts = args.q_starts.data<int32_t>(),
      .kv = kv,
      .sm_scale = args.sm_scale,
      .num_q_heads = static_cast<int>(num_q_heads),
      .group_size = static_cast<int>(group_size),
      .queries_per_block = static_cast<int>(queries_per_block),
      .partials = TakePartials(kOp, scratch, batch_size * num_blocks * kFewQueriesColumns,
                               num_splits, kHeadDim),
      .output = {.out = static_cast<T*>(args.out.ptr), .lse = nullptr}};

  auto kernel = AttentionFewQueriesKernel<T, kHeadDim>;
  constexpr int kSharedBytes = FewQueriesWarp<T, kHeadDim>::kSharedBytes;
  TIDAL_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  dim3 grid(num_splits, static_cast<unsigned>(num_blocks), static_cast<unsigned>(batch_size));
  LaunchOverlapped(kOp, kernel,
                   {.grid = grid, .block = kDecodeThreads, .shared_bytes = kSharedBytes}, stream,
                   params);
}

}  // namespace tidal
