// What decode attention works on: query heads, the tokens that they attend to, and how much of
// those is under way.
#pragma once

#include <cstdint>

#include "common/launch_config.h"
#include "common/paged_kv.cuh"
#include "common/score_rule.cuh"

namespace tidal {

// The query heads that attend to one list of tokens of one KV head: of one query, or of several
// that follow each other.
template <typename T>
struct DecodeQuery {
  const T* rows;  // [num_heads / heads_per_query, query_stride, D]: the first heads_per_query each
  int num_heads;  // at least 1
  float sm_scale;
  SoftCap cap;  // of scores
  int heads_per_query = kMaxGroupSize;
  int64_t query_stride = 0;
  // With several queries: of the tokens that are read, those up to the first query's own, and how
  // many last ones it sees; each further query has one more before it.
  int num_visible = 0;
  unsigned window = 0;

  // Turns products q.k into scores.
  template <int kTiles>
  __device__ __forceinline__ void MakeScores(float (&products)[kTiles][4]) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int c = 0; c < 4; ++c) products[t][c] = __fmul_rn(products[t][c], sm_scale);
    }
    cap.CapAll(products);
  }

  __device__ __forceinline__ const T* Head(int head, int head_dim) const {
    return rows + (head / heads_per_query * query_stride + head % heads_per_query) * head_dim;
  }
};

// The tokens of one row and KV head to attend to: those of a list, or all from `begin` on. Loads
// are from L2, which nothing stale is in: they may come before WaitForPreviousKernel
// (CacheReads::kEarly).
template <typename Stored>
struct AttendedTokens {
  const PagedKvView<Stored>& kv;
  int batch;
  int kv_head;
  int seq_len;                    // at least 1
  const int32_t* list = nullptr;  // positions, or nullptr
  int begin = 0;
  int first = 0;  // tokens before it are not seen

  // Returns the position of the i-th attended token.
  __device__ __forceinline__ int Position(int i) const {
    return list == nullptr ? begin + i : __ldcg(list + i);
  }

  // Row of k and v. -1 for a position that is not seen or outside the sequence: an entry that no
  // selection writes must not become a read of memory that is not ours. No branches, so that
  // lookups run side by side.
  __device__ __forceinline__ int Row(int position) const {
    bool is_inside =
        static_cast<unsigned>(position - first) < static_cast<unsigned>(seq_len - first);
    int row = kv.Row(batch, kv_head, is_inside ? position : 0);
    return is_inside ? row : -1;
  }
};

// What a warp reads of its tokens. With keys only there is no output, just the scores' maximum and
// sum.
enum class DecodeReads { kKeysAndValues, kKeys };

// Tiles of K or V in a stage of a warp's shared memory (decode_stages.cuh), and stages of a tile of
// tokens: K and V of heads of more than 128 dims have stages of their own.
template <int kHeadDim, DecodeReads kReads>
inline constexpr int kStageTiles = kReads == DecodeReads::kKeysAndValues&& kHeadDim <= 128 ? 2 : 1;
template <int kHeadDim, DecodeReads kReads>
inline constexpr int kTileStages =
    kReads == DecodeReads::kKeysAndValues ? 2 / kStageTiles<kHeadDim, kReads> : 1;

// 24 KB of stages a warp: two blocks of 4 warps an SM keep at least 128 KB of reads in flight,
// several times what 4.8 TB/s x 1 us of latency over 132 SMs asks for.
template <int kHeadDim, DecodeReads kReads = DecodeReads::kKeysAndValues>
inline constexpr int kDecodeStages = 6 * 128 / kPaddedDim<kHeadDim> / kStageTiles<kHeadDim, kReads>;

}  // namespace tidal
