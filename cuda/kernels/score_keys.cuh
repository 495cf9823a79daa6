// The scores of one query a row over the paged cache, and their log-sum-exp, from the keys alone:
// what a layer of kind P chooses from. As AttentionSelect (attention_full.cuh) without its
// attention: the scores are the same bits, and the merge of splits has a maximum and a sum a head.
// The inner loop is common/decode_warp.cuh.
#pragma once

#include <cstdint>

#include "common/decode_warp.cuh"
#include "common/dependent_launch.cuh"
#include "common/merge_splits.cuh"
#include "common/paged_kv.cuh"
#include "common/score_writer.cuh"
#include "common/split_tokens.cuh"
#include "kernels/attention_run.h"

namespace tidal {

template <typename T, typename Stored>
struct ScoreKeysParams {
  const T* q;  // [B, Hq, D]
  PagedKvView<Stored> kv;
  float sm_scale;
  SoftCap cap;
  HeadParts parts;
  SplitRule splits;
  CacheReads reads;
  PartialResults partials;
  ScoreRows scores;
  LseOutput output;
};

template <typename T, typename Stored, int kHeadDim>
using ScoreWarp = DecodeWarp<T, Stored, kHeadDim, kDecodeStages<kHeadDim, DecodeReads::kKeys>, 1,
                             DecodeReads::kKeys>;

// grid (NumSplitBlocks, HeadParts of all KV heads, batch_size), 4 warps: a block takes splits of
// one row's tokens for the query heads of one KV head, or a part of them; a warp takes every fourth
// tile of 16 tokens. Shared: 24 KB a warp, and 8 KB of pages.
template <typename T, typename Stored, int kHeadDim>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocksPerSm)
    ScoreKeysKernel(const ScoreKeysParams<T, Stored> params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  __shared__ SplitPages pages;
  using Warp = ScoreWarp<T, Stored, kHeadDim>;
  if (params.reads == CacheReads::kInOrder) WaitForPreviousKernel();
  int batch = blockIdx.z, num_q_heads = params.kv.num_kv_heads * params.parts.group_size;
  BlockHeads heads(params.parts, blockIdx.y);
  int seq_len = __ldcg(params.kv.seq_lens + batch);
  RowSplits splits(seq_len, params.splits);
  int64_t first_row = int64_t{batch} * num_q_heads + heads.first;
  BlockWork work{.first_row = first_row,
                 .first_partial = first_row,
                 .num_heads = heads.count,
                 .split = static_cast<int>(blockIdx.x),
                 .num_splits = params.splits.num_splits,
                 .num_used = splits.num_used,
                 .counter_index = static_cast<int>(batch * gridDim.y + blockIdx.y)};
  if (work.split >= work.num_used) {
    EndUnusedSplit<HeadState>(work, params.output);
    return;
  }

  DecodeQuery<T> query{params.q + first_row * kHeadDim, work.num_heads, params.sm_scale,
                       params.cap};
  ScoreWriter scores(params.scores, first_row, work.num_heads);
  for (; work.split < work.num_used; work.split += gridDim.x) {
    Warp warp(shared_bytes, params.kv);
    SplitSpan span = splits.Span(work.split);
    SplitTokens<Stored> tokens(params.kv, batch, heads.kv_head, span, pages);
    bool has_late = params.reads == CacheReads::kEarly && span.end == seq_len;
    int late_row = has_late ? tokens.Row(seq_len - 1) : Warp::kNoRow;
    warp.Attend(tokens, span, query, late_row,
                [&](int first, const float(&tile)[4], unsigned valid, void* key_tile) {
                  scores.Store(first, tile, valid, static_cast<float*>(key_tile));
                });
    warp.FinishBlock();
    MergeStatesInLastBlock(work, params.partials, params.output,
                           [&](int head) { return warp.BlockState(head); });
  }
}

template <typename T, typename Stored, int kHeadDim>
void RunScoreKeys(const ScoreKeysArgs& args, const AttentionScratch& scratch, CacheReads reads,
                  cudaStream_t stream) {
  constexpr const char* kOp = "score_keys";
  int64_t batch_size = args.q.dim(0), num_q_heads = args.q.dim(1);
  if (batch_size == 0) return;
  PagedKvView<Stored> kv = MakePagedKvView<Stored>(kOp, args.kv);
  HeadParts parts = PartsOfGroup(num_q_heads, kv.num_kv_heads);
  int head_blocks = kv.num_kv_heads * parts.count;
  SplitRule splits = ChooseSplits(scratch.splitting, batch_size, head_blocks, scratch.num_sms);
  ScoreKeysParams<T, Stored> params{
      .q = static_cast<const T*>(args.q.ptr),
      .kv = kv,
      .sm_scale = args.rule.sm_scale * args.kv.k_scale,
      .cap = MakeSoftCap(args.rule, 1.0f),
      .parts = parts,
      .splits = splits,
      .reads = reads,
      .partials = TakePartials(kOp, scratch, batch_size * num_q_heads, splits.num_splits, kHeadDim),
      .scores = MakeScoreRows(args.scores),
      .output = {.lse = args.lse.data<float>()}};

  auto kernel = ScoreKeysKernel<T, Stored, kHeadDim>;
  constexpr int kSharedBytes = ScoreWarp<T, Stored, kHeadDim>::kSharedBytes;
  TIDAL_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  int num_blocks = NumSplitBlocks(scratch.splitting, splits.num_splits, batch_size * head_blocks,
                                  scratch.num_sms);
  dim3 grid(num_blocks, head_blocks, static_cast<unsigned>(batch_size));
  LaunchOverlapped(kOp, kernel,
                   {.grid = grid, .block = kDecodeThreads, .shared_bytes = kSharedBytes}, stream,
                   params);
}

}  // namespace tidal
