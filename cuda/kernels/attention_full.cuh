// Dense decode attention over the paged cache, with or without its scores written: layers of kind F
// and S of a step (TidalDecode, arXiv 2410.05076, sec. 3.2). Split-K flash decoding in one launch:
// the last block of a row to finish merges its splits (common/merge_splits.cuh). The inner loop is
// common/decode_warp.cuh.
#pragma once

#include <cstdint>

#include "common/decode_warp.cuh"
#include "common/dependent_launch.cuh"
#include "common/merge_splits.cuh"
#include "common/paged_kv.cuh"
#include "common/score_writer.cuh"
#include "kernels/attention_run.h"

namespace tidal {

template <typename T, typename Stored>
struct AttentionFullParams {
  const T* q;  // [B, Hq, D]
  PagedKvView<Stored> kv;
  float sm_scale;
  SoftCap cap;
  DecodeWindow window;
  HeadParts parts;
  SplitRule splits;
  CacheReads reads;
  PartialResults partials;
  AttentionOutput<T> output;
  ScoreRows scores;  // with kStore, of positions < seq_len
};

// grid (NumSplitBlocks, HeadParts of all KV heads, batch_size), 4 warps: a block takes splits of
// one row's tokens for the query heads of one KV head, or a part of them; a warp takes every fourth
// tile of 16 tokens. Shared: 24 KB a warp.
template <typename T, typename Stored, int kHeadDim, ScoreOutput kScores>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocksPerSm)
    AttentionFullKernel(const AttentionFullParams<T, Stored> params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  using Warp = DecodeWarp<T, Stored, kHeadDim>;
  if (params.reads == CacheReads::kInOrder) WaitForPreviousKernel();
  int batch = blockIdx.z;
  BlockHeads heads(params.parts, blockIdx.y);
  int64_t first_row = int64_t{batch} * params.output.num_q_heads + heads.first;
  int seq_len = __ldcg(params.kv.seq_lens + batch);
  int begin = params.window.Begin(seq_len);
  RowSplits splits(seq_len - begin, params.window.SpanLengthFor(seq_len, params.splits));
  BlockWork work{.first_row = first_row,
                 .first_partial = first_row,
                 .num_heads = heads.count,
                 .split = static_cast<int>(blockIdx.x),
                 .num_splits = params.splits.num_splits,
                 .num_used = splits.num_used,
                 .counter_index = static_cast<int>(batch * gridDim.y + blockIdx.y)};
  if (work.split >= work.num_used) {
    EndUnusedSplit<HeadResult<kHeadDim>>(work, params.output);
    return;
  }

  AttendedTokens<Stored> tokens{.kv = params.kv,
                                .batch = batch,
                                .kv_head = heads.kv_head,
                                .seq_len = seq_len,
                                .begin = begin,
                                .first = params.window.First(seq_len)};
  DecodeQuery<T> query{params.q + work.first_row * kHeadDim, work.num_heads, params.sm_scale,
                       params.cap};
  int late_row = params.reads == CacheReads::kEarly ? tokens.Row(seq_len - 1) : Warp::kNoRow;
  ScoreWriter scores(params.scores, work.first_row, work.num_heads);
  for (; work.split < work.num_used; work.split += gridDim.x) {
    Warp warp(shared_bytes, params.kv);
    warp.Attend(tokens, splits.Span(work.split), query, late_row,
                [&](int first, const float(&tile)[4], unsigned valid, void* key_tile) {
                  if constexpr (kScores == ScoreOutput::kStore) {
                    scores.Store(first, tile, valid, static_cast<float*>(key_tile));
                  }
                });
    warp.FinishBlock();
    MergeInLastBlock<T, kHeadDim>(work, params.partials, params.output,
                                  [&](int head) { return warp.BlockResult(head); });
  }
}

template <typename T, typename Stored, int kHeadDim, ScoreOutput kScores>
void RunAttentionFull(const AttentionSelectArgs& args, const AttentionScratch& scratch,
                      CacheReads reads, cudaStream_t stream) {
  constexpr bool kStores = kScores == ScoreOutput::kStore;
  constexpr const char* kOp = kStores ? "attention_select" : "attention_full";
  const AttentionArgs& attention = args.attention;
  int64_t batch_size = attention.q.dim(0), num_q_heads = attention.q.dim(1);
  if (batch_size == 0) return;
  PagedKvView<Stored> kv = MakePagedKvView<Stored>(kOp, attention.kv);
  HeadParts parts = PartsOfGroup(num_q_heads, kv.num_kv_heads);
  int head_blocks = kv.num_kv_heads * parts.count;
  SplitRule splits = ChooseSplits(scratch.splitting, batch_size, head_blocks, scratch.num_sms);
  AttentionFullParams<T, Stored> params{
      .q = static_cast<const T*>(attention.q.ptr),
      .kv = kv,
      .sm_scale = attention.rule.sm_scale * attention.kv.k_scale,
      .cap = MakeSoftCap(attention.rule, 1.0f),
      .window = ChooseWindow(scratch.splitting, attention.rule),
      .parts = parts,
      .splits = splits,
      .reads = reads,
      .partials = TakePartials(kOp, scratch, batch_size * num_q_heads, splits.num_splits, kHeadDim),
      .output = {.out = static_cast<T*>(attention.out.ptr),
                 .lse = kStores ? args.lse.data<float>() : nullptr,
                 .scale = attention.kv.v_scale,
                 .sinks = SinksOf(attention.rule),
                 .num_q_heads = static_cast<uint32_t>(num_q_heads)},
      .scores = {}};
  if constexpr (kStores) params.scores = MakeScoreRows(args.scores);

  auto kernel = AttentionFullKernel<T, Stored, kHeadDim, kScores>;
  using Warp = DecodeWarp<T, Stored, kHeadDim>;
  TIDAL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        Warp::kSharedBytes));
  int num_blocks = NumSplitBlocks(scratch.splitting, splits.num_splits, batch_size * head_blocks,
                                  scratch.num_sms);
  dim3 grid(num_blocks, head_blocks, static_cast<unsigned>(batch_size));
  LaunchOverlapped(kOp, kernel,
                   {.grid = grid, .block = kDecodeThreads, .shared_bytes = Warp::kSharedBytes},
                   stream, params);
}

}  // namespace tidal
