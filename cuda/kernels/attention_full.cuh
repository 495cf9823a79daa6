// Dense decode attention over the paged cache, with or without its scores written: layers of kind F
// and S of a step (TidalDecode, arXiv 2410.05076, sec. 3.2). Split-K flash decoding in one launch:
// the last block of a row to finish merges its splits (common/merge_splits.cuh). The inner loop is
// common/decode_warp.cuh.
#pragma once

#include <cstdint>
#include <limits>

#include "common/decode_warp.cuh"
#include "common/dependent_launch.cuh"
#include "common/merge_splits.cuh"
#include "common/paged_kv.cuh"
#include "kernels/attention_run.h"

namespace tidal {

// Where scores go: [B, Hq, row_length].
struct ScoreRows {
  float* first;
  int64_t row_length;
  bool are_aligned;  // all rows begin at a multiple of 16 bytes
};

// Stores the scores of a block's heads, a warp a tile.
class ScoreWriter {
 public:
  // first_row: batch * Hq + q_head of the block's first head.
  __device__ __forceinline__ ScoreWriter(const ScoreRows& rows, int64_t first_row, int num_heads)
      : stores_(Head() < num_heads),
        are_aligned_(rows.are_aligned),
        lane_target_(rows.first + (first_row + Head()) * rows.row_length + Token()) {}

  // `scores` as of DecodeWarp::Scores; of the tokens in `valid`. They pass through `staging`, 640
  // bytes of shared memory, so that a lane has four tokens of one head and the warp needs one store
  // instruction.
  __device__ __forceinline__ void Store(int first_token, const float (&scores)[4], unsigned valid,
                                        float* staging) const {
    constexpr int kStride = kDecodeWarpTile + 4;  // heads 2 apart begin 8 banks apart
    int lane = threadIdx.x % kWarpSize;
    __syncwarp();  // staging is free
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int head = lane % 4 * 2 + c % 2, token = lane / 4 + c / 2 * 8;
      staging[head * kStride + token] = scores[c];
    }
    __syncwarp();
    float4 four = *reinterpret_cast<const float4*>(staging + Head() * kStride + Token());
    float* target = lane_target_ + first_token;
    unsigned present = stores_ ? (valid >> Token()) & 0xfu : 0u;
    if (present == 0xfu && are_aligned_) {
      __stcg(reinterpret_cast<float4*>(target), four);
    } else {
      if ((present & 1u) != 0) target[0] = four.x;
      if ((present & 2u) != 0) target[1] = four.y;
      if ((present & 4u) != 0) target[2] = four.z;
      if ((present & 8u) != 0) target[3] = four.w;
    }
  }

 private:
  // What this lane stores: four tokens of one head of a tile.
  __device__ __forceinline__ static int Head() {
    return threadIdx.x % kWarpSize / 4;
  }
  __device__ __forceinline__ static int Token() {
    return threadIdx.x % 4 * 4;
  }

  bool stores_;
  bool are_aligned_;
  float* lane_target_;  // of a tile that begins at token 0
};

template <typename T>
struct AttentionFullParams {
  const T* q;  // [B, Hq, D]
  PagedKvView<T> kv;
  float sm_scale;
  int group_size;
  CacheReads reads;
  PartialResults partials;
  AttentionOutput<T> output;
  ScoreRows scores;  // with kStore: sm_scale * q.k for positions < seq_len
};

// grid (num_splits, num_kv_heads, batch_size), 4 warps: a block takes one split of one row's tokens
// for all query heads of one KV head; a warp takes every fourth tile of 16 tokens. Shared: 24 KB a
// warp.
template <typename T, int kHeadDim, ScoreOutput kScores>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocksPerSm)
    AttentionFullKernel(const AttentionFullParams<T> params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  using Warp = DecodeWarp<T, kHeadDim>;
  if (params.reads == CacheReads::kInOrder) WaitForPreviousKernel();
  int kv_head = blockIdx.y, batch = blockIdx.z, num_q_heads = gridDim.y * params.group_size;
  int seq_len = __ldcg(params.kv.seq_lens + batch);
  RowSplits splits(seq_len, gridDim.x);
  BlockWork work{.first_row = int64_t{batch} * num_q_heads + kv_head * params.group_size,
                 .first_partial = int64_t{batch} * num_q_heads + kv_head * params.group_size,
                 .num_heads = params.group_size,
                 .split = static_cast<int>(blockIdx.x),
                 .num_splits = static_cast<int>(gridDim.x),
                 .num_used = splits.num_used,
                 .counter_index = static_cast<int>(batch * gridDim.y + kv_head)};
  if (work.split >= work.num_used) {
    EndUnusedSplit<T, kHeadDim>(work, params.output);
    return;
  }

  Warp warp(shared_bytes, params.kv);
  AttendedTokens<T> tokens{params.kv, batch, kv_head, seq_len, nullptr};
  DecodeQuery<T> query{params.q + work.first_row * kHeadDim, work.num_heads, params.sm_scale};
  int late_row = params.reads == CacheReads::kEarly ? tokens.Row(seq_len - 1) : Warp::kNoRow;
  ScoreWriter scores(params.scores, work.first_row, work.num_heads);
  warp.Attend(tokens, splits.Span(work.split), query, late_row,
              [&](int first, const float(&tile)[4], unsigned valid, T* key_tile) {
                if constexpr (kScores == ScoreOutput::kStore) {
                  scores.Store(first, tile, valid, reinterpret_cast<float*>(key_tile));
                }
              });
  warp.FinishBlock();
  MergeInLastBlock<T, kHeadDim>(work, params.partials, params.output,
                                [&](int head) { return warp.BlockResult(head); });
}

template <typename T, int kHeadDim, ScoreOutput kScores>
void RunAttentionFull(const AttentionSelectArgs& args, const AttentionScratch& scratch,
                      CacheReads reads, cudaStream_t stream) {
  constexpr bool kStores = kScores == ScoreOutput::kStore;
  constexpr const char* kOp = kStores ? "attention_select" : "attention_full";
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
      .reads = reads,
      .partials = TakePartials(kOp, scratch, batch_size * num_q_heads, num_splits, kHeadDim),
      .output = {.out = static_cast<T*>(attention.out.ptr),
                 .lse = kStores ? args.lse.data<float>() : nullptr},
      .scores = {}};
  if constexpr (kStores) {
    float* first = args.scores.data<float>();
    int64_t max_len = args.scores.dim(2);
    params.scores = {.first = first,
                     .row_length = max_len,
                     .are_aligned = reinterpret_cast<uintptr_t>(first) % sizeof(float4) == 0 &&
                                    max_len % 4 == 0};
  }

  auto kernel = AttentionFullKernel<T, kHeadDim, kScores>;
  using Warp = DecodeWarp<T, kHeadDim>;
  TIDAL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        Warp::kSharedBytes));
  dim3 grid(num_splits, kv.num_kv_heads, static_cast<unsigned>(batch_size));
  LaunchOverlapped(kOp, kernel,
                   {.grid = grid, .block = kDecodeThreads, .shared_bytes = Warp::kSharedBytes},
                   stream, params);
}

}  // namespace tidal
