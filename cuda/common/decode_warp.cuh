// One warp's share of decode attention: flash-decoding (online softmax over a stream of K and V) of
// the query heads of one KV head, in tiles of 16 tokens, of an fp8 cache 32. Used by
// attention_full.cuh, attention_sparse.cuh and, for the heads of several queries,
// attention_few_queries.cuh; by score_keys.cuh for scores and their softmax state alone, without V.
//
// The tensor cores see everything transposed: scores^T [16 tokens x 8 heads] = K [16 x D] . Q^T,
// and out^T [D x 8 heads] += V^T [D x 16 tokens] . P^T. Tokens, of which there are many, fill the
// 16 rows of an mma, and a group's up to 8 query heads its 8 columns, so K and V are read once for
// the group and no instruction is spent on padding to 16 heads. More columns are more such mma with
// the same fragments of K and V. Absent heads are zero columns that nobody reads.
//
// Codes of an fp8 cache lie in shared memory as they are stored and become numbers of T behind
// ldmatrix, two at a time; which dims an mma's columns of K and rows of V^T are is free, so all is
// laid out for what the lanes then have (LoadQuery, OutputDim). No number is multiplied by its
// scale: those of K are in sm_scale, and those of V in the output's. A row of the cache that holds
// a NaN is all NaN, so a look at a part of it is enough.
//
// A warp waits for its own copies only (common/decode_stages.cuh); warps meet once, in FinishBlock.
// Numerics: scores, maximum, sum and output are float32; the weights exp(score - max) are rounded
// to T for the product with V, while their sum is taken before rounding.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/async_copy.cuh"
#include "common/attended_tokens.cuh"
#include "common/decode_split.cuh"
#include "common/decode_stages.cuh"
#include "common/dependent_launch.cuh"
#include "common/float8.cuh"
#include "common/launch_config.h"
#include "common/merge_splits.cuh"
#include "common/mma.cuh"
#include "common/paged_kv.cuh"
#include "common/reduce.cuh"
#include "common/softmax_state.cuh"

namespace tidal {

// kColumnTiles x 8 heads; with more than one, of several queries.
template <typename T, typename Stored, int kHeadDim, int kStages = kDecodeStages<kHeadDim>,
          int kColumnTiles = 1, DecodeReads kReads = DecodeReads::kKeysAndValues>
class DecodeWarp {
 public:
  static constexpr bool kReadsValues = kReads == DecodeReads::kKeysAndValues;
  static constexpr bool kIsCoded = std::is_same_v<Stored, Float8>;
  static constexpr int kColumns = 8 * kColumnTiles;
  using Stages = DecodeStages<Stored, kHeadDim, kStages, kReads>;
  static constexpr int kTokens = Stages::kTokens;  // of a tile
  static constexpr int kRowTiles = kTokens / kDecodeWarpTile;
  static constexpr int kSteps = kHeadDim / 16;  // mma along a row of K
  // Whether a warp has the queries in registers; else the block has them behind the stages.
  static constexpr bool kHoldsQuery = kColumnTiles * kHeadDim <= 256;
  static constexpr int kStagesBytes = kDecodeWarps * Stages::kBytes;
  static constexpr int kSharedBytes =  // of a block
      kStagesBytes +
      (kHoldsQuery ? 0 : kColumnTiles * kSteps * kWarpSize * static_cast<int>(sizeof(uint2)));
  static constexpr int kNoRow = -2;  // what no token's row is

  // `block_shared`: kSharedBytes, aligned to 128.
  __device__ __forceinline__ DecodeWarp(unsigned char* block_shared, const PagedKvView<Stored>& kv)
      : block_shared_(block_shared),
        stages_(block_shared + threadIdx.x / kWarpSize * Stages::kBytes, kv),
        lane_(threadIdx.x % kWarpSize) {
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) max_[t][0] = max_[t][1] = NegativeInfinity();
  }

  // Attends to those of the tokens [span.begin, span.end) that are this warp's: every
  // kDecodeWarps-th tile. tokens: AttendedTokens, or what has its functions. late_row: the row that
  // the kernel in front may be writing, or kNoRow. on_scores(first, scores, valid, key_tile): the
  // finished scores of 16 tokens, and the keys of their tile, which nobody needs any more. Returns
  // after WaitForPreviousKernel.
  template <typename Tokens, typename OnScores>
  __device__ __forceinline__ void Attend(const Tokens& tokens, SplitSpan span,
                                         const DecodeQuery<T>& query, int late_row,
                                         const OnScores& on_scores) {
    constexpr int kBlockTokens = kDecodeWarps * kTokens;
    int begin = span.begin + static_cast<int>(threadIdx.x) / kWarpSize * kTokens;
    int num_tiles = begin < span.end ? (span.end - begin - 1) / kBlockTokens + 1 : 0;
    // Lane l looks up the l % kTokens-th token of a tile.
    auto position_of = [&](int tile) {
      int token = begin + tile * kBlockTokens + lane_ % kTokens;
      int position = tokens.Position(min(token, span.end - 1));
      return token < span.end ? position : -1;
    };

    // For the tile now and the kTilesAhead after it: a bit for each token that is not masked.
    constexpr int kTilesAhead = Stages::kTilesAhead;
    unsigned valid[kTilesAhead + 1];
    int rows[kTilesAhead + 1];
#pragma unroll
    for (int i = 0; i <= kTilesAhead; ++i) rows[i] = position_of(i);
    int next_position = position_of(kTilesAhead + 1);
#pragma unroll
    for (int i = 0; i <= kTilesAhead; ++i) rows[i] = tokens.Row(rows[i]);
    int next_row = rows[kTilesAhead];
    stages_.StartEarly(rows, num_tiles, late_row, valid);
    WaitForPreviousKernel();
    LetNextKernelStart();
    LoadQuery(query);
    stages_.CopyLate(rows, late_row);

    int stage = 0;
    for (int tile = 0; tile < num_tiles; ++tile) {
      int row = next_row;
      next_row = tokens.Row(next_position);  // a tile ahead: its latency overlaps the arithmetic
      next_position = position_of(tile + kTilesAhead + 2);
      auto copy_next = [&](auto part) {
        stages_.template CopyNext<decltype(part)::value>(stage, tile + kTilesAhead < num_tiles,
                                                         row);
        if constexpr (decltype(part)::value == TilePart::kKeys) {
          valid[kTilesAhead] = __ballot_sync(kFullWarp, row >= 0);
        }
      };
      auto begin_stage = [&](auto part) {
        WaitCopies<Stages::kAhead - 1>();  // the oldest of the kAhead groups under way has landed
        __syncwarp();                      // for all lanes; and all are done with the stage before
        if constexpr (Stages::kAhead < kStages) copy_next(part);
      };
      auto end_stage = [&](auto part) {
        if constexpr (Stages::kAhead == kStages) {
          __syncwarp();  // all are done with the stage
          copy_next(part);
        }
        stage = stage == kStages - 1 ? 0 : stage + 1;
      };

      begin_stage(KeyPart{});
      float scores[kColumnTiles][kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        Scores(stage, m, begin + tile * kBlockTokens, valid[0], query, scores);
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        int first = m * kDecodeWarpTile;
        on_scores(begin + tile * kBlockTokens + first, scores[0][m], valid[0] >> first,
                  stages_.KeyTile(stage));
      }
      if constexpr (Stages::kOfTile == 2) {
        end_stage(KeyPart{});
        begin_stage(ValuePart{});
      }
      Accumulate(stage, scores);
      end_stage(LastPart{});
#pragma unroll
      for (int i = 0; i < kTilesAhead; ++i) valid[i] = valid[i + 1];
    }
  }

  // All threads of the block, once, after Attend: makes the warps' results known to each other.
  __device__ __forceinline__ void FinishBlock() {
    WaitCopies<0>();
    __syncwarp();  // every lane is done reading the stages, whose place the results take
    StoreForMerge(reinterpret_cast<float*>(stages_.KeyTile(0)));
    __syncthreads();
  }

  // After FinishBlock, by a whole warp: the block's result for a head.
  __device__ __forceinline__ HeadResult<kHeadDim> BlockResult(int head) const {
    static_assert(kReadsValues);
    auto state_of = [&](int warp) { return MergeState(warp, head); };
    auto out_of = [&](int warp) {
      const float* out = MergeArea(warp) + head * kMergeStride;
      return reinterpret_cast<const LaneDims<kHeadDim>*>(out)[lane_];
    };
    return MergeParts<kHeadDim, kDecodeWarps>(kDecodeWarps, state_of, out_of);
  }

  // The same of its softmax alone.
  __device__ __forceinline__ HeadState BlockState(int head) const {
    return MergeStates<kDecodeWarps>(kDecodeWarps,
                                     [&](int warp) { return MergeState(warp, head); });
  }

 private:
  static_assert(kRowTiles * kDecodeWarpTile == kTokens);
  using KeyPart = std::integral_constant<TilePart, TilePart::kKeys>;
  using ValuePart = std::integral_constant<TilePart, TilePart::kValues>;
  using LastPart = std::conditional_t<Stages::kOfTile == 2, ValuePart, KeyPart>;

  // A warp's results in shared memory, in floats: out [kColumns, D] if there is one, in rows that
  // are padded so that StoreForMerge spreads over all banks; max [kColumns], sum [kColumns].
  static constexpr int kMergeStride = kHeadDim + 4;
  static constexpr int kMergeMax = kReadsValues ? kColumns * kMergeStride : 0;
  static constexpr int kMergeSum = kMergeMax + kColumns;
  static_assert((kMergeSum + kColumns) * sizeof(float) <= Stages::kBytes);

  __device__ __forceinline__ const float* MergeArea(int warp) const {
    return reinterpret_cast<const float*>(block_shared_ + warp * Stages::kBytes);
  }
  __device__ __forceinline__ float2 MergeState(int warp, int head) const {
    return make_float2(MergeArea(warp)[kMergeMax + head], MergeArea(warp)[kMergeSum + head]);
  }

  // The place of a lane's columns of B for a step, which are the same in all warps.
  __device__ __forceinline__ uint2* SharedQuery(int t, int step) const {
    auto first = reinterpret_cast<uint2*>(block_shared_ + kStagesBytes);
    return first + (t * kSteps + step) * kWarpSize + lane_;
  }
  __device__ __forceinline__ uint2 QueryOf(int t, int step) const {
    if constexpr (kHoldsQuery) {
      return make_uint2(query_[t][step][0], query_[t][step][1]);
    } else {
      return *SharedQuery(t, step);
    }
  }

  // A plain load: through the read-only path it might move before WaitForPreviousKernel.
  __device__ __forceinline__ void LoadQuery(const DecodeQuery<T>& query) {
    int pair = lane_ % 4 * 2;
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) {
      int head = t * 8 + lane_ / 4;
      bool present = head < query.num_heads;
      const T* source = query.Head(present ? head : 0, kHeadDim);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (!kHoldsQuery && step % kDecodeWarps != threadIdx.x / kWarpSize) continue;
        uint32_t columns[2];
        if constexpr (kIsCoded) {
          // Takes of four dims 0 and 2, then 1 and 3, as DecodeFloat8Pair gives those of K.
          uint2 four = present ? *reinterpret_cast<const uint2*>(source + step * 16 + pair * 2)
                               : make_uint2(0u, 0u);
          columns[0] = __byte_perm(four.x, four.y, kLowerHalves);
          columns[1] = __byte_perm(four.x, four.y, kUpperHalves);
        } else {
          const T* of_step = source + step * 16 + pair;
          columns[0] = present ? *reinterpret_cast<const uint32_t*>(of_step) : 0u;
          columns[1] = present ? *reinterpret_cast<const uint32_t*>(of_step + 8) : 0u;
        }
        if constexpr (kHoldsQuery) {
          query_[t][step][0] = columns[0];
          query_[t][step][1] = columns[1];
        } else {
          *SharedQuery(t, step) = make_uint2(columns[0], columns[1]);
        }
      }
      if constexpr (kColumnTiles > 1) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          num_visible_[t][i] = query.num_visible + (t * 8 + pair + i) / query.heads_per_query;
        }
      }
    }
    if constexpr (!kHoldsQuery) __syncthreads();
  }

  // dot[t][c]: q.k, without scales, of token lane / 4 + (c / 2) * 8 of the 16 from `key` on and
  // head t * 8 + lane % 4 * 2 + c % 2.
  __device__ __forceinline__ void Multiply(const Stored* key, float (&dot)[kColumnTiles][4]) {
    // Loads of all steps at once would want more registers than the output leaves.
    constexpr int kUnrolledSteps = kHoldsQuery ? kSteps : 1;
    int offset = TileOffset<kHeadDim, Stored>(lane_ % 16, lane_ / 16);
    auto multiply = [&](int step, const uint32_t(&a)[4]) {
#pragma unroll
      for (int t = 0; t < kColumnTiles; ++t) {
        uint2 b = QueryOf(t, step);
        MultiplyAdd<T>(dot[t], a, b.x, b.y);
      }
    };
    if constexpr (kIsCoded) {
#pragma unroll(kUnrolledSteps)
      for (int step = 0; step < kSteps; step += 2) {
        uint32_t codes[4];  // matrices: tokens 0-7 and 8-15 of dims 0-15, then of dims 16-31
        LoadMatrix4(codes, key + NextChunks<Stored>(offset, step));
#pragma unroll
        for (int c = 0; c < 4 && step == 0; ++c) {
          float zero = HasFloat8Nan(codes[c / 2]) ? __int_as_float(0x7fffffff) : 0.0f;
#pragma unroll
          for (int t = 0; t < kColumnTiles; ++t) dot[t][c] = zero;
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          if (step + i / 2 == kSteps) break;  // heads of 80
          // A register has dims 4 (lane % 4) to 4 (lane % 4) + 3 of a token.
          const uint32_t a[4] = {DecodeFloat8Pair<T>(codes[i] << 8),
                                 DecodeFloat8Pair<T>(codes[i + 1] << 8),
                                 DecodeFloat8Pair<T>(codes[i]), DecodeFloat8Pair<T>(codes[i + 1])};
          multiply(step + i / 2, a);
        }
      }
    } else {
#pragma unroll(kUnrolledSteps)
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[4];  // matrices: tokens 0-7 and 8-15 of dims 0-7, then of dims 8-15
        LoadMatrix4(a, key + NextChunks<Stored>(offset, step * 2));
        multiply(step, a);
      }
    }
  }

  // scores[t][m][c]: sm_scale * q.k, capped, of token first + m * 16 + lane / 4 + (c / 2) * 8 and
  // head t * 8 + lane % 4 * 2 + c % 2; -inf where masked.
  __device__ __forceinline__ void Scores(int stage, int m, int first, unsigned valid,
                                         const DecodeQuery<T>& query,
                                         float (&scores)[kColumnTiles][kRowTiles][4]) {
    float dot[kColumnTiles][4] = {};
    Multiply(stages_.KeyTile(stage) + m * kDecodeWarpTile * kPaddedDim<kHeadDim>, dot);
    query.MakeScores(dot);
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        int token = m * kDecodeWarpTile + lane_ / 4 + c / 2 * 8;
        bool is_valid = (valid >> token) & 1u;
        if constexpr (kColumnTiles > 1) {
          // How many tokens the query's own comes after it.
          int behind = num_visible_[t][c % 2] - 1 - (first + token);
          is_valid = is_valid && static_cast<unsigned>(behind) < query.window;
        }
        scores[t][m][c] = is_valid ? dot[t][c] : NegativeInfinity();
      }
    }
  }

  // One step of the online softmax of a tile's scores.
  __device__ __forceinline__ void Accumulate(int stage,
                                             const float (&scores)[kColumnTiles][kRowTiles][4]) {
    float rescale[kColumnTiles][2];
    uint32_t b[kColumnTiles][kRowTiles][2];
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) {
      float weights[kRowTiles][4];
      UpdateState(t, scores[t], weights, rescale[t]);
      if constexpr (kReadsValues) {
        // Weights arrive as C [token, head] and leave as B [token (k), head (n)]: two 8 x 8
        // transposes.
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          b[t][m][0] = TransposeMatrix(PackPair<T>(weights[m][0], weights[m][1]));
          b[t][m][1] = TransposeMatrix(PackPair<T>(weights[m][2], weights[m][3]));
        }
      }
    }
    if constexpr (kReadsValues) AddValues(stage, rescale, b);
  }

  // Takes scores into the maximum and the sum of their heads; `weights` of the scores, and what
  // those before are now to be multiplied by. Lanes that share lane % 4 hold the same heads.
  __device__ __forceinline__ void UpdateState(int t, const float (&scores)[kRowTiles][4],
                                              float (&weights)[kRowTiles][4], float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float max = fmaxf(scores[0][i], scores[0][i + 2]);
#pragma unroll
      for (int m = 1; m < kRowTiles; ++m) max = fmaxf(max, fmaxf(scores[m][i], scores[m][i + 2]));
#pragma unroll
      for (int mask = 4; mask < kWarpSize; mask *= 2) {
        max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, mask));
      }
      max = fmaxf(max, max_[t][i]);
      float finite_max = FiniteMax(max), sum = 0.0f;
      rescale[i] = SoftmaxWeight(max_[t][i], finite_max);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        weights[m][i] = SoftmaxWeight(scores[m][i], finite_max);
        weights[m][i + 2] = SoftmaxWeight(scores[m][i + 2], finite_max);
        sum = __fadd_rn(sum, __fadd_rn(weights[m][i], weights[m][i + 2]));
      }
      max_[t][i] = max;
      sum_[t][i] = __fmaf_rn(sum_[t][i], rescale[i], sum);
    }
  }

  // out_ = out_ x rescale + the tile's values, weighted.
  __device__ __forceinline__ void AddValues(int stage, const float (&rescale)[kColumnTiles][2],
                                            uint32_t (&b)[kColumnTiles][kRowTiles][2]) {
    const Stored* value = stages_.ValueTile(stage);
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          out_[t][step][c] = __fmul_rn(out_[t][step][c], rescale[t][c % 2]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      AddWeighted(value + m * kDecodeWarpTile * kPaddedDim<kHeadDim>, m, b);
    }
  }

  // out_ += the 16 tokens from `value` on, weighted by b[t][m].
  __device__ __forceinline__ void AddWeighted(const Stored* value, int m,
                                              uint32_t (&b)[kColumnTiles][kRowTiles][2]) {
    auto multiply = [&](int step, const uint32_t(&a)[4]) {
#pragma unroll
      for (int t = 0; t < kColumnTiles; ++t) {
        MultiplyAdd<T>(out_[t][step], a, b[t][m][0], b[t][m][1]);
      }
    };
    if constexpr (kIsCoded) {
      int offset = TileOffset<kHeadDim, Stored>(lane_ % 16, lane_ / 16);
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        uint32_t codes[4];  // matrices: dims 0-15 of tokens 0-7 and 8-15, then dims 16-31
        LoadMatrix4Transposed(codes, value + NextChunks<Stored>(offset, step));
#pragma unroll
        for (int i = 0; i < 2 && step == 0; ++i) {
          bool is_nan = HasFloat8Nan(codes[i]);
#pragma unroll
          for (int t = 0; t < kColumnTiles; ++t) b[t][m][i] = is_nan ? 0x7fff7fffu : b[t][m][i];
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          if (step + i / 2 == kSteps) break;  // heads of 80
          // A register has dims 2 (lane / 4) and 2 (lane / 4) + 1 of two tokens.
          const uint32_t a[4] = {DecodeFloat8Pair<T>(codes[i] << 8), DecodeFloat8Pair<T>(codes[i]),
                                 DecodeFloat8Pair<T>(codes[i + 1] << 8),
                                 DecodeFloat8Pair<T>(codes[i + 1])};
          multiply(step + i / 2, a);
        }
      }
    } else {
      int offset = TileOffset<kHeadDim, Stored>(lane_ % 8 + lane_ / 16 * 8, lane_ / 8 % 2);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[4];  // matrices: dims 0-7 and 8-15 of tokens 0-7, then of tokens 8-15
        LoadMatrix4Transposed(a, value + NextChunks<Stored>(offset, step * 2));
        multiply(step, a);
      }
    }
  }

  // out_[t][step][c] is dim step * 16 + OutputDim(c) of head t * 8 + lane % 4 * 2 + c % 2.
  __device__ __forceinline__ int OutputDim(int c) const {
    return kIsCoded ? lane_ / 4 * 2 + c / 2 : lane_ / 4 + c / 2 * 8;
  }

  // The maximum is the same in the lanes of a head, the sum is not yet added up over them.
  __device__ __forceinline__ void StoreForMerge(float* area) {
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) {
      int first_head = t * 8 + lane_ % 4 * 2;
      if constexpr (kReadsValues) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            int dim = step * 16 + OutputDim(c);
            area[(first_head + c % 2) * kMergeStride + dim] = out_[t][step][c];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = sum_[t][i];
#pragma unroll
        for (int mask = 4; mask < kWarpSize; mask *= 2) {
          sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, mask));
        }
        if (lane_ < 4) {
          area[kMergeMax + first_head + i] = max_[t][i];
          area[kMergeSum + first_head + i] = sum;
        }
      }
    }
  }

  unsigned char* block_shared_;
  Stages stages_;
  int lane_;
  uint32_t query_[kColumnTiles][kHoldsQuery ? kSteps : 1][2];
  int num_visible_[kColumnTiles][2];  // tokens that this lane's heads see; with several queries
  float out_[kColumnTiles][kSteps][4] = {};
  float max_[kColumnTiles][2];
  float sum_[kColumnTiles][2] = {};
};

}  // namespace tidal
