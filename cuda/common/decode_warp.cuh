// One warp's share of decode attention: flash-decoding (online softmax over a stream of K and V) of
// the query heads of one KV head, in tiles of 16 tokens. Used by attention_full.cuh,
// attention_sparse.cuh and, for the heads of several queries, attention_few_queries.cuh; by
// score_keys.cuh for scores and their softmax state alone, without V.
//
// The tensor cores see everything transposed: scores^T [16 tokens x 8 heads] = K [16 x D] . Q^T,
// and out^T [D x 8 heads] += V^T [D x 16 tokens] . P^T. Tokens, of which there are many, fill the
// 16 rows of an mma, and a group's up to 8 query heads its 8 columns, so K and V are read once for
// the group and no instruction is spent on padding to 16 heads. More columns are more such mma with
// the same fragments of K and V. Absent heads are zero columns that nobody reads.
//
// A warp owns its stages of shared memory and waits for its own copies only; warps meet once, in
// FinishBlock. Numerics: scores, maximum, sum and output are float32; the weights exp(score - max)
// are rounded to T for the product with V, while their sum is taken before rounding.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/async_copy.cuh"
#include "common/cache_reads.h"
#include "common/decode_split.cuh"
#include "common/dependent_launch.cuh"
#include "common/launch_config.h"
#include "common/merge_splits.cuh"
#include "common/mma.cuh"
#include "common/paged_kv.cuh"
#include "common/reduce.cuh"
#include "common/softmax_state.cuh"

namespace tidal {

// The query heads that attend to one list of tokens of one KV head: of one query, or of several
// that follow each other.
template <typename T>
struct DecodeQuery {
  const T* rows;  // [num_heads / heads_per_query, query_stride, D]: the first heads_per_query each
  int num_heads;  // at least 1
  float sm_scale;
  int heads_per_query = kMaxGroupSize;
  int64_t query_stride = 0;
  int num_visible = 0;  // tokens that the first query sees; of several, each sees one more

  __device__ __forceinline__ const T* Head(int head, int head_dim) const {
    return rows + (head / heads_per_query * query_stride + head % heads_per_query) * head_dim;
  }
};

// The tokens of one row and KV head to attend to. Loads are from L2, which nothing stale is in:
// they may come before WaitForPreviousKernel (CacheReads::kEarly).
template <typename T>
struct AttendedTokens {
  const PagedKvView<T>& kv;
  int batch;
  int kv_head;
  int seq_len;          // at least 1
  const int32_t* list;  // positions, or nullptr: all of them

  // Of the i-th attended token.
  __device__ __forceinline__ int Position(int i) const {
    return list == nullptr ? i : __ldcg(list + i);
  }

  // Row of k and v. -1 for a position outside the sequence: an entry that no selection writes must
  // not become a read of memory that is not ours. No branches, so that lookups run side by side.
  __device__ __forceinline__ int Row(int position) const {
    bool is_inside = static_cast<unsigned>(position) < static_cast<unsigned>(seq_len);
    int row = kv.Row(batch, kv_head, is_inside ? position : 0);
    return is_inside ? row : -1;
  }
};

// What a warp reads of its tokens. With keys only there is no output, just the scores' maximum and
// sum.
enum class DecodeReads { kKeysAndValues, kKeys };

// Tiles of 16 x D elements in a stage.
template <DecodeReads kReads>
inline constexpr int kStageTiles = kReads == DecodeReads::kKeysAndValues ? 2 : 1;

// 24 KB of stages a warp: two blocks of 4 warps an SM keep at least 128 KB of reads in flight,
// several times what 4.8 TB/s x 1 us of latency over 132 SMs asks for.
template <int kHeadDim, DecodeReads kReads = DecodeReads::kKeysAndValues>
inline constexpr int kDecodeStages = 6 * 128 / kHeadDim / kStageTiles<kReads>;

// kColumnTiles x 8 heads; with more than one, of several queries.
template <typename T, int kHeadDim, int kStages = kDecodeStages<kHeadDim>, int kColumnTiles = 1,
          DecodeReads kReads = DecodeReads::kKeysAndValues>
class DecodeWarp {
 public:
  static constexpr bool kReadsValues = kReads == DecodeReads::kKeysAndValues;
  static constexpr int kColumns = 8 * kColumnTiles;
  // Tiles whose copies are under way at a time: in all stages but that of the tile that is worked
  // on. With fewer stages than usual, which should hold all of a warp's tiles, in all of them.
  static constexpr int kAhead = kStages < kDecodeStages<kHeadDim, kReads> ? kStages : kStages - 1;
  static constexpr int kStageBytes =
      kStageTiles<kReads> * kDecodeWarpTile * kHeadDim * static_cast<int>(sizeof(T));
  static constexpr int kSharedBytes = kDecodeWarps * kStages * kStageBytes;  // of a block
  static constexpr int kNoRow = -2;  // what no token's row is

  // `block_shared`: kSharedBytes, aligned to 128.
  __device__ __forceinline__ DecodeWarp(unsigned char* block_shared, const PagedKvView<T>& kv)
      : block_shared_(block_shared), k_(kv.k), v_(kv.v), lane_(threadIdx.x % kWarpSize) {
    shared_ = reinterpret_cast<T*>(block_shared + threadIdx.x / kWarpSize * kWarpBytes);
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) max_[t][0] = max_[t][1] = NegativeInfinity();
  }

  // Attends to those of the tokens [span.begin, span.end) that are this warp's: every
  // kDecodeWarps-th tile of 16. tokens: AttendedTokens, or what has its functions. late_row: the
  // row that the kernel in front may be writing, or kNoRow. on_scores(first, scores, valid,
  // key_tile): the finished scores of a tile, and its keys, which nobody needs any more. Returns
  // after WaitForPreviousKernel.
  template <typename Tokens, typename OnScores>
  __device__ __forceinline__ void Attend(const Tokens& tokens, SplitSpan span,
                                         const DecodeQuery<T>& query, int late_row,
                                         const OnScores& on_scores) {
    int begin = span.begin + static_cast<int>(threadIdx.x) / kWarpSize * kDecodeWarpTile;
    int num_tiles = begin < span.end ? (span.end - begin - 1) / kDecodeTile + 1 : 0;
    // Lane l looks up the l % 16-th token of a tile.
    auto position_of = [&](int tile) {
      int token = begin + tile * kDecodeTile + lane_ % kDecodeWarpTile;
      int position = tokens.Position(min(token, span.end - 1));
      return token < span.end ? position : -1;
    };

    // Of the tile now and the kAhead tiles after it: a bit for each token that is not masked.
    unsigned valid[kAhead + 1];
    int rows[kAhead + 1];
#pragma unroll
    for (int i = 0; i <= kAhead; ++i) rows[i] = position_of(i);
    int next_position = position_of(kAhead + 1);
#pragma unroll
    for (int i = 0; i <= kAhead; ++i) rows[i] = tokens.Row(rows[i]);
    int next_row = rows[kAhead];
    StartEarly(rows, num_tiles, late_row, valid);
    WaitForPreviousKernel();
    LetNextKernelStart();
    LoadQuery(query);
    CopyLate(rows, late_row);

    int stage = 0;
    for (int tile = 0; tile < num_tiles; ++tile) {
      int row = next_row;
      next_row = tokens.Row(next_position);  // a tile ahead: its latency overlaps the arithmetic
      next_position = position_of(tile + kAhead + 2);
      auto copy_next = [&] {
        int target = stage + kAhead - kStages;
        Copy(target < 0 ? target + kStages : target, tile + kAhead < num_tiles, row);
        valid[kAhead] = __ballot_sync(kFullWarp, row >= 0);
      };
      WaitCopies<kAhead - 1>();  // the oldest of the kAhead groups under way has landed
      __syncwarp();              // for all lanes; and all are done with the tile before
      if constexpr (kAhead < kStages) copy_next();

      float scores[kColumnTiles][4];
      Scores(stage, begin + tile * kDecodeTile, valid[0], query.sm_scale, scores);
      on_scores(begin + tile * kDecodeTile, scores[0], valid[0], KeyTile(stage));
      Accumulate(stage, scores);

      if constexpr (kAhead == kStages) {
        __syncwarp();  // all are done with the stage
        copy_next();
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) valid[i] = valid[i + 1];
    }
  }

  // All threads of the block, once, after Attend: makes the warps' results known to each other.
  __device__ __forceinline__ void FinishBlock() {
    WaitCopies<0>();
    __syncwarp();  // every lane is done reading the stages, whose place the results take
    StoreForMerge(reinterpret_cast<float*>(shared_));
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
  static_assert(kDecodeWarpTile == kCopyTokens);
  static constexpr int kTileElements = kDecodeWarpTile * kHeadDim;
  static constexpr int kWarpBytes = kStages * kStageBytes;

  // A warp's results in shared memory, in floats: out [kColumns, D] if there is one, in rows that
  // are padded so that StoreForMerge spreads over all banks; max [kColumns], sum [kColumns].
  static constexpr int kMergeStride = kHeadDim + 4;
  static constexpr int kMergeMax = kReadsValues ? kColumns * kMergeStride : 0;
  static constexpr int kMergeSum = kMergeMax + kColumns;
  static_assert((kMergeSum + kColumns) * sizeof(float) <= kWarpBytes);

  __device__ __forceinline__ const float* MergeArea(int warp) const {
    return reinterpret_cast<const float*>(block_shared_ + warp * kWarpBytes);
  }
  __device__ __forceinline__ float2 MergeState(int warp, int head) const {
    return make_float2(MergeArea(warp)[kMergeMax + head], MergeArea(warp)[kMergeSum + head]);
  }

  __device__ __forceinline__ T* KeyTile(int stage) const {
    return shared_ + stage * kStageTiles<kReads> * kTileElements;
  }
  __device__ __forceinline__ T* ValueTile(int stage) const {
    return KeyTile(stage) + kTileElements;
  }

  // Starts the copies of a tile, if it is `present`; one group, possibly empty. `row`: of token
  // lane % 16; -1 gives zeros.
  __device__ __forceinline__ void Copy(int stage, bool present, int row) {
    if (present) {
      if constexpr (kReadsValues) {
        CopyTokens<T, kHeadDim>(KeyTile(stage), ValueTile(stage), k_, v_, row, policy_);
      } else {
        CopyKeys<T, kHeadDim>(KeyTile(stage), k_, row, policy_);
      }
    }
    CommitCopies();
  }

  // Starts the copies of the first kAhead tiles, without the tokens in late_row.
  __device__ __forceinline__ void StartEarly(const int (&rows)[kAhead + 1], int num_tiles,
                                             int late_row, unsigned (&valid)[kAhead + 1]) {
#pragma unroll
    for (int stage = 0; stage < kAhead; ++stage) {
      Copy(stage, stage < num_tiles, rows[stage] == late_row ? -1 : rows[stage]);
      valid[stage] = __ballot_sync(kFullWarp, rows[stage] >= 0);
    }
  }

  // Brings in what StartEarly left out; the query's loads are under way meanwhile.
  __device__ __forceinline__ void CopyLate(const int (&rows)[kAhead + 1], int late_row) {
    constexpr int kChunks = kHeadDim / kChunkElements;
    bool waited = false;
#pragma unroll
    for (int stage = 0; stage < kAhead; ++stage) {
      // Lanes l and l + 16 have the same token.
      unsigned late = __ballot_sync(kFullWarp, rows[stage] == late_row) & 0xffffu;
      if (late == 0) continue;
      if (!waited) {
        WaitCopies<0>();
        __syncwarp();  // the zeros that took the tokens' place are not written any more
        waited = true;
      }
      for (; late != 0; late &= late - 1) {
        if (lane_ < kStageTiles<kReads> * kChunks) {
          int chunk = lane_ % kChunks;
          int64_t source = int64_t{late_row} * kHeadDim + chunk * kChunkElements;
          int target = TileOffset<kHeadDim>(__ffs(late) - 1, chunk);
          bool is_key = lane_ < kChunks;
          CopyAsync16((is_key ? KeyTile(stage) : ValueTile(stage)) + target,
                      (is_key ? k_ : v_) + source, true, policy_);
        }
      }
    }
    if (waited) {
      CommitCopies();
      WaitCopies<0>();  // the main loop counts the groups of whole tiles; its barrier follows
    }
  }

  // A plain load: through the read-only path it might move before WaitForPreviousKernel.
  __device__ __forceinline__ void LoadQuery(const DecodeQuery<T>& query) {
    int pair = lane_ % 4 * 2;
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) {
      int head = t * 8 + lane_ / 4;
      bool present = head < query.num_heads;
      const T* source = query.Head(present ? head : 0, kHeadDim) + pair;
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        const T* of_step = source + step * 16;
        query_[t][step][0] = present ? *reinterpret_cast<const uint32_t*>(of_step) : 0u;
        query_[t][step][1] = present ? *reinterpret_cast<const uint32_t*>(of_step + 8) : 0u;
      }
      if constexpr (kColumnTiles > 1) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          num_visible_[t][i] = query.num_visible + (t * 8 + pair + i) / query.heads_per_query;
        }
      }
    }
  }

  // scores[t][c]: sm_scale * q.k of token first + lane / 4 + (c / 2) * 8 and head t * 8 + lane % 4
  // * 2 + c % 2; -inf where masked.
  __device__ __forceinline__ void Scores(int stage, int first, unsigned valid, float sm_scale,
                                         float (&scores)[kColumnTiles][4]) {
    const T* key = KeyTile(stage);
    int offset = TileOffset<kHeadDim>(lane_ % 16, lane_ / 16);
    float dot[kColumnTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      uint32_t a[4];  // matrices: tokens 0-7 and 8-15 of dims 0-7, then of dims 8-15
      LoadMatrix4(a, key + NextChunks(offset, step * 2));
#pragma unroll
      for (int t = 0; t < kColumnTiles; ++t) {
        MultiplyAdd<T>(dot[t], a, query_[t][step][0], query_[t][step][1]);
      }
    }
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        int token = lane_ / 4 + c / 2 * 8;
        bool is_valid = (valid >> token) & 1u;
        if constexpr (kColumnTiles > 1) {
          is_valid = is_valid && first + token < num_visible_[t][c % 2];
        }
        scores[t][c] = is_valid ? __fmul_rn(dot[t][c], sm_scale) : NegativeInfinity();
      }
    }
  }

  // One step of the online softmax of a tile's scores.
  __device__ __forceinline__ void Accumulate(int stage, const float (&scores)[kColumnTiles][4]) {
    float rescale[kColumnTiles][2];
    uint32_t b[kColumnTiles][2];
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) {
      float weights[4];
      UpdateState(t, scores[t], weights, rescale[t]);
      if constexpr (kReadsValues) {
        // Weights arrive as C [token, head] and leave as B [token (k), head (n)]: two 8 x 8
        // transposes.
        b[t][0] = TransposeMatrix(PackPair<T>(weights[0], weights[1]));
        b[t][1] = TransposeMatrix(PackPair<T>(weights[2], weights[3]));
      }
    }
    if constexpr (kReadsValues) AddValues(stage, rescale, b);
  }

  // Takes scores into the maximum and the sum of their heads; `weights` of the scores, and what
  // those before are now to be multiplied by. Lanes that share lane % 4 hold the same heads.
  __device__ __forceinline__ void UpdateState(int t, const float (&scores)[4], float (&weights)[4],
                                              float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float max = fmaxf(scores[i], scores[i + 2]);
#pragma unroll
      for (int mask = 4; mask < kWarpSize; mask *= 2) {
        max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, mask));
      }
      max = fmaxf(max, max_[t][i]);
      float finite_max = FiniteMax(max);
      rescale[i] = SoftmaxWeight(max_[t][i], finite_max);
      weights[i] = SoftmaxWeight(scores[i], finite_max);
      weights[i + 2] = SoftmaxWeight(scores[i + 2], finite_max);
      max_[t][i] = max;
      sum_[t][i] = __fmaf_rn(sum_[t][i], rescale[i], __fadd_rn(weights[i], weights[i + 2]));
    }
  }

  // out_ = out_ x rescale + the tile's values, weighted.
  __device__ __forceinline__ void AddValues(int stage, const float (&rescale)[kColumnTiles][2],
                                            const uint32_t (&b)[kColumnTiles][2]) {
    const T* value = ValueTile(stage);
    int offset = TileOffset<kHeadDim>(lane_ % 8 + lane_ / 16 * 8, lane_ / 8 % 2);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      uint32_t a[4];  // matrices: dims 0-7 and 8-15 of tokens 0-7, then of tokens 8-15
      LoadMatrix4Transposed(a, value + NextChunks(offset, step * 2));
#pragma unroll
      for (int t = 0; t < kColumnTiles; ++t) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          out_[t][step][c] = __fmul_rn(out_[t][step][c], rescale[t][c % 2]);
        }
        MultiplyAdd<T>(out_[t][step], a, b[t][0], b[t][1]);
      }
    }
  }

  // out_[t][step][c] is dim step * 16 + lane / 4 + (c / 2) * 8 of head t * 8 + lane % 4 * 2 + c %
  // 2. The maximum is the same in the lanes of a head, the sum is not yet added up over them.
  __device__ __forceinline__ void StoreForMerge(float* area) {
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) {
      int first_head = t * 8 + lane_ % 4 * 2;
      if constexpr (kReadsValues) {
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; ++step) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            int dim = step * 16 + lane_ / 4 + c / 2 * 8;
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
  T* shared_;  // this warp's
  const T* k_;
  const T* v_;
  int lane_;
  uint64_t policy_ = EvictFirstPolicy();  // a cache row is read once a step
  uint32_t query_[kColumnTiles][kHeadDim / 16][2];
  int num_visible_[kColumnTiles][2];  // tokens that this lane's heads see; with several queries
  float out_[kColumnTiles][kHeadDim / 16][4] = {};
  float max_[kColumnTiles][2];
  float sum_[kColumnTiles][2] = {};
};

}  // namespace tidal
