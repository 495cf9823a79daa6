// TrimToMass: a block per set searches its best positions, of which there are at most token_budget,
// for the smallest number whose weights reach the target, and moves those to the front.
//
// The weights are summed as integers (core/mass.h), so the result does not depend on the order of
// atomics; the search is the radix search of SelectTopK, with weights in place of counts.
#include "kernels/trim_to_mass.h"

#include <algorithm>

#include "common/block_cluster.cuh"
#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/radix_select.cuh"
#include "core/mass.h"
#include "kernels/ranking.cuh"

namespace tidal {
namespace {

using Mass = unsigned long long;

// Keys that are kept in shared memory; those beyond them are looked up each time.
constexpr int64_t kMaxCachedKeys = 16384;

struct TrimParams {
  RankedKeys ranked;
  const float* lse;         // [B, num_q_heads]
  const int32_t* seq_lens;  // [B]
  int32_t* token_idx;       // [B, num_sets, token_budget]
  int32_t* num_selected;    // [B, num_sets]
  Mass target;              // of a set
  SetPlaces places;
  int min_tokens;
  int num_cached_keys;
};

struct TrimShared {
  union {
    RadixShared<Mass> mass;
    RadixShared<uint32_t> count;
  };
  Mass warp_sums[kMaxWarps];
};

// The best positions of a set, by place in its list. kRawScores: the keys are those of scores, not
// of weights.
template <bool kRawScores>
class BestPositions {
 public:
  // `lse`: of the only head, with raw scores.
  __device__ BestPositions(const uint32_t* keys, const float* lse, const int32_t* token_idx,
                           uint32_t* cached_keys, int num_cached)
      : keys_(keys),
        token_idx_(token_idx),
        cached_keys_(cached_keys),
        num_cached_(num_cached),
        log2_lse_(kRawScores ? Log2Lse(*lse) : 0.0f) {}

  // Before Key, by all threads of the block.
  __device__ void CacheKeys(int count) const {
    for (int i = threadIdx.x; i < min(count, num_cached_); i += kRadixThreads) {
      cached_keys_[i] = keys_[token_idx_[i]];
    }
    __syncthreads();
  }
  __device__ uint32_t Key(int i) const {
    return i < num_cached_ ? cached_keys_[i] : keys_[token_idx_[i]];
  }

  __device__ Mass MassOf(uint32_t key) const {
    if (key == 0) return 0;  // NaN
    float value = KeyToFloat(key);
    return ToMass(kRawScores ? Weight(value, log2_lse_) : value);
  }

 private:
  const uint32_t* keys_;
  const int32_t* token_idx_;
  uint32_t* cached_keys_;
  int num_cached_;
  float log2_lse_;
};

// Which of the places [begin, end) are kept: keys above `key`, and the first num_ties at it.
struct Cut {
  uint32_t key;
  Mass num_ties;
};

// The cut that keeps `count` places.
template <bool kRawScores>
__device__ Cut CutAtCount(TrimShared& shared, const BestPositions<kRawScores>& best, int begin,
                          int end, uint32_t count) {
  auto visit = [&](auto&& add) {
    for (int i = begin + threadIdx.x; i < end; i += kRadixThreads) add(best.Key(i), 1u);
  };
  auto threshold = FindThreshold(BlockCluster(), shared.count, count, visit, visit);
  return {threshold.key, count - threshold.above};
}

// The cut that keeps as few places as reach `target`, if all do, and at least `least`.
template <bool kRawScores>
__device__ Cut CutAtMass(TrimShared& shared, const BestPositions<kRawScores>& best, int begin,
                         int end, Mass target, int least) {
  Cut cut = {~0u, 0};  // nothing
  Mass num_kept = 0;
  if (target > 0) {
    auto visit = [&](auto&& add) {
      for (int i = begin + threadIdx.x; i < end; i += kRadixThreads) {
        uint32_t key = best.Key(i);
        add(key, best.MassOf(key));
      }
    };
    auto threshold = FindThreshold(BlockCluster(), shared.mass, target, visit, visit);
    Mass each = best.MassOf(threshold.key);  // > 0: the threshold's bin has mass
    cut = {threshold.key, (target - threshold.above + each - 1) / each};
    Mass num_above = 0;
    for (int i = begin + threadIdx.x; i < end; i += kRadixThreads) {
      num_above += best.Key(i) > cut.key;
    }
    num_kept = BlockScan(num_above, shared.warp_sums).total + cut.num_ties;
  }
  if (num_kept >= static_cast<Mass>(least)) return cut;
  __syncthreads();  // `shared` is free again
  return CutAtCount(shared, best, begin, end, static_cast<uint32_t>(least));
}

// Moves what the cut keeps of the places [begin, end), and all places up to `count`, to the front;
// fills up with -1. Returns how many places are kept in all.
template <bool kRawScores>
__device__ int KeepInPlace(TrimShared& shared, const BestPositions<kRawScores>& best,
                           const Cut& cut, int begin, int end, int count, int32_t* token_idx) {
  // Counts of the places before: kept for sure in the upper half, ties in the lower.
  Mass done = 0;
  auto num_kept = [&](Mass before) {
    return begin + static_cast<int>((before >> 32) + min(before & 0xffffffffu, cut.num_ties));
  };
  for (int first = begin; first < count; first += kRadixThreads) {
    int i = first + static_cast<int>(threadIdx.x);
    int32_t position = i < count ? token_idx[i] : -1;
    uint32_t key = i < end ? best.Key(i) : 0;
    bool is_kept = i < count && (i >= end || key > cut.key);
    bool is_tie = i < end && key == cut.key;
    // Its barriers come after the reads of all threads, and places only move to the front.
    auto scan = BlockScan(Mass{is_kept} << 32 | Mass{is_tie}, shared.warp_sums);
    Mass before = done + scan.before;
    if (is_kept || (is_tie && (before & 0xffffffffu) < cut.num_ties)) {
      token_idx[num_kept(before)] = position;
    }
    done += scan.total;
  }
  int total = num_kept(done);
  for (int i = total + static_cast<int>(threadIdx.x); i < count; i += kRadixThreads) {
    token_idx[i] = -1;
  }
  return total;
}

// grid (num_sets, B). Dynamic shared memory: num_cached_keys keys.
template <bool kRawScores>
__global__ void __launch_bounds__(kRadixThreads, 1) TrimToMassKernel(const TrimParams p) {
  extern __shared__ uint4 dynamic_shared[];
  __shared__ TrimShared shared;
  WaitForPreviousKernel();
  LetNextKernelStart();
  int row = static_cast<int>(blockIdx.y);
  int64_t set = static_cast<int64_t>(row) * gridDim.x + blockIdx.x;
  int num_tokens = p.seq_lens[row];
  int count = min(num_tokens, p.places.token_budget);
  if (count <= p.min_tokens) return;
  int32_t* token_idx = p.token_idx + set * p.places.token_budget;
  BestPositions<kRawScores> best(p.ranked.keys + set * p.ranked.row_length, p.lse + set, token_idx,
                                 reinterpret_cast<uint32_t*>(dynamic_shared), p.num_cached_keys);
  best.CacheKeys(count);
  int begin = p.places.sink_tokens, end = count - p.places.recent_tokens;
  Mass forced = 0, others = 0;
  for (int i = threadIdx.x; i < count; i += kRadixThreads) {
    (i < begin || i >= end ? forced : others) += best.MassOf(best.Key(i));
  }
  forced = BlockScan(forced, shared.warp_sums).total;
  others = BlockScan(others, shared.warp_sums).total;
  Mass target = p.target - min(p.target, forced);
  if (others < target) return;  // all of them do not reach it
  int least = max(p.min_tokens - p.places.sink_tokens - p.places.recent_tokens, 0);
  __syncthreads();
  Cut cut = CutAtMass(shared, best, begin, end, target, least);
  int num_kept = KeepInPlace(shared, best, cut, begin, end, count, token_idx);
  if (threadIdx.x == 0) p.num_selected[set] = num_kept;
}

}  // namespace

void LaunchTrimToMass(const SelectTopKArgs& args, const RankedKeys& ranked, cudaStream_t stream) {
  int64_t batch_size = args.token_idx.dim(0), num_sets = args.token_idx.dim(1);
  TrimParams p = {
      .ranked = ranked,
      .lse = args.lse.data<float>(),
      .seq_lens = args.seq_lens.data<int32_t>(),
      .token_idx = args.token_idx.data<int32_t>(),
      .num_selected = args.num_selected.data<int32_t>(),
      .target = TargetMass(args.top_p_mass, args.scores.dim(1) / num_sets),
      .places = SetPlaces(args),
      .min_tokens = static_cast<int>(args.min_tokens),
      .num_cached_keys = static_cast<int>(std::min(args.token_idx.dim(2), kMaxCachedKeys))};
  auto kernel =
      args.granularity == Granularity::kHead ? TrimToMassKernel<true> : TrimToMassKernel<false>;
  size_t shared_bytes = static_cast<size_t>(p.num_cached_keys) * sizeof(uint32_t);
  TIDAL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
  LaunchOverlapped(
      "trim_to_mass", kernel,
      {.grid = dim3(static_cast<unsigned>(num_sets), static_cast<unsigned>(batch_size)),
       .block = dim3(kRadixThreads),
       .shared_bytes = shared_bytes},
      stream, p);
}

}  // namespace tidal
