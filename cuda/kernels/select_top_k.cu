// SelectTopK: from the scores of a select layer to the sets of positions of the sparse layers, in
// one launch.
//
// A cluster of blocks per set, one slice of the set's positions per block:
// 1. MakeKeys reads the slice's scores once and pools them to order-preserving 32-bit keys in
// shared
//    memory (granularity kHead: the scores themselves are ordered).
// 2. FindThreshold (radix_select.cuh) finds the key of the last position that still fits.
// 3. WriteChosen writes all better positions, and the first of the equal ones, in ascending order.
// Where the shared memory of a whole cluster is too small for a set's keys, they lie in scratch.
#include "kernels/select_top_k.h"

#include <algorithm>

#include "common/block_cluster.cuh"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/radix_select.cuh"
#include "common/vec.cuh"

namespace tidal {
namespace {

// Two blocks on a processor hide each other's barriers, and a third leaves room for clusters, whose
// blocks must lie close together.
constexpr int kBlocksPerSm = 3;
constexpr int kVec = 4;                    // scores of one load; slices begin at multiples of it
constexpr int64_t kMinSliceLength = 2048;  // less is not worth another block

enum class KeySource { kRawScores, kSumOfWeights, kMaxOfWeights };

struct SelectParams {
  const float* scores;      // [B, num_q_heads, max_len]
  const float* lse;         // [B, num_q_heads]
  const int32_t* seq_lens;  // [B]
  uint32_t* keys;           // [blocks of the grid, slice_capacity]; null: in shared memory
  int32_t* token_idx;       // [B, num_sets, token_budget]
  int32_t* num_selected;    // [B]
  int64_t max_len;
  int64_t slice_capacity;  // positions of a block at most; a multiple of kVec
  bool vectorized;         // kVec scores in one load
  int heads_per_set;
  int token_budget;
  int sink_tokens;
  int recent_tokens;
};

struct SelectShared {
  RadixShared<uint32_t> radix;
  unsigned long long warp_sums[kMaxWarps];
  unsigned long long counts[kMaxClusterSize];  // Counts of each block's keys
};

// The part of a set that is chosen by score: `count` of the more than `count` positions [begin,
// end); nothing if count is 0.
struct Contest {
  int begin;
  int end;
  int count;
};

// A block's part of a contest. Its keys [skip, length) belong to the positions from first + skip
// on; those before take part in whole vectors only.
struct Slice {
  int first;  // a multiple of kVec
  int skip;
  int length;
};

__device__ Slice SliceOf(const Contest& contest, const BlockCluster& cluster) {
  int start = contest.begin / kVec * kVec;
  int share = (contest.end - start + cluster.size() - 1) / cluster.size();
  share = (share + kVec - 1) / kVec * kVec;
  int first = start + cluster.rank() * share;
  return {first, max(contest.begin - first, 0), max(min(contest.end - first, share), 0)};
}

__device__ Contest ContestOf(const SelectParams& p, int num_tokens) {
  if (num_tokens <= p.token_budget) return {0, 0, 0};
  return {p.sink_tokens, num_tokens - p.recent_tokens,
          p.token_budget - p.sink_tokens - p.recent_tokens};
}

// Writes what is chosen whatever the scores are: all of a short row, else sinks and recents.
__device__ void WriteForced(const SelectParams& p, int num_tokens, int32_t* token_idx) {
  if (num_tokens <= p.token_budget) {
    for (int i = threadIdx.x; i < p.token_budget; i += kRadixThreads) {
      token_idx[i] = i < num_tokens ? i : -1;
    }
    return;
  }
  for (int i = threadIdx.x; i < p.sink_tokens; i += kRadixThreads) token_idx[i] = i;
  int32_t* recents = token_idx + p.token_budget - p.recent_tokens;
  for (int i = threadIdx.x; i < p.recent_tokens; i += kRadixThreads) {
    recents[i] = num_tokens - p.recent_tokens + i;
  }
}

template <int kWidth>
using Scores = Vec<float, kWidth>;  // of adjacent positions

// Takes the next head's score into a position's pooled one.
template <KeySource kSource>
__device__ __forceinline__ float Pool(float pooled, float score, float lse) {
  float weight = expf(__fsub_rn(score, lse));
  // fmaxf drops a NaN: for the maximum it ranks below every score.
  return kSource == KeySource::kSumOfWeights ? __fadd_rn(pooled, weight) : fmaxf(pooled, weight);
}

// The pooled scores of adjacent positions; `scores` points to the first head's, `lse` to the set's.
template <KeySource kSource, int kWidth>
__device__ __forceinline__ Scores<kWidth> PoolHeads(const SelectParams& p, const float* scores,
                                                    const float* lse) {
  constexpr int kBatch = 4;  // heads whose loads overlap
  Scores<kWidth> pooled;
#pragma unroll
  for (float& score : pooled.elements) {
    score = kSource == KeySource::kSumOfWeights ? 0.0f : -INFINITY;
  }
#pragma unroll 1
  for (int begin = 0; begin < p.heads_per_set; begin += kBatch) {
    Scores<kWidth> batch[kBatch];
    float head_lse[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (begin + j >= p.heads_per_set) break;
      batch[j] = *reinterpret_cast<const Scores<kWidth>*>(scores + (begin + j) * p.max_len);
      head_lse[j] = lse[begin + j];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (begin + j >= p.heads_per_set) break;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        pooled.elements[i] = Pool<kSource>(pooled.elements[i], batch[j].elements[i], head_lse[j]);
      }
    }
  }
  return pooled;
}

// Makes the slice's keys, kWidth at a time, and calls add(key, 1) for those that compete. `scores`
// and `lse` are the set's.
template <KeySource kSource, int kWidth, typename Add>
__device__ __forceinline__ void MakeKeys(const SelectParams& p, const Slice& slice,
                                         const float* scores, const float* lse, uint32_t* keys,
                                         Add&& add) {
  constexpr bool kRaw = kSource == KeySource::kRawScores;
  auto load = [&](int vector) {
    const float* source = scores + slice.first + vector * kWidth;
    if constexpr (kRaw) {
      return *reinterpret_cast<const Scores<kWidth>*>(source);
    } else {
      return PoolHeads<kSource, kWidth>(p, source, lse);
    }
  };
  auto store = [&](int vector, const Scores<kWidth>& pooled) {
    int first = vector * kWidth;
    Vec<uint32_t, kWidth> made;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) made.elements[i] = OrderedKey(pooled.elements[i]);
    *reinterpret_cast<Vec<uint32_t, kWidth>*>(keys + first) = made;
    bool all_compete = first >= slice.skip && first + kWidth <= slice.length;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (all_compete || (first + i >= slice.skip && first + i < slice.length)) {
        add(made.elements[i], 1u);
      }
    }
  };
  BlockForEachInBatches<kRaw ? 4 : 1>((slice.length + kWidth - 1) / kWidth, load, store);
}

// How many keys are above the threshold, and how many at it.
struct Counts {
  uint32_t above;
  uint32_t equal;

  __device__ static Counts Unpack(unsigned long long packed) {
    return {static_cast<uint32_t>(packed >> 32), static_cast<uint32_t>(packed)};
  }
  // Both in one sum: neither overflows its half.
  __device__ unsigned long long Packed() const {
    return static_cast<unsigned long long>(above) << 32 | equal;
  }
};

// Writes to `out`, ascending, the slice's positions whose key is above the threshold and those at
// it that are among the first `num_ties` of the set. Every thread has a run of keys of its own,
// whose length is odd: the same key of 32 runs lies in 32 banks.
__device__ void WriteChosen(const BlockCluster& cluster, SelectShared& shared, const Slice& slice,
                            const uint32_t* keys, uint32_t threshold, uint32_t num_ties,
                            int32_t* out) {
  int run = (slice.length - slice.skip + kRadixThreads - 1) / kRadixThreads | 1;
  int first = slice.skip + static_cast<int>(threadIdx.x) * run;
  int last = min(first + run, slice.length);
  auto for_run = [&](auto&& visit) {
    ForEachInBatches<4>(
        first, last, 1, [&](int i) { return keys[i]; }, visit);
  };
  Counts own = {0, 0};
  for_run([&](int, uint32_t key) {
    own.above += key > threshold;
    own.equal += key == threshold;
  });
  auto scan = BlockScan(own.Packed(), shared.warp_sums);
  ShareWithCluster(cluster, scan.total, shared.counts);
  unsigned long long packed_before = scan.before;
  for (int other = 0; other < cluster.rank(); ++other) packed_before += shared.counts[other];
  if (own.Packed() == 0) return;
  Counts before = Counts::Unpack(packed_before);
  uint32_t above = before.above, equal = before.equal;
  for_run([&](int i, uint32_t key) {
    bool is_tie = key == threshold;
    if (key > threshold || (is_tie && equal < num_ties)) {
      out[above + min(equal, num_ties)] = slice.first + i;
    }
    above += key > threshold;
    equal += is_tie;
  });
}

// grid (cluster size, num_sets, B): a cluster per set. Dynamic shared memory: slice_capacity keys
// if kKeysInShared.
template <KeySource kSource, bool kKeysInShared>
__global__ void __launch_bounds__(kRadixThreads, kBlocksPerSm)
    SelectTopKKernel(const SelectParams p) {
  extern __shared__ uint4 dynamic_shared[];
  __shared__ SelectShared shared;
  WaitForPreviousKernel();
  LetNextKernelStart();
  BlockCluster cluster;
  int row = static_cast<int>(blockIdx.z);
  int64_t set = static_cast<int64_t>(row) * gridDim.y + blockIdx.y;
  int32_t* token_idx = p.token_idx + set * p.token_budget;
  int num_tokens = p.seq_lens[row];
  Contest contest = ContestOf(p, num_tokens);
  if (contest.count > 0) {  // the same in all blocks of the cluster
    Slice slice = SliceOf(contest, cluster);
    uint32_t* keys = reinterpret_cast<uint32_t*>(dynamic_shared);
    if constexpr (!kKeysInShared) {
      keys = p.keys + (set * cluster.size() + cluster.rank()) * p.slice_capacity;
    }
    auto make_keys = [&](auto&& add) {
      const float* scores = p.scores + set * p.heads_per_set * p.max_len;
      const float* lse = p.lse + set * p.heads_per_set;
      if (p.vectorized) {
        MakeKeys<kSource, kVec>(p, slice, scores, lse, keys, add);
      } else {
        MakeKeys<kSource, 1>(p, slice, scores, lse, keys, add);
      }
    };
    auto read_keys = [&](auto&& add) {
      BlockForEachInBatches<4>(
          slice.length - slice.skip, [&](int i) { return keys[slice.skip + i]; },
          [&](int, uint32_t key) { add(key, 1u); });
    };
    auto count = static_cast<uint32_t>(contest.count);
    auto threshold = FindThreshold(cluster, shared.radix, count, make_keys, read_keys);
    WriteChosen(cluster, shared, slice, keys, threshold.key, count - threshold.above,
                token_idx + p.sink_tokens);
  }
  // Last, because barriers of a cluster wait for writes.
  if (cluster.rank() == 0) WriteForced(p, num_tokens, token_idx);
  if (cluster.rank() == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    p.num_selected[row] = min(num_tokens, p.token_budget);
  }
}

using SelectKernel = void (*)(SelectParams);

template <bool kKeysInShared>
SelectKernel KernelFor(KeySource source) {
  switch (source) {
    case KeySource::kRawScores:
      return SelectTopKKernel<KeySource::kRawScores, kKeysInShared>;
    case KeySource::kSumOfWeights:
      return SelectTopKKernel<KeySource::kSumOfWeights, kKeysInShared>;
    case KeySource::kMaxOfWeights:
      return SelectTopKKernel<KeySource::kMaxOfWeights, kKeysInShared>;
  }
  return nullptr;
}

int64_t SliceCapacity(int64_t max_len, int64_t cluster_size) {
  return CeilDiv(CeilDiv(max_len, cluster_size), kVec) * kVec;
}

struct SelectLaunch {
  SelectKernel kernel;
  unsigned cluster_size;
  int64_t shared_bytes;  // of a block's keys; 0: they lie in scratch
};

// Whether the keys are in shared memory depends on max_len and the device only.
SelectLaunch PlanLaunch(KeySource source, int64_t num_sets_in_all, int64_t max_len) {
  auto key_bytes = [&](unsigned cluster_size) {
    return SliceCapacity(max_len, cluster_size) * static_cast<int64_t>(sizeof(uint32_t));
  };
  int64_t max_size = std::max<int64_t>(1, max_len / kMinSliceLength);
  SelectKernel kernel = KernelFor<true>(source);
  unsigned size = ChooseClusterSize(kernel, kRadixThreads, num_sets_in_all, max_size, key_bytes);
  if (size > 0) return {kernel, size, key_bytes(size)};
  kernel = KernelFor<false>(source);
  size = ChooseClusterSize(kernel, kRadixThreads, num_sets_in_all, max_size,
                           [](unsigned) { return int64_t{0}; });
  return {kernel, size, 0};
}

}  // namespace

int64_t SelectTopKScratchBytes(int64_t batch_size, int64_t num_sets, int64_t max_len) {
  SelectLaunch launch = PlanLaunch(KeySource::kSumOfWeights, batch_size * num_sets, max_len);
  if (launch.shared_bytes > 0) return 0;
  // Room for any cluster size.
  int64_t keys_per_set = max_len + kVec * kMaxClusterSize;
  return batch_size * num_sets * keys_per_set * static_cast<int64_t>(sizeof(uint32_t));
}

void LaunchSelectTopK(const SelectTopKArgs& args, void* scratch, cudaStream_t stream) {
  int64_t batch_size = args.token_idx.dim(0), num_sets = args.token_idx.dim(1);
  if (batch_size == 0) return;
  SelectParams p = {};
  p.scores = args.scores.data<float>();
  p.lse = args.lse.data<float>();
  p.seq_lens = args.seq_lens.data<int32_t>();
  p.keys = static_cast<uint32_t*>(scratch);
  p.token_idx = args.token_idx.data<int32_t>();
  p.num_selected = args.num_selected.data<int32_t>();
  p.max_len = args.scores.dim(2);
  p.vectorized = IsVectorizable(args.scores, p.max_len, kVec);
  p.heads_per_set = static_cast<int>(args.scores.dim(1) / num_sets);
  p.token_budget = static_cast<int>(args.token_idx.dim(2));
  p.sink_tokens = static_cast<int>(args.sink_tokens);
  p.recent_tokens = static_cast<int>(args.recent_tokens);

  KeySource source = args.granularity == Granularity::kHead ? KeySource::kRawScores
                     : args.pooling == Pooling::kSum        ? KeySource::kSumOfWeights
                                                            : KeySource::kMaxOfWeights;
  SelectLaunch launch = PlanLaunch(source, batch_size * num_sets, p.max_len);
  p.slice_capacity = SliceCapacity(p.max_len, launch.cluster_size);
  LaunchShape shape = {.grid = dim3(launch.cluster_size, static_cast<unsigned>(num_sets),
                                    static_cast<unsigned>(batch_size)),
                       .block = dim3(kRadixThreads),
                       .shared_bytes = static_cast<size_t>(launch.shared_bytes),
                       .cluster_size = launch.cluster_size};
  LaunchOverlapped("select_top_k", launch.kernel, shape, stream, p);
}

}  // namespace tidal
