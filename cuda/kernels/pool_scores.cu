// PoolScores: a thread pools a few adjacent positions over the heads of their set to
// order-preserving keys of 32 bits (granularity kHead: the score itself is ordered), and a block
// counts the first digits of its keys for the radix search that follows (select_top_k.cu).
#include "kernels/pool_scores.h"

#include <algorithm>

#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/radix_select.cuh"
#include "common/vec.cuh"
#include "kernels/ranking.cuh"

namespace tidal {
namespace {

// Positions of a thread, in one load a head: fewer where the heads alone give it enough to load.
constexpr int kVecOfFewHeads = 4;
constexpr int kVecOfManyHeads = 2;
constexpr int kManyHeads = 16;
constexpr int kBlocksPerSm = 2;      // leaves the compiler registers for all loads of a batch
constexpr int64_t kMaxBlocks = 512;  // more would but count digits anew

// What positions are ranked by.
enum class Ranking { kRawScores, kSumOfWeights, kMaxOfWeights };

struct PoolParams {
  const void* scores;       // [B, num_q_heads, max_len] float32 or float16
  const float* lse;         // [B, num_q_heads]
  const int32_t* seq_lens;  // [B]
  RankedKeys ranked;
  SetPlaces places;
  int64_t max_len;
  int heads_per_set;
};

// The scores of one set. Score: float, or __half (of shadow keys).
template <typename Score>
struct SetScores {
  const Score* scores;  // [num_heads, max_len]
  const float* lse;     // [num_heads]
  int64_t max_len;
  int num_heads;
};

template <int kWidth>
using Scores = Vec<float, kWidth>;  // of adjacent positions

// What the kWidth positions from `position` on are ranked by: their weights, pooled over the heads
// in ascending order. By a whole warp.
template <Ranking kRanking, int kWidth, typename Score>
class PooledWeights {
 public:
  __device__ __forceinline__ PooledWeights(const SetScores<Score>& set, int64_t position)
      : set_(set), scores_(set.scores + position) {
#pragma unroll
    for (float& weight : weights_.elements) {
      weight = kRanking == Ranking::kSumOfWeights ? 0.0f : -INFINITY;
    }
    int head = 0;
    constexpr int kBatch = 32 / kWidth;
    for (; head + kBatch <= set.num_heads; head += kBatch) PoolHeads<kBatch>(head);
    for (; head + 4 <= set.num_heads; head += 4) PoolHeads<4>(head);
    for (; head < set.num_heads; ++head) PoolHeads<1>(head);
  }

  __device__ __forceinline__ const Scores<kWidth>& weights() const {
    return weights_;
  }

 private:
  // Takes in the heads [first, first + kHeads), whose loads overlap.
  template <int kHeads>
  __device__ __forceinline__ void PoolHeads(int first) {
    int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    float log2_lse = Log2Lse(set_.lse[first + lane % kHeads]);
    Vec<Score, kWidth> scores[kHeads];
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      scores[j] =
          *reinterpret_cast<const Vec<Score, kWidth>*>(scores_ + (first + j) * set_.max_len);
    }
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      float log2_of_head = __shfl_sync(kFullWarp, log2_lse, j);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        float weight = Weight(ToFloat32(scores[j].elements[i]), log2_of_head);
        float& pooled = weights_.elements[i];
        // fmaxf drops a NaN: for the maximum it ranks below every score.
        pooled =
            kRanking == Ranking::kSumOfWeights ? __fadd_rn(pooled, weight) : fmaxf(pooled, weight);
      }
    }
  }

  const SetScores<Score>& set_;
  const Score* scores_;  // of the first head
  Scores<kWidth> weights_;
};

template <Ranking kRanking, int kWidth, typename Score>
__device__ __forceinline__ Scores<kWidth> RankedBy(const SetScores<Score>& set, int64_t position) {
  if constexpr (kRanking == Ranking::kRawScores) {
    Scores<kWidth> scores;
    LoadFloats<kWidth>(set.scores + position, scores.elements);
    return scores;
  } else {
    return PooledWeights<kRanking, kWidth, Score>(set, position).weights();
  }
}

// grid (blocks of a set, num_sets, B): each block takes every gridDim.x-th piece of kRadixThreads *
// kWidth positions.
template <typename Score, Ranking kRanking, int kWidth>
__global__ void __launch_bounds__(kRadixThreads, kBlocksPerSm)
    PoolScoresKernel(const PoolParams p) {
  __shared__ RadixBins<uint32_t, kRadixBins> digits;  // how many keys of the block have each
  ClearBins(digits);
  WaitForPreviousKernel();
  LetNextKernelStart();
  constexpr int kPiece = kRadixThreads * kWidth;
  int64_t set = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  int num_tokens = p.seq_lens[blockIdx.z];
  int end = static_cast<int>(min(static_cast<int64_t>(num_tokens), p.max_len));
  int first = static_cast<int>(blockIdx.x) * kPiece;
  if (first >= end) return;
  SetScores<Score> scores = {
      .scores = static_cast<const Score*>(p.scores) + set * p.heads_per_set * p.max_len,
      .lse = p.lse + set * p.heads_per_set,
      .max_len = p.max_len,
      .num_heads = p.heads_per_set};
  uint32_t* keys = p.ranked.keys + set * p.ranked.row_length;
  Contest contest = p.places.ContestOf(num_tokens);
  __syncthreads();  // the digits are cleared
  for (; first < end; first += static_cast<int>(gridDim.x) * kPiece) {
    int position = first + static_cast<int>(threadIdx.x) * kWidth;
    // Threads past the end do the last vector once more.
    Scores<kWidth> pooled =
        RankedBy<kRanking, kWidth>(scores, min(position, (end - 1) / kWidth * kWidth));
    if (position >= end) continue;
    Vec<uint32_t, kWidth> made;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      made.elements[i] = OrderedKey(pooled.elements[i]);
      if (contest.Has(position + i)) AddToBin(digits, FirstDigit(made.elements[i]), 1u);
    }
    *reinterpret_cast<Vec<uint32_t, kWidth>*>(keys + position) = made;
  }
  __syncthreads();
  uint32_t counts[kBinsPerThread];
  ReadBins(digits, FirstBin(), counts);
  uint32_t* total = p.ranked.first_digits + set * kRadixBins + FirstBin();
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (counts[i] != 0) atomicAdd(total + i, counts[i]);
  }
}

template <typename Score, Ranking kRanking, int kWidth>
void LaunchWith(const PoolParams& p, const SelectTopKArgs& args, cudaStream_t stream) {
  int64_t batch_size = args.token_idx.dim(0), num_sets = args.token_idx.dim(1);
  int64_t pieces = CeilDiv(p.max_len, kRadixThreads * kWidth);
  int64_t blocks = std::clamp<int64_t>(kMaxBlocks / (batch_size * num_sets), 1, pieces);
  LaunchShape shape = {.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(num_sets),
                                    static_cast<unsigned>(batch_size)),
                       .block = kRadixThreads};
  LaunchOverlapped("pool_scores", PoolScoresKernel<Score, kRanking, kWidth>, shape, stream, p);
}

template <typename Score, Ranking kRanking>
void Launch(const PoolParams& p, const SelectTopKArgs& args, cudaStream_t stream) {
  if (!IsVectorizable(args.scores, p.max_len, kVecOfFewHeads)) {
    LaunchWith<Score, kRanking, 1>(p, args, stream);
  } else if (p.heads_per_set >= kManyHeads) {
    LaunchWith<Score, kRanking, kVecOfManyHeads>(p, args, stream);
  } else {
    LaunchWith<Score, kRanking, kVecOfFewHeads>(p, args, stream);
  }
}

template <typename Score>
void LaunchAs(const PoolParams& p, const SelectTopKArgs& args, cudaStream_t stream) {
  if (args.granularity == Granularity::kHead) {
    Launch<Score, Ranking::kRawScores>(p, args, stream);
  } else if (args.pooling == Pooling::kSum) {
    Launch<Score, Ranking::kSumOfWeights>(p, args, stream);
  } else {
    Launch<Score, Ranking::kMaxOfWeights>(p, args, stream);
  }
}

}  // namespace

void LaunchPoolScores(const SelectTopKArgs& args, const RankedKeys& ranked, cudaStream_t stream) {
  PoolParams p = {.scores = args.scores.ptr,
                  .lse = args.lse.data<float>(),
                  .seq_lens = args.seq_lens.data<int32_t>(),
                  .ranked = ranked,
                  .places = SetPlaces(args),
                  .max_len = args.scores.dim(2),
                  .heads_per_set = static_cast<int>(args.scores.dim(1) / args.token_idx.dim(1))};
  if (args.scores.dtype == DType::kFloat16) {
    LaunchAs<__half>(p, args, stream);
  } else {
    LaunchAs<float>(p, args, stream);
  }
}

}  // namespace tidal
