// One warp's share of decode attention: flash-decoding (online softmax over a stream of K and V) of
// the query heads of one KV head, in tiles of 16 tokens. Used by attention_full.cuh,
// attention_sparse.cuh.
//
// The tensor cores see everything transposed: scores^T [16 tokens x 8 heads] = K [16 x D] . Q^T,
// and out^T [D x 8 heads] += V^T [D x 16 tokens] . P^T. Tokens, of which there are many, fill the
// 16 rows of an mma, and a group's up to 8 query heads its 8 columns, so K and V are read once for
// the group and no instruction is spent on padding to 16 heads. Absent heads are zero columns that
// nobody reads.
//
// A warp owns its stages of shared memory and waits for its own copies only; warps meet once, in
// MergeWarps. Numerics: scores, maximum, sum and output are float32; the weights exp(score - max)
// are rounded to T for the product with V, while their sum is taken before rounding.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/async_copy.cuh"
#include "common/decode_split.cuh"
#include "common/launch_config.h"
#include "common/mma.cuh"
#include "common/paged_kv.cuh"
#include "common/reduce.cuh"
#include "common/softmax_state.cuh"

namespace tidal {

inline constexpr int kDecodeThreads = kDecodeWarps * kWarpSize;

template <typename T, int kHeadDim>
class DecodeWarp {
 public:
  // 24 KB of stages a warp: two blocks of 4 warps an SM keep at least 128 KB of reads in flight,
  // several times what 4.8 TB/s x 1 us of latency over 132 SMs asks for.
  static constexpr int kStages = 3 * 128 / kHeadDim;
  static constexpr int kSharedBytes = kStages * 2 * kDecodeWarpTile * kHeadDim * sizeof(T);

  // `shared`: this warp's kSharedBytes. `q`: the first of num_heads rows [D].
  __device__ __forceinline__ DecodeWarp(T* shared, const T* k, const T* v, const T* q,
                                        int num_heads)
      : shared_(shared), k_(k), v_(v), lane_(threadIdx.x % kWarpSize) {
    int head = lane_ / 4, pair = lane_ % 4 * 2;
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const T* source = q + head * kHeadDim + step * 16 + pair;
      bool present = head < num_heads;
      query_[step][0] = present ? __ldg(reinterpret_cast<const uint32_t*>(source)) : 0u;
      query_[step][1] = present ? __ldg(reinterpret_cast<const uint32_t*>(source + 8)) : 0u;
    }
  }

  // Attends to the tokens of `span` that are this warp's: every kDecodeWarps-th tile of 16.
  // positions.Row(i): row of k and v of the i-th attended token, -1 = masked; called by lane l for
  // the l % 16-th token of a tile. on_scores(first, scores, valid): the finished scores of a tile.
  template <typename Positions, typename OnScores>
  __device__ __forceinline__ void Attend(const Positions& positions, SplitSpan span, float sm_scale,
                                         const OnScores& on_scores) {
    int warp = threadIdx.x / kWarpSize;
    int begin = span.begin + warp * kDecodeWarpTile;
    int num_tiles = begin < span.end ? (span.end - begin - 1) / kDecodeTile + 1 : 0;
    auto row_of = [&](int tile) {
      int token = begin + tile * kDecodeTile + lane_ % kDecodeWarpTile;
      return token < span.end ? positions.Row(token) : -1;
    };

    // valid[i]: which tokens of the i-th tile from now are not masked.
    unsigned valid[kStages];
    int rows[kStages];
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) rows[stage] = row_of(stage);
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) valid[stage] = Copy(stage, rows[stage]);
    int next_row = rows[kStages - 1];

    int stage = 0;
    for (int tile = 0; tile < num_tiles; ++tile) {
      int row = next_row;
      next_row = row_of(tile + kStages);  // one tile ahead: its latency overlaps the arithmetic
      WaitCopies<kStages - 2>();  // the oldest of the kStages - 1 groups under way has landed
      __syncwarp();               // for all lanes; and all are done with the tile before
      valid[kStages - 1] = Copy(stage == 0 ? kStages - 1 : stage - 1, row);

      float scores[4];
      Scores(stage, valid[0], sm_scale, scores);
      on_scores(begin + tile * kDecodeTile, scores, valid[0]);
      Accumulate(stage, scores);

      stage = stage == kStages - 1 ? 0 : stage + 1;
#pragma unroll
      for (int i = 0; i < kStages - 1; ++i) valid[i] = valid[i + 1];
    }
  }

  // Merges the block's warps in order and writes one partial row for each of num_heads heads.
  // partial_row(head) is its row. All threads of the block call this once, at the end.
  // `block_shared` is the stages of all warps, which the results replace.
  template <typename PartialRow>
  __device__ __forceinline__ void MergeWarps(T* block_shared, const PartialResults& partials,
                                             int num_heads, const PartialRow& partial_row) {
    WaitCopies<0>();
    __syncwarp();  // every lane is done reading the stages
    StoreForMerge(reinterpret_cast<float*>(shared_));
    __syncthreads();
    for (int i = threadIdx.x; i < num_heads * kHeadDim; i += kDecodeThreads) {
      int head = i / kHeadDim, dim = i % kHeadDim;
      float max = NegativeInfinity(), sum = 0.0f, out = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kDecodeWarps; ++warp) {
        max = fmaxf(max, MergeArea(block_shared, warp)[kMergeMax + head]);
      }
#pragma unroll
      for (int warp = 0; warp < kDecodeWarps; ++warp) {
        const float* area = MergeArea(block_shared, warp);
        float weight = SoftmaxWeight(area[kMergeMax + head], FiniteMax(max));
        sum = __fmaf_rn(weight, area[kMergeSum + head], sum);
        out = __fmaf_rn(weight, area[head * kHeadDim + dim], out);
      }
      int64_t row = partial_row(head);
      partials.out[row * kHeadDim + dim] = out;
      if (dim == 0) partials.state[row] = make_float2(max, sum);
    }
  }

 private:
  static_assert(kDecodeWarpTile == kCopyTokens);
  static constexpr int kTileElements = kDecodeWarpTile * kHeadDim;

  // A warp's results in shared memory, in floats: out [8 heads, D], max [8], sum [8].
  static constexpr int kMergeMax = kMaxGroupSize * kHeadDim;
  static constexpr int kMergeSum = kMergeMax + kMaxGroupSize;
  static_assert((kMergeSum + kMaxGroupSize) * sizeof(float) <= kSharedBytes);

  __device__ __forceinline__ static const float* MergeArea(const T* block_shared, int warp) {
    return reinterpret_cast<const float*>(block_shared + warp * (kSharedBytes / sizeof(T)));
  }

  __device__ __forceinline__ T* KeyTile(int stage) const {
    return shared_ + stage * 2 * kTileElements;
  }
  __device__ __forceinline__ T* ValueTile(int stage) const {
    return KeyTile(stage) + kTileElements;
  }

  // Starts the copies of a tile, one group. `row`: of token lane % 16; -1 gives zeros. Returns a
  // bit for each token that is not masked.
  __device__ __forceinline__ unsigned Copy(int stage, int row) {
    CopyTokens<T, kHeadDim>(KeyTile(stage), ValueTile(stage), k_, v_, row);
    CommitCopies();
    return __ballot_sync(kFullWarp, row >= 0);
  }

  // scores[c]: sm_scale * q.k of token lane / 4 + (c / 2) * 8 and head lane % 4 * 2 + c % 2; -inf
  // where masked.
  __device__ __forceinline__ void Scores(int stage, unsigned valid, float sm_scale,
                                         float (&scores)[4]) {
    const T* key = KeyTile(stage);
    int offset = TileOffset<kHeadDim>(lane_ % 16, lane_ / 16);
    float dot[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      uint32_t a[4];  // matrices: tokens 0-7 and 8-15 of dims 0-7, then of dims 8-15
      LoadMatrix4(a, key + NextChunks(offset, step * 2));
      MultiplyAdd<T>(dot, a, query_[step][0], query_[step][1]);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      bool is_valid = (valid >> (lane_ / 4 + c / 2 * 8)) & 1u;
      scores[c] = is_valid ? __fmul_rn(dot[c], sm_scale) : NegativeInfinity();
    }
  }

  // One step of the online softmax. Lanes that share lane % 4 hold the same two heads.
  __device__ __forceinline__ void Accumulate(int stage, const float (&scores)[4]) {
    float weights[4];
    float rescale[2];
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      float max = fmaxf(scores[head], scores[head + 2]);
#pragma unroll
      for (int mask = 4; mask < kWarpSize; mask *= 2) {
        max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, mask));
      }
      max = fmaxf(max, max_[head]);
      float finite_max = FiniteMax(max);
      rescale[head] = SoftmaxWeight(max_[head], finite_max);
      weights[head] = SoftmaxWeight(scores[head], finite_max);
      weights[head + 2] = SoftmaxWeight(scores[head + 2], finite_max);
      max_[head] = max;
      sum_[head] =
          __fmaf_rn(sum_[head], rescale[head], __fadd_rn(weights[head], weights[head + 2]));
    }
    // Weights arrive as C [token, head] and leave as B [token (k), head (n)]: two 8 x 8 transposes.
    uint32_t b0 = TransposeMatrix(PackPair<T>(weights[0], weights[1]));
    uint32_t b1 = TransposeMatrix(PackPair<T>(weights[2], weights[3]));
    const T* value = ValueTile(stage);
    int offset = TileOffset<kHeadDim>(lane_ % 8 + lane_ / 16 * 8, lane_ / 8 % 2);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      uint32_t a[4];  // matrices: dims 0-7 and 8-15 of tokens 0-7, then of tokens 8-15
      LoadMatrix4Transposed(a, value + NextChunks(offset, step * 2));
#pragma unroll
      for (int c = 0; c < 4; ++c) out_[step][c] = __fmul_rn(out_[step][c], rescale[c % 2]);
      MultiplyAdd<T>(out_[step], a, b0, b1);
    }
  }

  // out_[step][c] is dim step * 16 + lane / 4 + (c / 2) * 8 of head lane % 4 * 2 + c % 2. The
  // maximum is the same in the lanes of a head, the sum is not yet added up over them.
  __device__ __forceinline__ void StoreForMerge(float* area) {
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        int head = lane_ % 4 * 2 + c % 2, dim = step * 16 + lane_ / 4 + c / 2 * 8;
        area[head * kHeadDim + dim] = out_[step][c];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = sum_[i];
#pragma unroll
      for (int mask = 4; mask < kWarpSize; mask *= 2) {
        sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, mask));
      }
      if (lane_ < 4) {
        area[kMergeMax + lane_ * 2 + i] = max_[i];
        area[kMergeSum + lane_ * 2 + i] = sum;
      }
    }
  }

  T* shared_;
  const T* k_;
  const T* v_;
  int lane_;
  uint32_t query_[kHeadDim / 16][2];
  float out_[kHeadDim / 16][4] = {};
  float max_[2] = {NegativeInfinity(), NegativeInfinity()};
  float sum_[2] = {0.0f, 0.0f};
};

}  // namespace tidal
