// Causal attention of the last few tokens of each row over the paged cache: the dense pass of
// verified decoding. Split-K flash decoding as in attention_full.cuh, but a block serves the heads
// of several queries of one KV head, so that K and V are read once for all of them; blocks of
// further queries run beside it and find the same lines in the L2. The inner loop is
// common/decode_warp.cuh.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/decode_warp.cuh"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/merge_splits.cuh"
#include "common/paged_kv.cuh"
#include "kernels/attention_run.h"

namespace tidal {

template <typename T, typename Stored>
struct AttentionFewQueriesParams {
  const T* q;               // [T, Hq, D]
  const int32_t* q_starts;  // [B + 1]
  PagedKvView<Stored> kv;
  float sm_scale;
  SoftCap cap;
  DecodeWindow window;
  int num_q_heads;
  int group_size;
  int queries_per_block;
  int first_batch;  // of the launch
  int first_query;  // of each row: those before it are another launch's
  int max_queries;  // of a row in this launch
  SplitRule splits;
  Splitting splitting;
  PartialResults partials;
  AttentionOutput<T> output;
};

template <typename T, typename Stored, int kHeadDim>
using FewQueriesWarp =
    DecodeWarp<T, Stored, kHeadDim, kDecodeStages<kHeadDim>, kFewQueriesColumns / kBlockHeads>;

// What a block has of a row's queries in this launch, and the splits of their tokens.
struct QueryShare {
  int first;        // of those of the launch
  int count;        // 0: nothing
  int num_visible;  // tokens up to that of the first of them
  int begin;        // of the tokens that are split
  int span_length;
};

// The index-th block of a row with num_queries in this launch, of which the first has num_visible
// tokens up to its own. By row, each query's tokens are split as those of a decode step are, by
// their number: a block is for neighbours whose splits begin in one place and have one length. Of
// the queries here either changes once at most.
template <typename T, typename Stored>
__device__ __forceinline__ QueryShare ShareOf(const AttentionFewQueriesParams<T, Stored>& params,
                                              int index, int num_queries, int num_visible) {
  const DecodeWindow& window = params.window;
  int per_block = params.queries_per_block;
  if (params.splitting == Splitting::kByBatch) {
    int first = index * per_block, count = min(num_queries - first, per_block);
    int begin = window.Begin(num_visible + first);
    int num_tokens = num_visible + first + max(count, 1) - 1 - begin;
    return {.first = first,
            .count = count,
            .num_visible = num_visible + first,
            .begin = begin,
            .span_length = SpanLength(num_tokens, params.splits)};
  }
  for (int first = 0; first < num_queries;) {
    int visible = num_visible + first, begin = window.Begin(visible);
    int length = window.SpanLengthFor(visible, params.splits);
    int64_t most = min(MostTokens(length, params.splits), int64_t{window.Most()});
    int num_alike =
        static_cast<int>(min(most - (visible - begin) + 1, int64_t{num_queries - first}));
    int num_blocks = (num_alike + per_block - 1) / per_block;
    if (index < num_blocks) {
      int before = index * per_block;
      return {.first = first + before,
              .count = min(num_alike - before, per_block),
              .num_visible = visible + before,
              .begin = begin,
              .span_length = length};
    }
    index -= num_blocks;
    first += num_alike;
  }
  return {};
}

// grid (NumSplitBlocks, num_kv_heads x blocks for a row's queries, batch_size), 4 warps: a block
// takes splits of one row's tokens for some of its queries and all query heads of one KV head.
// Shared: 24 KB a warp, and with heads of 256 8 KB of queries.
template <typename T, typename Stored, int kHeadDim>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocksPerSm)
    AttentionFewQueriesKernel(const AttentionFewQueriesParams<T, Stored> params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  using Warp = FewQueriesWarp<T, Stored, kHeadDim>;
  // Where registers are so few that the queries have none, half as many as usual.
  constexpr int kMostLoads = kMergeLoads<kHeadDim> / (Warp::kHoldsQuery ? 1 : 2);
  WaitForPreviousKernel();
  int batch = params.first_batch + blockIdx.z, blocks_of_row = gridDim.y / params.kv.num_kv_heads;
  int kv_head = blockIdx.y / blocks_of_row;
  int first_token = __ldcg(params.q_starts + batch) + params.first_query;
  int queries_left = __ldcg(params.q_starts + batch + 1) - first_token;
  int seq_len = __ldcg(params.kv.seq_lens + batch);
  if (queries_left <= 0 || seq_len <= 0) return;
  QueryShare share = ShareOf(params, blockIdx.y % blocks_of_row,
                             min(queries_left, params.max_queries), seq_len - queries_left + 1);
  if (share.count <= 0) return;
  RowSplits splits(share.num_visible + share.count - 1 - share.begin, share.span_length);
  int block = blockIdx.z * gridDim.y + blockIdx.y;
  BlockWork work{.first_row = int64_t{first_token + share.first} * params.num_q_heads +
                              kv_head * params.group_size,
                 .first_partial = int64_t{block} * kFewQueriesColumns,
                 .num_heads = share.count * params.group_size,
                 .split = static_cast<int>(blockIdx.x),
                 .num_splits = params.splits.num_splits,
                 .num_used = splits.num_used,
                 .counter_index = block,
                 .heads_per_query = params.group_size,
                 .query_stride = params.num_q_heads};
  if (work.split >= work.num_used) {
    EndUnusedSplit<HeadResult<kHeadDim>>(work, params.output);
    return;
  }

  AttendedTokens<Stored> tokens{.kv = params.kv,
                                .batch = batch,
                                .kv_head = kv_head,
                                .seq_len = seq_len,
                                .begin = share.begin,
                                .first = params.window.First(share.num_visible)};
  DecodeQuery<T> query{.rows = params.q + work.first_row * kHeadDim,
                       .num_heads = work.num_heads,
                       .sm_scale = params.sm_scale,
                       .cap = params.cap,
                       .heads_per_query = work.heads_per_query,
                       .query_stride = work.query_stride,
                       .num_visible = share.num_visible - share.begin,
                       .window = static_cast<unsigned>(params.window.size)};
  for (; work.split < work.num_used; work.split += gridDim.x) {
    Warp warp(shared_bytes, params.kv);
    warp.Attend(tokens, splits.Span(work.split), query, Warp::kNoRow,
                [](int, const float(&)[4], unsigned, void*) {});
    warp.FinishBlock();
    MergeInLastBlock<T, kHeadDim, kMostLoads>(work, params.partials, params.output,
                                              [&](int head) { return warp.BlockResult(head); });
  }
}

// Makes one launch, for batch_size rows from params.first_batch on.
template <typename T, typename Stored, int kHeadDim>
void LaunchFewQueries(const AttentionFewQueriesParams<T, Stored>& params, int64_t blocks_of_row,
                      int64_t batch_size, int num_sms, cudaStream_t stream) {
  auto kernel = AttentionFewQueriesKernel<T, Stored, kHeadDim>;
  constexpr int kSharedBytes = FewQueriesWarp<T, Stored, kHeadDim>::kSharedBytes;
  TIDAL_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  int64_t blocks_of_split = params.kv.num_kv_heads * blocks_of_row;
  int num_blocks = NumSplitBlocks(params.splitting, params.splits.num_splits,
                                  batch_size * blocks_of_split, num_sms);
  dim3 grid(static_cast<unsigned>(num_blocks), static_cast<unsigned>(blocks_of_split),
            static_cast<unsigned>(batch_size));
  LaunchOverlapped("attention_few_queries", kernel,
                   {.grid = grid, .block = kDecodeThreads, .shared_bytes = kSharedBytes}, stream,
                   params);
}

// Split by batch all rows are one launch, which the scratch is enough for; by row as many as it is
// enough for, and launch after launch where a row has more queries than one takes.
template <typename T, typename Stored, int kHeadDim>
void RunAttentionFewQueries(const AttentionPrefillArgs& args, const AttentionScratch& scratch,
                            cudaStream_t stream) {
  constexpr const char* kOp = "attention_few_queries";
  int64_t num_q_heads = args.q.dim(1), batch_size = args.kv.seq_lens.dim(0);
  if (args.max_q_len == 0 || batch_size == 0) return;
  const bool by_row = scratch.splitting == Splitting::kByRow;
  PagedKvView<Stored> kv = MakePagedKvView<Stored>(kOp, args.kv);
  int64_t group_size = num_q_heads / kv.num_kv_heads;
  // As many splits as decode attention makes.
  int64_t head_blocks = kv.num_kv_heads * PartsOfGroup(num_q_heads, kv.num_kv_heads).count;
  int64_t queries_per_block = kFewQueriesColumns / group_size;
  AttentionFewQueriesParams<T, Stored> params{
      .q = static_cast<const T*>(args.q.ptr),
      .q_starts = args.q_starts.data<int32_t>(),
      .kv = kv,
      .sm_scale = args.rule.sm_scale * args.kv.k_scale,
      .cap = MakeSoftCap(args.rule, 1.0f),
      .window = ChooseWindow(scratch.splitting, args.rule),
      .num_q_heads = static_cast<int>(num_q_heads),
      .group_size = static_cast<int>(group_size),
      .queries_per_block = static_cast<int>(queries_per_block),
      .first_batch = 0,
      .first_query = 0,
      .max_queries = 0,
      .splits = ChooseSplits(scratch.splitting, batch_size, head_blocks, scratch.num_sms),
      .splitting = scratch.splitting,
      .partials = {},
      .output = {.out = static_cast<T*>(args.out.ptr),
                 .lse = nullptr,
                 .scale = args.kv.v_scale,
                 .sinks = SinksOf(args.rule),
                 .num_q_heads = static_cast<uint32_t>(num_q_heads)}};
  // By row queries differ in the length of splits, and in the begin of a window, at most once each.
  const int64_t num_more = !by_row ? 0 : args.rule.window == 0 ? 1 : 2;
  for (int64_t query = 0; query < args.max_q_len; query += kMaxFewQueries) {
    int64_t max_queries = std::min<int64_t>(args.max_q_len - query, kMaxFewQueries);
    int64_t blocks_of_row = CeilDiv(max_queries, queries_per_block) + num_more;
    int64_t rows_of_one = kv.num_kv_heads * blocks_of_row * kFewQueriesColumns;
    int64_t bytes_of_one = PartialBytes(rows_of_one * params.splits.num_splits, kHeadDim);
    int64_t counters_of_one = kv.num_kv_heads * blocks_of_row * int64_t{sizeof(uint32_t)};
    int64_t most = std::min((scratch.bytes - scratch.counter_bytes) / bytes_of_one,
                            scratch.counter_bytes / counters_of_one);
    most = by_row ? std::max<int64_t>(most, 1) : batch_size;
    params.first_query = static_cast<int>(query);
    params.max_queries = static_cast<int>(max_queries);
    for (int64_t row = 0; row < batch_size; row += most) {
      int64_t count = std::min(batch_size - row, most);
      params.first_batch = static_cast<int>(row);
      params.partials =
          TakePartials(kOp, scratch, count * rows_of_one, params.splits.num_splits, kHeadDim);
      LaunchFewQueries<T, Stored, kHeadDim>(params, blocks_of_row, count, scratch.num_sms, stream);
    }
  }
}

}  // namespace tidal
