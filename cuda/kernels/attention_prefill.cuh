// Causal attention of prompt chunks over the paged cache: FlashAttention-2 (arXiv 2307.08691) on
// mma.sync, K and V gathered from the pages. Ragged: row b has q_starts[b + 1] - q_starts[b]
// queries, the last positions of its seq_lens[b] tokens.
//
// Numerics: scores, maximum, sum and output are float32; the weights exp(score - max) are rounded
// to T for the product with V, while their sum is taken before rounding.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "common/async_copy.cuh"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/mma.cuh"
#include "common/paged_kv.cuh"
#include "common/reduce.cuh"
#include "common/score_rule.cuh"
#include "common/softmax_state.cuh"
#include "kernels/attention_run.h"

namespace tidal {

inline constexpr int kPrefillWarps = 4;
inline constexpr int kPrefillThreads = kPrefillWarps * kWarpSize;
// What a block works on at a time. 32 queries a warp: every fragment of K and V that ldmatrix
// brings in is used by two mma, else shared memory bandwidth, not the tensor cores, is the limit.
// With heads of 256 registers have room for the output of 16, and shared memory for half the
// tokens.
template <int kHeadDim>
struct PrefillTile {
  static constexpr int kWarpQueries = kHeadDim <= 128 ? 32 : 16;
  static constexpr int kQueries = kPrefillWarps * kWarpQueries;
  static constexpr int kTokens = kHeadDim <= 128 ? 64 : 32;
  // Queries, and two stages of K and V.
  static constexpr int kSharedElements = (kQueries + 2 * 2 * kTokens) * kPaddedDim<kHeadDim>;
};

template <typename T>
struct AttentionPrefillParams {
  const T* q;               // [T, Hq, D]
  const int32_t* q_starts;  // [B + 1]
  PagedKvView<T> kv;
  PromptRule rule;
  float out_scale;
  int group_size;
  T* out;  // [T, Hq, D]
};

// What a block works on.
struct PrefillTask {
  int batch;
  int kv_head;
  int first_row;  // of q and out: its first query
  int kv_end;     // tokens up to the last query's of the tile: its position + 1, <= seq_len
};

// The work of one warp: its queries against tiles of tokens. In fragments, lane l holds of each
// 16-row tile the rows g = l / 4 and g + 8.
template <typename T, int kHeadDim>
class PrefillWarp {
 public:
  static constexpr int kQueries = PrefillTile<kHeadDim>::kWarpQueries;
  static constexpr int kTokens = PrefillTile<kHeadDim>::kTokens;

  // `query`: this warp's rows in shared memory, swizzled by TileOffset.
  __device__ __forceinline__ PrefillWarp(T* query, int first_position,
                                         const AttentionPrefillParams<T>& params)
      : query_(query),
        first_position_(first_position),
        params_(params),
        lane_(threadIdx.x % kWarpSize) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) max_[m][0] = max_[m][1] = NegativeInfinity();
  }

  // Whether some query of the warp sees some token of the tile.
  __device__ __forceinline__ bool Sees(int first_token) const {
    return first_token < first_position_ + kQueries &&
           first_token + kTokens > first_position_ - params_.rule.window + 1;
  }

  __device__ __forceinline__ void Attend(const T* key, const T* value, int first_token) {
    float scores[kRowTiles][kTokenTiles][4];
    Scores(key, scores);
    params_.rule.cap.CapAll(scores);
    // Some token of the tile lies after the warp's first query, or before the window of its last.
    // Tokens past kv_end are masked with them.
    if (first_token > first_position_ - (kTokens - 1) ||
        first_token < first_position_ + kQueries - params_.rule.window) {
      Mask(first_token, scores);
    }
    uint32_t weights[kRowTiles][kTokenTiles][2];
    Softmax(params_.rule.weight_scale, scores, weights);
    Accumulate(value, weights);
  }

  // Writes the warp's valid rows x out_scale; `out`: its first row, rows are row_stride elements
  // apart.
  __device__ __forceinline__ void Store(T* out, int64_t row_stride, int num_rows, int q_head) {
    __syncwarp();  // every lane is done reading the queries, whose place the output takes
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sum_[m][half];
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
        float scale = params_.out_scale * params_.rule.OutputScale(q_head, max_[m][half], sum);
        int row = m * 16 + half * 8 + lane_ / 4;
#pragma unroll
        for (int n = 0; n < kDimTiles; ++n) {
          float low = out_[m][n][half * 2] * scale, high = out_[m][n][half * 2 + 1] * scale;
          T* target = query_ + TileOffset<kHeadDim>(row, n) + lane_ % 4 * 2;
          *reinterpret_cast<uint32_t*>(target) = PackPair<T>(low, high);
        }
      }
    }
    __syncwarp();
    constexpr int kChunks = kRow / kChunkElements, kRowsPerPass = kWarpSize / kChunks;
    int chunk = lane_ % kChunks;
    if (kRow != kHeadDim && chunk >= kHeadDim / kChunkElements) return;
#pragma unroll
    for (int pass = 0; pass < kQueries / kRowsPerPass; ++pass) {
      int row = pass * kRowsPerPass + lane_ / kChunks;
      if (row >= num_rows) break;
      *reinterpret_cast<uint4*>(out + row * row_stride + chunk * kChunkElements) =
          *reinterpret_cast<const uint4*>(query_ + TileOffset<kHeadDim>(row, chunk));
    }
  }

 private:
  static constexpr int kRowTiles = kQueries / 16;  // 16-row tiles of queries
  static constexpr int kTokenTiles = kTokens / 8;  // 8-column tiles of scores
  static constexpr int kRow = kPaddedDim<kHeadDim>;
  static constexpr int kDimTiles = kHeadDim / 8;  // 8-column tiles of the output
  using ScoreTile = float (&)[kRowTiles][kTokenTiles][4];
  // Weights in pairs of tokens: [m][n][half] is rows m * 16 + g + half * 8.
  using WeightTile = uint32_t (&)[kRowTiles][kTokenTiles][2];

  // scores[m][n][c]: q.k of query m * 16 + g + (c / 2) * 8 and token n * 8 + lane % 4 * 2 + c % 2.
  __device__ __forceinline__ void Scores(const T* key, ScoreTile scores) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) scores[m][n][c] = 0.0f;
      }
    }
    int query_offset = TileOffset<kHeadDim>(lane_ % 16, lane_ / 16);
    int key_offset = TileOffset<kHeadDim>(lane_ % 8 + lane_ / 16 * 8, lane_ / 8 % 2);
#pragma unroll 1  // unrolled, it needs more registers than there are, and spills
    for (int step = 0; step < kHeadDim / 16; ++step) {
      uint32_t a[kRowTiles][4];  // matrices: queries 0-7 and 8-15 of dims 0-7, then of dims 8-15
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        LoadMatrix4(a[m], query_ + m * 16 * kRow + NextChunks(query_offset, step * 2));
      }
#pragma unroll
      for (int n = 0; n < kTokenTiles; n += 2) {
        uint32_t b[4];  // matrices: dims 0-7 and 8-15 of tokens 0-7, then of tokens 8-15
        LoadMatrix4(b, key + n * 8 * kRow + NextChunks(key_offset, step * 2));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          MultiplyAdd<T>(scores[m][n], a[m], b[0], b[1]);
          MultiplyAdd<T>(scores[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // A query sees the tokens up to its own position, and so many of them.
  __device__ __forceinline__ void Mask(int first_token, ScoreTile scores) {
    // How far the query of this lane's first row lies after the token of its first column.
    int behind = first_position_ + lane_ / 4 - first_token - lane_ % 4 * 2;
    auto window = static_cast<unsigned>(params_.rule.window);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          auto distance = static_cast<unsigned>(behind + m * 16 + c / 2 * 8 - n * 8 - c % 2);
          if (distance >= window) scores[m][n][c] = NegativeInfinity();
        }
      }
    }
  }

  // Scores to weights 2^(scale * (score - max)); rescales what was accumulated under the old
  // maximum.
  __device__ __forceinline__ void Softmax(float scale, ScoreTile scores, WeightTile weights) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float max = max_[m][half];
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          max = fmaxf(max, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
        }
        max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, 1));
        max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, 2));
        float scaled_max = FiniteMax(max) * scale;
        float rescale = FastExp2(max_[m][half] * scale - scaled_max);
        max_[m][half] = max;

        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          float low = FastExp2(scores[m][n][half * 2] * scale - scaled_max);
          float high = FastExp2(scores[m][n][half * 2 + 1] * scale - scaled_max);
          weights[m][n][half] = PackPair<T>(low, high);
          sum += low + high;
        }
        sum_[m][half] = sum_[m][half] * rescale + sum;
#pragma unroll
        for (int n = 0; n < kDimTiles; ++n) {
          out_[m][n][half * 2] *= rescale;
          out_[m][n][half * 2 + 1] *= rescale;
        }
      }
    }
  }

  // out_[m][n][c]: query m * 16 + g + (c / 2) * 8, dim n * 8 + lane % 4 * 2 + c % 2. Two
  // neighbouring C tiles of weights, packed, are one A tile.
  __device__ __forceinline__ void Accumulate(const T* value, WeightTile weights) {
    int value_offset = TileOffset<kHeadDim>(lane_ % 16, lane_ / 16);
#pragma unroll
    for (int step = 0; step < kTokens / 16; ++step) {
#pragma unroll
      for (int n = 0; n < kDimTiles; n += 2) {
        uint32_t b[4];  // matrices: tokens 0-7 and 8-15 of dims 0-7, then of dims 8-15
        LoadMatrix4Transposed(b, value + step * 16 * kRow + NextChunks(value_offset, n));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          const uint32_t a[4] = {weights[m][step * 2][0], weights[m][step * 2][1],
                                 weights[m][step * 2 + 1][0], weights[m][step * 2 + 1][1]};
          MultiplyAdd<T>(out_[m][n], a, b[0], b[1]);
          MultiplyAdd<T>(out_[m][n + 1], a, b[2], b[3]);
        }
      }
    }
  }

  T* query_;
  int first_position_;
  const AttentionPrefillParams<T>& params_;
  int lane_;
  float out_[kRowTiles][kDimTiles][4] = {};
  float max_[kRowTiles][2];
  float sum_[kRowTiles][2] = {};  // of this lane's columns
};

// Starts the copy of the tile's queries; rows past num_queries are zeros. `q`: the tile's first
// row.
template <typename T, int kHeadDim>
__device__ __forceinline__ void CopyQueries(T* shared, const T* q, int64_t row_stride,
                                            int num_queries) {
  constexpr int kRow = kPaddedDim<kHeadDim>;
  constexpr int kChunks = kRow / kChunkElements, kRowsPerPass = kPrefillThreads / kChunks;
  int chunk = threadIdx.x % kChunks;
  if (kRow != kHeadDim && chunk >= kHeadDim / kChunkElements) return;
#pragma unroll
  for (int pass = 0; pass < PrefillTile<kHeadDim>::kQueries / kRowsPerPass; ++pass) {
    int row = pass * kRowsPerPass + threadIdx.x / kChunks;
    bool valid = row < num_queries;
    const T* source = q + (valid ? row * row_stride : 0) + chunk * kChunkElements;
    CopyAsync16(shared + TileOffset<kHeadDim>(row, chunk), source, valid);
  }
}

// Starts the copy of a tile's K and V, of 16 tokens a warp both, or one of them; tokens from kv_end
// on are zeros, and neither their page table entries nor their rows are read.
template <typename T, int kHeadDim>
__device__ __forceinline__ void CopyKvTile(T* key, T* value, const PagedKvView<T>& kv,
                                           const PrefillTask& task, int first_token) {
  constexpr int kWarps = PrefillTile<kHeadDim>::kTokens / kCopyTokens<T>;  // that copy K
  static_assert(kWarps == kPrefillWarps || kWarps == kPrefillWarps / 2);
  int warp = threadIdx.x / kWarpSize;
  int warp_token = warp % kWarps * kCopyTokens<T>;
  int token = first_token + warp_token + threadIdx.x % kCopyTokens<T>;
  int row = token < task.kv_end ? kv.Row(task.batch, task.kv_head, token) : -1;
  int offset = warp_token * kPaddedDim<kHeadDim>;
  if constexpr (kWarps == kPrefillWarps) {
    CopyTokens<T, kHeadDim>(key + offset, value + offset, kv.k, kv.v, row);
  } else {
    bool is_key = warp < kWarps;
    CopyRows<T, kHeadDim>((is_key ? key : value) + offset, is_key ? kv.k : kv.v, row);
  }
}

// grid (num_q_heads, batch_size, query tiles), 4 warps: a block takes a tile of queries of one
// head. Blocks start in the order of the grid, x first: the last tiles of queries, which see the
// most tokens, come first, and heads that share K and V run side by side. Shared: 96 KB at head_dim
// 128 and 256.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kPrefillThreads, 2)
    AttentionPrefillKernel(const AttentionPrefillParams<T> params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  using Warp = PrefillWarp<T, kHeadDim>;
  constexpr int kQueries = PrefillTile<kHeadDim>::kQueries, kTokens = Warp::kTokens;
  int q_head = blockIdx.x, num_q_heads = gridDim.x, batch = blockIdx.y;
  int first_query = (gridDim.z - 1 - blockIdx.z) * kQueries;
  int q_start = __ldg(params.q_starts + batch);
  int q_len = __ldg(params.q_starts + batch + 1) - q_start;
  if (first_query >= q_len) return;

  int seq_len = __ldg(params.kv.seq_lens + batch);
  int num_queries = min(kQueries, q_len - first_query);
  int tile_position = seq_len - q_len + first_query;
  __shared__ PrefillTask task;  // not in registers, of which the fragments leave none
  if (threadIdx.x == 0) {
    task = {.batch = batch,
            .kv_head = q_head / params.group_size,
            .first_row = q_start + first_query,
            .kv_end = tile_position + num_queries};
  }
  __syncthreads();

  constexpr int kRow = kPaddedDim<kHeadDim>, kKvElements = kTokens * kRow;
  T* query = reinterpret_cast<T*>(shared_bytes);
  T* stages = query + kQueries * kRow;  // K, V, K, V
  int64_t row_stride = int64_t{num_q_heads} * kHeadDim;
  const T* q = params.q + q_head * kHeadDim;
  CopyQueries<T, kHeadDim>(query, q + task.first_row * row_stride, row_stride, num_queries);
  // The tile that the first query's window begins in.
  int kv_begin = max(tile_position - params.rule.window + 1, 0) / kTokens * kTokens;
  T* first_stage = stages + kv_begin / kTokens % 2 * 2 * kKvElements;
  CopyKvTile<T, kHeadDim>(first_stage, first_stage + kKvElements, params.kv, task, kv_begin);
  CommitCopies();

  int warp_first = threadIdx.x / kWarpSize * Warp::kQueries;
  int first_position = tile_position + warp_first;
  Warp warp(query + warp_first * kRow, first_position, params);
  for (int first_token = kv_begin; first_token < task.kv_end; first_token += kTokens) {
    WaitCopies<0>();
    __syncthreads();  // the tile has landed for all; and all are done with the one before
    T* key = stages + first_token / kTokens % 2 * 2 * kKvElements;
    if (first_token + kTokens < task.kv_end) {
      T* next = stages + (first_token / kTokens + 1) % 2 * 2 * kKvElements;
      CopyKvTile<T, kHeadDim>(next, next + kKvElements, params.kv, task, first_token + kTokens);
    }
    CommitCopies();
    if (first_position < task.kv_end && warp.Sees(first_token)) {  // and the warp has a query
      warp.Attend(key, key + kKvElements, first_token);
    }
  }
  WaitCopies<0>();
  __syncthreads();  // also if there was no tile: nobody still copies queries
  T* out = params.out + q_head * kHeadDim + (task.first_row + warp_first) * row_stride;
  warp.Store(out, row_stride, min(Warp::kQueries, task.kv_end - first_position), q_head);
}

template <typename T, int kHeadDim>
void RunAttentionPrefill(const AttentionPrefillArgs& args, cudaStream_t stream) {
  int64_t num_q_heads = args.q.dim(1), batch_size = args.kv.seq_lens.dim(0);
  int64_t num_tiles = CeilDiv(args.max_q_len, PrefillTile<kHeadDim>::kQueries);
  if (num_tiles == 0 || batch_size == 0) return;
  TIDAL_CHECK(args.rule.sm_scale > 0.0f, UnsupportedError, "attention_prefill: sm_scale ",
              args.rule.sm_scale, " on CUDA; expected a positive number");
  PagedKvView<T> kv = MakePagedKvView<T>("attention_prefill", args.kv);
  AttentionPrefillParams<T> params{.q = static_cast<const T*>(args.q.ptr),
                                   .q_starts = args.q_starts.data<int32_t>(),
                                   .kv = kv,
                                   .rule = MakePromptRule(args.rule, args.kv.k_scale),
                                   .out_scale = args.kv.v_scale,
                                   .group_size = static_cast<int>(num_q_heads / kv.num_kv_heads),
                                   .out = static_cast<T*>(args.out.ptr)};

  auto kernel = AttentionPrefillKernel<T, kHeadDim>;
  constexpr int kSharedBytes = PrefillTile<kHeadDim>::kSharedElements * sizeof(T);
  TIDAL_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  dim3 grid(static_cast<unsigned>(num_q_heads), static_cast<unsigned>(batch_size),
            static_cast<unsigned>(num_tiles));
  kernel<<<grid, kPrefillThreads, kSharedBytes, stream>>>(params);
  TIDAL_LAUNCH_CHECK("attention_prefill");
}

}  // namespace tidal
