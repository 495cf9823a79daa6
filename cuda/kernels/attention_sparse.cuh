// Position persistent sparse attention: a decode query attends to a list of positions chosen by an
// earlier layer (TidalDecode, arXiv 2410.05076, sec. 3.2). Rows of K and V are gathered through the
// page table, 64 to 512 contiguous bytes each. Where the work is short, latency is what counts: a
// row's splits are then a cluster of blocks, which merge through shared memory. The inner loop is
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

// Who merges the splits of a row.
enum class SplitMerge { kCluster, kLastBlock };

// Stages of a warp. A cluster's blocks attend to so little that few stages hold it all, and small
// blocks find room beside those of the kernel in front, to read early; only dense rows, which are
// rare in a sparse step, go round in them, and so do heads of 256, of which no more find room.
template <typename Stored, int kHeadDim>
inline constexpr int kClusterStages =
    kMaxClusterSpan /
    (kDecodeWarps * kCopyTokens<Stored>)*kTileStages<kHeadDim, DecodeReads::kKeysAndValues>;
template <typename Stored, int kHeadDim, SplitMerge kMerge>
inline constexpr int kSparseStages = kMerge == SplitMerge::kCluster
                                         ? std::min(kClusterStages<Stored, kHeadDim>,
                                                    kDecodeStages<kHeadDim>)
                                         : kDecodeStages<kHeadDim>;

// Blocks that an SM is to have registers for: of a cluster's, more than run at once where there are
// many find room beside the kernel in front.
template <typename Stored, int kHeadDim, SplitMerge kMerge>
inline constexpr int kSparseBlocksPerSm = kMerge == SplitMerge::kLastBlock ? kDecodeBlocksPerSm
                                          : kHeadDim == 64                 ? 4
                                          : kHeadDim == 128 && sizeof(Stored) == 2
                                              ? 3
                                              : kDecodeBlocksPerSm;

template <typename T, typename Stored, int kHeadDim, SplitMerge kMerge>
using SparseWarp = DecodeWarp<T, Stored, kHeadDim, kSparseStages<Stored, kHeadDim, kMerge>>;

template <typename T, typename Stored>
struct AttentionSparseParams {
  const T* q;  // [B, Hq, D]
  PagedKvView<Stored> kv;
  float sm_scale;
  SoftCap cap;
  int num_q_heads;
  HeadParts parts;              // of one head each if each has a list of its own
  int num_sets;                 // lists of a row: Hkv, Hq or 1
  int token_budget;             // positions a list has room for
  int dense_len;                // rows with seq_len <= dense_len attend to all positions
  const int32_t* token_idx;     // [B, num_sets, token_budget]
  const int32_t* num_selected;  // [B, num_sets]
  SplitRule splits;             // of lists
  SplitRule dense_splits;       // of rows that attend to all positions
  int most_splits;              // of a row
  CacheReads reads;
  PartialResults partials;
  AttentionOutput<T> output;
};

// grid (NumSplitBlocks, HeadParts of all KV heads, batch_size), 4 warps: a block takes splits of
// one list for heads that share it and a KV head; a warp takes every fourth tile of 16 positions.
// With kCluster, clusters of num_splits blocks. Shared: kSparseStages x 8 KB a warp (4 KB at
// head_dim 64).
template <typename T, typename Stored, int kHeadDim, SplitMerge kMerge>
__global__ void __launch_bounds__(kDecodeThreads, kSparseBlocksPerSm<Stored, kHeadDim, kMerge>)
    AttentionSparseKernel(const AttentionSparseParams<T, Stored> params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  using Warp = SparseWarp<T, Stored, kHeadDim, kMerge>;
  if (params.reads == CacheReads::kInOrder) WaitForPreviousKernel();
  int batch = blockIdx.z;
  BlockHeads heads(params.parts, blockIdx.y);
  int seq_len = __ldcg(params.kv.seq_lens + batch);
  int set_of_row = params.num_sets == 1                    ? 0
                   : params.num_sets == params.num_q_heads ? heads.first
                                                           : heads.kv_head;
  int64_t set = int64_t{batch} * params.num_sets + set_of_row;
  int num_selected = __ldcg(params.num_selected + set);
  bool is_dense = seq_len <= params.dense_len;
  RowSplits splits(is_dense ? seq_len : min(num_selected, params.token_budget),
                   is_dense ? params.dense_splits : params.splits);
  int64_t first_row = int64_t{batch} * params.num_q_heads + heads.first;
  BlockWork work{.first_row = first_row,
                 .first_partial = first_row,
                 .num_heads = heads.count,
                 .split = static_cast<int>(blockIdx.x),
                 .num_splits = params.most_splits,
                 .num_used = splits.num_used,
                 .counter_index = static_cast<int>(batch * gridDim.y + blockIdx.y)};
  if (work.split >= work.num_used) {
    EndUnusedSplit<HeadResult<kHeadDim>>(work, params.output);
    return;
  }

  AttendedTokens<Stored> tokens{
      .kv = params.kv,
      .batch = batch,
      .kv_head = heads.kv_head,
      .seq_len = seq_len,
      .list = is_dense ? nullptr : params.token_idx + set * params.token_budget};
  DecodeQuery<T> query{params.q + work.first_row * kHeadDim, work.num_heads, params.sm_scale,
                       params.cap};
  int late_row = params.reads == CacheReads::kEarly ? tokens.Row(seq_len - 1) : Warp::kNoRow;
  for (; work.split < work.num_used; work.split += gridDim.x) {
    Warp warp(shared_bytes, params.kv);
    warp.Attend(tokens, splits.Span(work.split), query, late_row,
                [](int, const float(&)[4], unsigned, void*) {});
    warp.FinishBlock();
    auto block_result = [&](int head) { return warp.BlockResult(head); };
    if constexpr (kMerge == SplitMerge::kCluster) {
      MergeInCluster<T, kHeadDim>(work, params.output, block_result);  // the block's only split
    } else {
      MergeInLastBlock<T, kHeadDim>(work, params.partials, params.output, block_result);
    }
  }
}

template <typename T, typename Stored, int kHeadDim, SplitMerge kMerge>
void LaunchSparse(const AttentionSparseParams<T, Stored>& params, const dim3& grid,
                  cudaStream_t stream) {
  auto kernel = AttentionSparseKernel<T, Stored, kHeadDim, kMerge>;
  constexpr int kSharedBytes = SparseWarp<T, Stored, kHeadDim, kMerge>::kSharedBytes;
  TIDAL_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  LaunchOverlapped("attention_sparse", kernel,
                   {.grid = grid,
                    .block = kDecodeThreads,
                    .shared_bytes = kSharedBytes,
                    .cluster_size = kMerge == SplitMerge::kCluster ? grid.x : 1},
                   stream, params);
}

// How the lists of a call are split, and who merges them.
struct SparseSplits {
  SplitRule of_lists;
  SplitRule of_dense_rows;
  int num_splits;  // of a row at most
  SplitMerge merge;
};

// By row, lists are split as those of a row alone, and dense rows as AttentionFull splits them; who
// merges changes no result.
inline SparseSplits ChooseSparseSplits(const AttentionSparseArgs& args, int64_t num_blocks,
                                       const AttentionScratch& scratch, bool has_clusters) {
  const bool by_row = scratch.splitting == Splitting::kByRow;
  int64_t batch_size = args.attention.q.dim(0), token_budget = args.token_idx.dim(2);
  int64_t max_tokens = std::min(by_row ? token_budget : std::max(token_budget, args.dense_len),
                                int64_t{kMaxAttendedTokens});
  int64_t num_rows = (by_row ? 1 : batch_size) * num_blocks;
  int num_splits = args.set_sizes == SetSizes::kRagged
                       ? ChooseNumRaggedSplits(num_rows, scratch.num_sms, max_tokens)
                       : ChooseNumSplits(num_rows, scratch.num_sms, max_tokens);
  int cluster_splits = std::min(num_splits, kMaxClusterSplits);
  bool in_cluster =
      has_clusters && SpanLength(static_cast<int>(std::min<int64_t>(token_budget, max_tokens)),
                                 EvenSplits(cluster_splits)) <= kMaxClusterSpan;
  if (in_cluster) num_splits = cluster_splits;
  SparseSplits chosen = {.of_lists = EvenSplits(num_splits),
                         .of_dense_rows = EvenSplits(num_splits),
                         .num_splits = num_splits,
                         .merge = SplitMerge::kCluster};
  if (by_row) {
    int64_t num_kv_heads = args.attention.kv.k_pages.dim(1);
    int64_t head_blocks = num_kv_heads * PartsOfGroup(args.attention.q.dim(1), num_kv_heads).count;
    chosen.of_dense_rows =
        ChooseSplits(scratch.splitting, batch_size, head_blocks, scratch.num_sms);
    int64_t most = CeilDiv(std::max<int64_t>(args.dense_len, 0), chosen.of_dense_rows.least);
    most = std::min<int64_t>(most, chosen.of_dense_rows.num_splits);
    chosen.num_splits = std::max(num_splits, static_cast<int>(most));
    int64_t at_once = int64_t{kDecodeBlocksPerSm} * scratch.num_sms;
    in_cluster = in_cluster && chosen.num_splits <= kMaxClusterSplits &&
                 batch_size * num_blocks * chosen.num_splits <= at_once;
  }
  if (!in_cluster) chosen.merge = SplitMerge::kLastBlock;
  return chosen;
}

template <typename T, typename Stored, int kHeadDim>
void RunAttentionSparse(const AttentionSparseArgs& args, const AttentionScratch& scratch,
                        CacheReads reads, cudaStream_t stream) {
  constexpr const char* kOp = "attention_sparse";
  const AttentionArgs& attention = args.attention;
  int64_t batch_size = attention.q.dim(0), num_q_heads = attention.q.dim(1);
  if (batch_size == 0) return;
  PagedKvView<Stored> kv = MakePagedKvView<Stored>(kOp, attention.kv);
  int64_t num_sets = args.token_idx.dim(1), token_budget = args.token_idx.dim(2);
  HeadParts parts = PartsOfGroup(num_q_heads, kv.num_kv_heads);
  if (num_sets == num_q_heads) {
    parts.count = parts.group_size;
    parts.heads = 1;
  }
  int64_t num_blocks = int64_t{kv.num_kv_heads} * parts.count;
  SparseSplits chosen = ChooseSparseSplits(
      args, num_blocks, scratch,
      RunsHopperCode(AttentionSparseKernel<T, Stored, kHeadDim, SplitMerge::kCluster>));
  AttentionSparseParams<T, Stored> params{
      .q = static_cast<const T*>(attention.q.ptr),
      .kv = kv,
      .sm_scale = attention.rule.sm_scale * attention.kv.k_scale,
      .cap = MakeSoftCap(attention.rule, 1.0f),
      .num_q_heads = static_cast<int>(num_q_heads),
      .parts = parts,
      .num_sets = static_cast<int>(num_sets),
      .token_budget = static_cast<int>(token_budget),
      .dense_len = static_cast<int>(std::min<int64_t>(args.dense_len, kMaxAttendedTokens)),
      .token_idx = args.token_idx.data<int32_t>(),
      .num_selected = args.num_selected.data<int32_t>(),
      .splits = chosen.of_lists,
      .dense_splits = chosen.of_dense_rows,
      .most_splits = chosen.num_splits,
      .reads = reads,
      .partials = TakePartials(kOp, scratch, batch_size * num_q_heads, chosen.num_splits, kHeadDim),
      .output = {.out = static_cast<T*>(attention.out.ptr),
                 .lse = nullptr,
                 .scale = attention.kv.v_scale,
                 .sinks = SinksOf(attention.rule),
                 .num_q_heads = static_cast<uint32_t>(num_q_heads)}};

  int num_split_blocks = chosen.merge == SplitMerge::kCluster
                             ? chosen.num_splits
                             : NumSplitBlocks(scratch.splitting, chosen.num_splits,
                                              batch_size * num_blocks, scratch.num_sms);
  dim3 grid(num_split_blocks, static_cast<unsigned>(num_blocks), static_cast<unsigned>(batch_size));
  if (chosen.merge == SplitMerge::kCluster) {
    LaunchSparse<T, Stored, kHeadDim, SplitMerge::kCluster>(params, grid, stream);
  } else {
    LaunchSparse<T, Stored, kHeadDim, SplitMerge::kLastBlock>(params, grid, stream);
  }
}

}  // namespace tidal
