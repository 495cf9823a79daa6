// SelectTopK: from the scores of a select layer to the sets of positions of the sparse layers, in
// one launch.
//
// A cluster of blocks per set, one slice of the set's positions per block:
// 1. MakeKeys reads the slice's scores once and pools them to order-preserving 32-bit keys in
//    shared memory (granularity kHead: the scores themselves are ordered). Where PoolsFirst, the
//    keys have been made before, by all processors (pool_scores.h).
// 2. A radix search (radix_select.cuh) finds the key of the last position that still fits: its
//    first digit over all keys of the cluster; the others, if the keys that have that digit are
//    few, in the lists of those keys that every block makes (MakeCandidates), without barriers of
//    the cluster, and else over all keys again.
// 3. WriteChosen writes all better positions, and the first of the equal ones, in ascending order.
// Where the shared memory of a whole cluster is too small for a set's keys, they lie in scratch.
// With top_p_mass another launch takes away what is more than asked for (trim_to_mass.h).
#include "kernels/select_top_k.h"

#include <algorithm>

#include "common/block_cluster.cuh"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/radix_select.cuh"
#include "common/vec.cuh"
#include "core/checked.h"
#include "kernels/pool_scores.h"
#include "kernels/pooled_scores.cuh"
#include "kernels/trim_to_mass.h"

namespace tidal {
namespace {

// Two blocks on a processor hide each other's barriers, and a third leaves room for clusters, whose
// blocks must lie close together.
constexpr int kBlocksPerSm = 3;
constexpr int kVec = 4;  // scores of one load; slices begin at multiples of it
constexpr int64_t kKeyBytes = sizeof(uint32_t);
constexpr int64_t kMinSliceLength = 2048;  // less is not worth another block

struct SelectParams {
  const float* scores;      // [B, num_q_heads, max_len]
  const uint32_t* pooled;   // [B, num_sets, max_len]: with kPooledKeys, in place of scores
  const float* lse;         // [B, num_q_heads]
  const int32_t* seq_lens;  // [B]
  uint32_t* keys;           // [blocks of the grid, slice_capacity]; null: in shared memory
  int32_t* token_idx;       // [B, num_sets, token_budget]
  int32_t* num_selected;    // [B, num_sets]
  int64_t max_len;
  int64_t slice_capacity;  // positions of a block at most; a multiple of kRunLength
  bool vectorized;         // kVec scores in one load
  int heads_per_set;
  int token_budget;
  int sink_tokens;
  int recent_tokens;
};

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

// A block's keys after the first digit.
struct Candidates {
  uint32_t num_beyond;  // keys with a higher digit
  uint32_t count;       // keys that have it, in SelectShared::candidates

  __device__ static Candidates Unpack(unsigned long long packed) {
    return {static_cast<uint32_t>(packed >> 32), static_cast<uint32_t>(packed)};
  }
  __device__ unsigned long long Packed() const {
    return static_cast<unsigned long long>(num_beyond) << 32 | count;
  }
};

// A block's candidates take the place of the cluster's bins of later passes, which then are not
// made.
constexpr uint32_t kMaxCandidates = (kRadixPasses - 1) * kMaxShare;

struct SelectShared {
  RadixShared<uint32_t> radix;
  unsigned long long warp_sums[kMaxWarps];
  unsigned long long of_blocks[kMaxClusterSize];  // Candidates or Counts of each, packed
  Candidates own;
  Counts before;  // of the blocks before this one

  __device__ uint32_t* candidates() { return radix.cluster_bins.low + kMaxShare; }
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

__device__ __forceinline__ uint32_t KeyOf(float score) {
  return OrderedKey(score);
}
__device__ __forceinline__ uint32_t KeyOf(uint32_t key) {
  return key;
}

// Makes the slice's keys, kWidth at a time, and calls add(key, 1) for those that compete. `pooled`:
// the set's keys, if they have been made before.
template <KeySource kSource, int kWidth, typename Add>
__device__ __forceinline__ void MakeKeys(const SetScores<float>& set, const uint32_t* pooled,
                                         const Slice& slice, uint32_t* keys, Add&& add) {
  constexpr bool kIsOneLoad = kSource == KeySource::kRawScores || kSource == KeySource::kPooledKeys;
  auto load = [&](int vector) {
    int position = slice.first + vector * kWidth;
    if constexpr (kSource == KeySource::kPooledKeys) {
      return *reinterpret_cast<const Vec<uint32_t, kWidth>*>(pooled + position);
    } else {
      return PoolHeads<kSource, kWidth>(set, position);
    }
  };
  auto store = [&](int vector, const auto& loaded) {
    int first = vector * kWidth;
    Vec<uint32_t, kWidth> made;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) made.elements[i] = KeyOf(loaded.elements[i]);
    *reinterpret_cast<Vec<uint32_t, kWidth>*>(keys + first) = made;
    bool all_compete = first >= slice.skip && first + kWidth <= slice.length;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (all_compete || (first + i >= slice.skip && first + i < slice.length)) {
        add(made.elements[i], 1u);
      }
    }
  };
  BlockForEachInBatches<kIsOneLoad ? 4 : 1>((slice.length + kWidth - 1) / kWidth, load, store);
}

// A thread's share of a slice in one round: kRunLength adjacent keys, a bit for each.
constexpr int kRunLength = 16;
constexpr int kRoundLength = kRadixThreads * kRunLength;

struct Run {
  int first;       // the first key
  uint32_t above;  // keys that compete and are > a limit
  uint32_t equal;  // that are in a range below it
};

// The thread's run of the round that begins at key `begin` of the slice: `above` > last, `equal` in
// [first, last].
__device__ __forceinline__ Run ReadRun(const Slice& slice, const uint32_t* keys, int begin,
                                       uint32_t first, uint32_t last) {
  constexpr int kVectors = kRunLength / kVec;
  static_assert(kVectors == 4 && kVec == 4);
  Run run = {begin + static_cast<int>(threadIdx.x) * kRunLength, 0, 0};
  if (run.first >= slice.length) return run;
  uint32_t above = 0, at_least = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    // 8 lanes read at once, all banks: neighbours begin 16 banks apart, pairs with another vector.
    int vector = (i + static_cast<int>(threadIdx.x) / 2) % kVectors;
    auto four = *reinterpret_cast<const Vec<uint32_t, kVec>*>(keys + run.first + vector * kVec);
    uint32_t four_above = 0, four_at_least = 0;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      four_above |= four.elements[j] > last ? 1u << j : 0u;
      four_at_least |= four.elements[j] >= first ? 1u << j : 0u;
    }
    above |= four_above << (vector * kVec);
    at_least |= four_at_least << (vector * kVec);
  }
  // Whole vectors were read; of those, what lies in [skip, length) competes.
  uint32_t competes = 0xffffu;
  if (run.first + kRunLength > slice.length) competes >>= run.first + kRunLength - slice.length;
  if (run.first < slice.skip) competes &= 0xffffu << min(slice.skip - run.first, kRunLength);
  run.above = above & competes;
  run.equal = at_least & ~above & competes;
  return run;
}

// After the first digit, if at most kMaxCandidates keys of the cluster have it: lists those of this
// block in candidates(), in any order. Returns when every block has listed its own and told all
// others how many, in of_blocks.
__device__ void MakeCandidates(const BlockCluster& cluster, SelectShared& shared,
                               const Slice& slice, const uint32_t* keys,
                               const RadixSearch<uint32_t>& search) {
  uint32_t num_beyond = 0, first_key = search.threshold.key;
  for (int begin = 0; begin < slice.length; begin += kRoundLength) {
    Run run = ReadRun(slice, keys, begin, first_key, first_key | ~search.prefix_mask);
    num_beyond += __popc(run.above);
    if (run.equal == 0) continue;
    uint32_t place = atomicAdd(&shared.own.count, static_cast<uint32_t>(__popc(run.equal)));
    for (uint32_t left = run.equal; left != 0; left &= left - 1) {
      shared.candidates()[place++] = keys[run.first + __ffs(left) - 1];
    }
  }
  __syncwarp();
  num_beyond = __reduce_add_sync(kFullWarp, num_beyond);
  if (threadIdx.x % kWarpSize == 0) atomicAdd(&shared.own.num_beyond, num_beyond);
  __syncthreads();
  ShareWithCluster(cluster, shared.own.Packed(), shared.of_blocks);
}

// Calls visit(key) for the candidates of all blocks of the cluster; every warp reads those of one
// block.
template <typename Visit>
__device__ __forceinline__ void ForEachCandidate(const BlockCluster& cluster, SelectShared& shared,
                                                 int num_blocks, Visit&& visit) {
  int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int block = warp % cluster.size(), share = warp / cluster.size();
  if (block >= num_blocks) return;
  int step = kRadixThreads / cluster.size();
  const uint32_t* candidates = cluster.Map(shared.candidates(), block);
  int first = share * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize;
  ForEachInBatches<2>(
      first, static_cast<int>(Candidates::Unpack(shared.of_blocks[block]).count), step,
      [&](int i) { return candidates[i]; }, [&](int, uint32_t key) { visit(key); });
}

// After MakeCandidates: adds up the Counts of the blocks before this one in shared.before, which
// is complete after the next barrier of the block.
__device__ void CountBefore(const BlockCluster& cluster, SelectShared& shared, uint32_t threshold) {
  Counts counts = {0, 0};
  if (static_cast<int>(threadIdx.x) < cluster.rank()) {
    counts.above = Candidates::Unpack(shared.of_blocks[threadIdx.x]).num_beyond;
  }
  ForEachCandidate(cluster, shared, cluster.rank(), [&](uint32_t key) {
    counts.above += key > threshold;
    counts.equal += key == threshold;
  });
  __syncwarp();
  counts.above = __reduce_add_sync(kFullWarp, counts.above);
  counts.equal = __reduce_add_sync(kFullWarp, counts.equal);
  if (threadIdx.x % kWarpSize != 0) return;
  if (counts.above > 0) atomicAdd(&shared.before.above, counts.above);
  if (counts.equal > 0) atomicAdd(&shared.before.equal, counts.equal);
}

// The same without MakeCandidates: every block counts its keys and tells the others. Complete when
// it returns.
__device__ void ShareCounts(const BlockCluster& cluster, SelectShared& shared, const Slice& slice,
                            const uint32_t* keys, uint32_t threshold) {
  Counts own = {0, 0};
  for (int begin = 0; begin < slice.length; begin += kRoundLength) {
    Run run = ReadRun(slice, keys, begin, threshold, threshold);
    own.above += __popc(run.above);
    own.equal += __popc(run.equal);
  }
  ShareWithCluster(cluster, BlockScan(own.Packed(), shared.warp_sums).total, shared.of_blocks);
  if (threadIdx.x == 0) {
    unsigned long long before = 0;
    for (int block = 0; block < cluster.rank(); ++block) before += shared.of_blocks[block];
    shared.before = Counts::Unpack(before);
  }
  __syncthreads();
}

// The threshold, and how it was found.
struct LastChosen {
  RadixThreshold<uint32_t> threshold;
  bool has_candidates;  // in lists that other blocks may be reading
};

// The key of the last of the best `count` positions; make_keys(add) makes the slice's keys.
template <typename MakeKeys>
__device__ LastChosen FindLastChosen(const BlockCluster& cluster, SelectShared& shared,
                                     const Slice& slice, const uint32_t* keys, uint32_t count,
                                     MakeKeys&& make_keys) {
  RadixSearch<uint32_t> search;
  FindDigit<RadixElements::kOfThisBlock>(cluster, shared.radix, count, search, make_keys);
  bool has_candidates = !search.IsDone(count) && search.threshold.at <= kMaxCandidates;
  if (has_candidates) MakeCandidates(cluster, shared, slice, keys, search);
#pragma unroll 1
  while (!search.IsDone(count)) {
    if (has_candidates) {
      FindDigit<RadixElements::kSameInAllBlocks>(
          cluster, shared.radix, count, search, [&](auto&& add) {
            ForEachCandidate(cluster, shared, cluster.size(), [&](uint32_t key) { add(key, 1u); });
          });
    } else {
      FindDigit<RadixElements::kOfThisBlock>(cluster, shared.radix, count, search, [&](auto&& add) {
        BlockForEachInBatches<4>(
            slice.length - slice.skip, [&](int i) { return keys[slice.skip + i]; },
            [&](int, uint32_t key) { add(key, 1u); });
      });
    }
  }
  return {search.threshold, has_candidates};
}

// Writes to `out`, ascending, the slice's positions whose key is above the threshold and those at
// it that are among the first `num_ties` of the set.
__device__ void WriteChosen(const BlockCluster& cluster, SelectShared& shared, const Slice& slice,
                            const uint32_t* keys, const LastChosen& last, uint32_t num_ties,
                            int32_t* out) {
  uint32_t threshold = last.threshold.key;
  if (last.has_candidates) {
    CountBefore(cluster, shared, threshold);
    cluster.Arrive();  // has read the others' lists
  } else {
    ShareCounts(cluster, shared, slice, keys, threshold);
  }
  unsigned long long done = 0;  // Counts of the rounds before, packed
  for (int begin = 0; begin < slice.length; begin += kRoundLength) {
    Run run = ReadRun(slice, keys, begin, threshold, threshold);
    Counts own = {static_cast<uint32_t>(__popc(run.above)),
                  static_cast<uint32_t>(__popc(run.equal))};
    auto scan = BlockScan(own.Packed(), shared.warp_sums);
    Counts before = Counts::Unpack(done + scan.before);
    done += scan.total;
    before.above += shared.before.above;
    before.equal += shared.before.equal;
    for (uint32_t left = run.above | run.equal; left != 0; left &= left - 1) {
      uint32_t bit = left & -left;
      bool is_tie = (run.equal & bit) != 0;
      if (!is_tie || before.equal < num_ties) {
        out[before.above + min(before.equal, num_ties)] = slice.first + run.first + __ffs(bit) - 1;
      }
      before.above += !is_tie;
      before.equal += is_tie;
    }
  }
  if (last.has_candidates) cluster.Wait();  // the others have read this block's list
}

// grid (cluster size, num_sets, B): a cluster per set. Dynamic shared memory: slice_capacity keys
// if kKeysInShared.
template <KeySource kSource, bool kKeysInShared>
__global__ void __launch_bounds__(kRadixThreads, kBlocksPerSm)
    SelectTopKKernel(const SelectParams p) {
  extern __shared__ uint4 dynamic_shared[];
  __shared__ SelectShared shared;
  BlockCluster cluster;
  if (threadIdx.x == 0) {
    shared.own = {0, 0};
    shared.before = {0, 0};
  }
  BeginSearch(cluster, shared.radix);
  WaitForPreviousKernel();
  LetNextKernelStart();
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
    SetScores<float> scores = {.scores = p.scores + set * p.heads_per_set * p.max_len,
                               .lse = p.lse + set * p.heads_per_set,
                               .max_len = p.max_len,
                               .num_heads = p.heads_per_set};
    const uint32_t* pooled = p.pooled + set * p.max_len;
    auto make_keys = [&](auto&& add) {
      if (p.vectorized) {
        MakeKeys<kSource, kVec>(scores, pooled, slice, keys, add);
      } else {
        MakeKeys<kSource, 1>(scores, pooled, slice, keys, add);
      }
    };
    auto count = static_cast<uint32_t>(contest.count);
    LastChosen last = FindLastChosen(cluster, shared, slice, keys, count, make_keys);
    WriteChosen(cluster, shared, slice, keys, last, count - last.threshold.above,
                token_idx + p.sink_tokens);
  } else {
    cluster.Wait();  // for BeginSearch
  }
  // Last, because barriers of a cluster wait for writes.
  if (cluster.rank() == 0) WriteForced(p, num_tokens, token_idx);
  if (cluster.rank() == 0 && threadIdx.x == 0) {
    p.num_selected[set] = min(num_tokens, p.token_budget);
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
    case KeySource::kPooledKeys:
      return SelectTopKKernel<KeySource::kPooledKeys, kKeysInShared>;
  }
  return nullptr;
}

int64_t SliceCapacity(int64_t max_len, int64_t cluster_size) {
  return CeilDiv(CeilDiv(max_len, cluster_size), kRunLength) * kRunLength;
}

// Of the keys that are made before the selection, in scratch; those of the slices come after them.
int64_t PooledBytes(int64_t batch_size, int64_t num_sets, int64_t max_len) {
  constexpr int64_t kAlignment = 256;
  return CeilDiv(Product({batch_size, num_sets, max_len, kKeyBytes}), kAlignment) * kAlignment;
}

KeySource SourceOf(const SelectTopKArgs& args) {
  if (PoolsFirst(args.granularity, args.scores.dtype)) return KeySource::kPooledKeys;
  if (args.granularity == Granularity::kHead) return KeySource::kRawScores;
  return args.pooling == Pooling::kSum ? KeySource::kSumOfWeights : KeySource::kMaxOfWeights;
}

struct SelectLaunch {
  SelectKernel kernel;
  unsigned cluster_size;
  int64_t shared_bytes;  // of a block's keys; 0: they lie in scratch
};

// Whether the keys are in shared memory depends on max_len and the device only.
SelectLaunch PlanLaunch(KeySource source, int64_t num_sets_in_all, int64_t max_len) {
  auto key_bytes = [&](unsigned cluster_size) {
    return SliceCapacity(max_len, cluster_size) * kKeyBytes;
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

bool PoolsFirst(Granularity granularity, DType score_dtype) {
  return granularity == Granularity::kLayer || score_dtype == DType::kFloat16;
}

int64_t SelectTopKScratchBytes(bool pools_first, int64_t batch_size, int64_t num_sets,
                               int64_t max_len) {
  int64_t bytes = pools_first ? PooledBytes(batch_size, num_sets, max_len) : 0;
  SelectLaunch launch = PlanLaunch(KeySource::kSumOfWeights, batch_size * num_sets, max_len);
  if (launch.shared_bytes > 0) return bytes;
  // Room for any cluster size.
  int64_t keys_per_set = max_len + kRunLength * kMaxClusterSize;
  return Sum({bytes, Product({batch_size, num_sets, keys_per_set, kKeyBytes})});
}

void LaunchSelectTopK(const SelectTopKArgs& args, void* scratch, cudaStream_t stream) {
  int64_t batch_size = args.token_idx.dim(0), num_sets = args.token_idx.dim(1);
  if (batch_size == 0) return;
  SelectParams p = {};
  KeySource source = SourceOf(args);
  p.max_len = args.scores.dim(2);
  p.lse = args.lse.data<float>();
  p.seq_lens = args.seq_lens.data<int32_t>();
  p.keys = static_cast<uint32_t*>(scratch);
  if (source == KeySource::kPooledKeys) {
    p.pooled = p.keys;
    p.keys += PooledBytes(batch_size, num_sets, p.max_len) / kKeyBytes;
    LaunchPoolScores(args, static_cast<uint32_t*>(scratch), stream);
  } else {
    p.scores = args.scores.data<float>();
  }
  p.token_idx = args.token_idx.data<int32_t>();
  p.num_selected = args.num_selected.data<int32_t>();
  p.vectorized = IsVectorizable(args.scores, p.max_len, kVec);
  p.heads_per_set = static_cast<int>(args.scores.dim(1) / num_sets);
  p.token_budget = static_cast<int>(args.token_idx.dim(2));
  p.sink_tokens = static_cast<int>(args.sink_tokens);
  p.recent_tokens = static_cast<int>(args.recent_tokens);

  SelectLaunch launch = PlanLaunch(source, batch_size * num_sets, p.max_len);
  p.slice_capacity = SliceCapacity(p.max_len, launch.cluster_size);
  LaunchShape shape = {.grid = dim3(launch.cluster_size, static_cast<unsigned>(num_sets),
                                    static_cast<unsigned>(batch_size)),
                       .block = dim3(kRadixThreads),
                       .shared_bytes = static_cast<size_t>(launch.shared_bytes),
                       .cluster_size = launch.cluster_size};
  LaunchOverlapped("select_top_k", launch.kernel, shape, stream, p);
  if (args.top_p_mass < 1.0f) LaunchTrimToMass(args, p.pooled, stream);
}

}  // namespace tidal
