// SelectTopK: from the scores of a layer that chooses to sets of positions, in two launches.
//
// 1. PoolScores (pool_scores.h) pools them to order-preserving keys of 32 bits, and counts the
//    first digits of those that compete: on all processors, since it reads much.
// 2. A cluster of blocks per set, one slice of the set's positions per block, finds the key of the
//    last position that still fits by a radix search (radix_select.cuh), whose first digit those
//    counts give; the others, if the keys that have that digit are few, in a list of them that
//    every block gathers from what all have found (ListCandidates), without more barriers of the
//    cluster, and else over all keys again. WriteChosen then writes all better positions, and the
//    first of the equal ones, in ascending order.
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
#include "kernels/ranking.cuh"
#include "kernels/trim_to_mass.h"

namespace tidal {
namespace {

constexpr int kBlocksPerSm = 2;            // hide each other's barriers
constexpr int64_t kMinSliceLength = 2048;  // less is not worth another block

struct SelectParams {
  RankedKeys ranked;        // whose first digits are zeros again afterwards
  const int32_t* seq_lens;  // [B]
  int32_t* token_idx;       // [B, num_sets, token_budget]
  int32_t* num_selected;    // [B, num_sets]
  SetPlaces places;
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
  uint32_t count;       // keys that have it, in SelectShared::listed

  __device__ static Candidates Unpack(unsigned long long packed) {
    return {static_cast<uint32_t>(packed >> 32), static_cast<uint32_t>(packed)};
  }
  __device__ unsigned long long Packed() const {
    return static_cast<unsigned long long>(num_beyond) << 32 | count;
  }
};

constexpr uint32_t kMaxCandidates = 2048;  // of a cluster

struct SelectShared {
  RadixShared<uint32_t> radix;
  unsigned long long warp_sums[kMaxWarps];
  unsigned long long of_blocks[kMaxClusterSize];  // Candidates or Counts of each, packed
  Candidates own;
  Counts before;                      // of the blocks before this one
  uint32_t listed[kMaxCandidates];    // the own candidates, in any order
  uint32_t gathered[kMaxCandidates];  // those of all blocks, block by block
};

// A block's part of a contest: the positions [begin, end), read from `first` on in whole runs.
struct Slice {
  int first;  // a multiple of kKeyRun
  int begin;
  int end;
};

__device__ Slice SliceOf(const Contest& contest, const BlockCluster& cluster) {
  int start = contest.begin / kKeyRun * kKeyRun;
  int share = (contest.end - start + cluster.size() - 1) / cluster.size();
  share = (share + kKeyRun - 1) / kKeyRun * kKeyRun;
  int first = start + cluster.rank() * share;
  return {first, max(contest.begin, first), min(contest.end, first + share)};
}

// Writes what is chosen whatever the scores are: all of a short row, else sinks and recents.
__device__ void WriteForced(const SetPlaces& p, int num_tokens, int32_t* token_idx) {
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

// A thread's share of a slice in one round: kKeyRun adjacent keys.
constexpr int kRoundLength = kRadixThreads * kKeyRun;

struct KeyRun {
  static constexpr int kVec = 4;
  Vec<uint32_t, kVec> fours[kKeyRun / kVec];

  __device__ __forceinline__ uint32_t Key(int i) const {
    return fours[i / kVec].elements[i % kVec];
  }
};

// The keys of a slice, of which a block takes kRoundLength in a round.
class SliceKeys {
 public:
  // `keys`: of the set.
  __device__ __forceinline__ SliceKeys(const Slice& slice, const uint32_t* keys)
      : slice_(slice), keys_(keys), first_run_(Load(slice.first)) {}

  // Calls visit(position, run, competes) for this thread's run in every round: its first position,
  // and a bit for each of its keys that competes. By all threads of the block.
  template <typename Visit>
  __device__ __forceinline__ void ForEachRound(Visit&& visit) const {
    if (slice_.first >= slice_.end) return;
    visit(Start(slice_.first), first_run_, Competes(slice_.first));
#pragma unroll 1
    for (int round = slice_.first + kRoundLength; round < slice_.end; round += kRoundLength) {
      visit(Start(round), Load(round), Competes(round));
    }
  }

  // Calls visit(key) for this thread's share of the keys that compete.
  template <typename Visit>
  __device__ __forceinline__ void ForEach(Visit&& visit) const {
    BlockForEachInBatches<4>(
        slice_.end - slice_.begin, [&](int i) { return keys_[slice_.begin + i]; },
        [&](int, uint32_t key) { visit(key); });
  }

 private:
  __device__ __forceinline__ static int Start(int round) {
    return round + static_cast<int>(threadIdx.x) * kKeyRun;
  }

  __device__ __forceinline__ KeyRun Load(int round) const {
    KeyRun run = {};
    if (Start(round) >= slice_.end) return run;
#pragma unroll
    for (int i = 0; i < kKeyRun / KeyRun::kVec; ++i) {
      run.fours[i] = reinterpret_cast<const Vec<uint32_t, KeyRun::kVec>*>(keys_ + Start(round))[i];
    }
    return run;
  }

  __device__ __forceinline__ uint32_t Competes(int round) const {
    constexpr uint32_t kAll = (1u << kKeyRun) - 1;
    int skip = slice_.begin - Start(round), left = slice_.end - Start(round);
    uint32_t competes = left >= kKeyRun ? kAll : left > 0 ? kAll >> (kKeyRun - left) : 0u;
    if (skip > 0) competes &= skip < kKeyRun ? kAll << skip : 0u;
    return competes;
  }

  Slice slice_;
  const uint32_t* keys_;
  KeyRun first_run_;
};

// Which keys of a run compete and are > a limit, a bit for each, and which are in a range below it.
struct RunBits {
  uint32_t above;
  uint32_t equal;
};

// `above` > last, `equal` in [first, last].
__device__ __forceinline__ RunBits BitsOf(const KeyRun& run, uint32_t competes, uint32_t first,
                                          uint32_t last) {
  uint32_t above = 0, at_least = 0;
#pragma unroll
  for (int i = 0; i < kKeyRun; ++i) {
    above |= run.Key(i) > last ? 1u << i : 0u;
    at_least |= run.Key(i) >= first ? 1u << i : 0u;
  }
  return {above & competes, at_least & ~above & competes};
}

// Lists the keys of the slice that have the digits found so far, at most kMaxCandidates in the
// cluster. Returns when every block has listed its own and told all others how many, in of_blocks.
__device__ void ListCandidates(const BlockCluster& cluster, SelectShared& shared,
                               const SliceKeys& keys, const RadixSearch<uint32_t>& search) {
  uint32_t num_beyond = 0, first_key = search.threshold.key;
  keys.ForEachRound([&](int, const KeyRun& run, uint32_t competes) {
    RunBits bits = BitsOf(run, competes, first_key, first_key | ~search.prefix_mask);
    num_beyond += __popc(bits.above);
    if (bits.equal == 0) return;
    uint32_t place = atomicAdd(&shared.own.count, static_cast<uint32_t>(__popc(bits.equal)));
#pragma unroll
    for (int i = 0; i < kKeyRun; ++i) {
      if ((bits.equal >> i & 1u) != 0) shared.listed[place++] = run.Key(i);
    }
  });
  __syncwarp();
  num_beyond = __reduce_add_sync(kFullWarp, num_beyond);
  if (threadIdx.x % kWarpSize == 0 && num_beyond > 0) atomicAdd(&shared.own.num_beyond, num_beyond);
  __syncthreads();
  ShareWithCluster(cluster, shared.own.Packed(), shared.of_blocks);
}

// After ListCandidates: brings together the lists of all blocks. Returns how many of the keys are
// of the blocks before this one.
__device__ int GatherCandidates(const BlockCluster& cluster, SelectShared& shared) {
  // Every warp reads the list of one block.
  int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int block = warp % cluster.size(), share = warp / cluster.size();
  uint32_t count = lane < cluster.size() ? Candidates::Unpack(shared.of_blocks[lane]).count : 0;
  auto count_before = [&](int rank) {
    return static_cast<int>(__reduce_add_sync(kFullWarp, lane < rank ? count : 0u));
  };
  int place = count_before(block);
  const uint32_t* listed = cluster.Map(shared.listed, block);
  ForEachInBatches<4>(
      share * kWarpSize + lane, static_cast<int>(__shfl_sync(kFullWarp, count, block)),
      kRadixThreads / cluster.size(), [&](int i) { return listed[i]; },
      [&](int i, uint32_t key) { shared.gathered[place + i] = key; });
  __syncthreads();
  cluster.ArriveAfterReads();  // of the others' lists
  return count_before(cluster.rank());
}

// Adds up the Counts of the blocks before this one in shared.before, which is complete after the
// next barrier of the block. num_candidates: of those blocks.
__device__ void CountBefore(const BlockCluster& cluster, SelectShared& shared, int num_candidates,
                            uint32_t threshold) {
  Counts counts = {0, 0};
  int thread = static_cast<int>(threadIdx.x);
  if (thread < cluster.rank()) {
    counts.above = Candidates::Unpack(shared.of_blocks[thread]).num_beyond;
  }
  for (int i = thread; i < num_candidates; i += kRadixThreads) {
    counts.above += shared.gathered[i] > threshold;
    counts.equal += shared.gathered[i] == threshold;
  }
  __syncwarp();
  counts.above = __reduce_add_sync(kFullWarp, counts.above);
  counts.equal = __reduce_add_sync(kFullWarp, counts.equal);
  if (thread % kWarpSize != 0) return;
  if (counts.above > 0) atomicAdd(&shared.before.above, counts.above);
  if (counts.equal > 0) atomicAdd(&shared.before.equal, counts.equal);
}

// The same without candidates: every block counts its keys and tells the others. Complete when it
// returns.
__device__ void ShareCounts(const BlockCluster& cluster, SelectShared& shared,
                            const SliceKeys& keys, uint32_t threshold) {
  Counts own = {0, 0};
  keys.ForEachRound([&](int, const KeyRun& run, uint32_t competes) {
    RunBits bits = BitsOf(run, competes, threshold, threshold);
    own.above += __popc(bits.above);
    own.equal += __popc(bits.equal);
  });
  ShareWithCluster(cluster, BlockScan(own.Packed(), shared.warp_sums).total, shared.of_blocks);
  if (threadIdx.x == 0) {
    unsigned long long before = 0;
    for (int block = 0; block < cluster.rank(); ++block) before += shared.of_blocks[block];
    shared.before = Counts::Unpack(before);
  }
  __syncthreads();
}

// The key of the last of the best `count` positions, and how many are above it. Afterwards
// shared.before has the Counts of the blocks before this one, and the others may be reading this
// block's list until the next barrier of the cluster, at which this block has arrived.
__device__ RadixThreshold<uint32_t> FindLastChosen(const BlockCluster& cluster,
                                                   SelectShared& shared, const SliceKeys& keys,
                                                   const uint32_t* first_digits, uint32_t count) {
  auto numbers = *reinterpret_cast<const Vec<uint32_t, kBinsPerThread>*>(first_digits + FirstBin());
  RadixSearch<uint32_t> search;
  search.Narrow(FindBin(shared.radix, FirstBin(), numbers.elements, 0u, count));
  cluster.Wait();  // for BeginSearch
  if (!search.IsDone(count) && search.threshold.at <= kMaxCandidates) {
    ListCandidates(cluster, shared, keys, search);
    int num_candidates = static_cast<int>(search.threshold.at);
    int num_before = GatherCandidates(cluster, shared);
#pragma unroll 1
    while (!search.IsDone(count)) {
      FindDigit<RadixElements::kSameInAllBlocks>(
          cluster, shared.radix, count, search, [&](auto&& add) {
            for (int i = threadIdx.x; i < num_candidates; i += kRadixThreads) {
              add(shared.gathered[i], 1u);
            }
          });
    }
    CountBefore(cluster, shared, num_before, search.threshold.key);
  } else {
#pragma unroll 1
    while (!search.IsDone(count)) {
      FindDigit<RadixElements::kOfThisBlock>(cluster, shared.radix, count, search, [&](auto&& add) {
        keys.ForEach([&](uint32_t key) { add(key, 1u); });
      });
    }
    ShareCounts(cluster, shared, keys, search.threshold.key);
    cluster.ArriveAfterReads();
  }
  return search.threshold;
}

// Writes to `out`, ascending, the slice's positions whose key is above the threshold and those at
// it that are among the first `num_ties` of the set.
__device__ void WriteChosen(SelectShared& shared, const SliceKeys& keys, uint32_t threshold,
                            uint32_t num_ties, int32_t* out) {
  constexpr int kHalf = 16;  // bits for either number of a round's keys
  static_assert(kRoundLength < 1 << kHalf);
  Counts done = {0, 0};  // of the rounds before
  keys.ForEachRound([&](int first, const KeyRun& run, uint32_t competes) {
    RunBits bits = BitsOf(run, competes, threshold, threshold);
    auto own = static_cast<uint32_t>(__popc(bits.above) << kHalf | __popc(bits.equal));
    auto scan = BlockScan(own, shared.radix.warp_sums);
    constexpr uint32_t kLow = (1u << kHalf) - 1;
    Counts before = {shared.before.above + done.above + (scan.before >> kHalf),
                     shared.before.equal + done.equal + (scan.before & kLow)};
    done = {done.above + (scan.total >> kHalf), done.equal + (scan.total & kLow)};
    for (uint32_t left = bits.above | bits.equal; left != 0; left &= left - 1) {
      uint32_t bit = left & -left;
      bool is_tie = (bits.equal & bit) != 0;
      if (!is_tie || before.equal < num_ties) {
        out[before.above + min(before.equal, num_ties)] = first + __ffs(bit) - 1;
      }
      before.above += !is_tie;
      before.equal += is_tie;
    }
  });
}

// grid (cluster size, num_sets, B): a cluster per set.
__global__ void __launch_bounds__(kRadixThreads, kBlocksPerSm)
    SelectTopKKernel(const SelectParams p) {
  __shared__ SelectShared shared;
  BlockCluster cluster;
  if (threadIdx.x == 0) {
    shared.own = {0, 0};
    shared.before = {0, 0};
  }
  BeginSearch(cluster, shared.radix);
  int row = static_cast<int>(blockIdx.z);
  int num_tokens = __ldcg(p.seq_lens + row);  // which PoolScores does not write
  WaitForPreviousKernel();
  LetNextKernelStart();
  int64_t set = static_cast<int64_t>(row) * gridDim.y + blockIdx.y;
  int32_t* token_idx = p.token_idx + set * p.places.token_budget;
  uint32_t* first_digits = p.ranked.first_digits + set * kRadixBins;
  Contest contest = p.places.ContestOf(num_tokens);
  if (contest.count > 0) {  // the same in all blocks of the cluster
    SliceKeys keys(SliceOf(contest, cluster), p.ranked.keys + set * p.ranked.row_length);
    auto count = static_cast<uint32_t>(contest.count);
    auto last = FindLastChosen(cluster, shared, keys, first_digits, count);
    WriteChosen(shared, keys, last.key, count - last.above, token_idx + p.places.sink_tokens);
  }
  cluster.Wait();  // the others have read this block's list; or for BeginSearch
  if (cluster.rank() > 0) return;
  // Last, because barriers of a cluster wait for writes.
  if (contest.count > 0) {
    *reinterpret_cast<Vec<uint32_t, kBinsPerThread>*>(first_digits + FirstBin()) = {};
  }
  WriteForced(p.places, num_tokens, token_idx);
  if (threadIdx.x == 0) p.num_selected[set] = min(num_tokens, p.places.token_budget);
}

int64_t RowLength(int64_t max_len) {
  return CeilDiv(max_len, kKeyRun) * kKeyRun;
}

}  // namespace

SelectTopKBytes SelectTopKScratchBytes(int64_t num_sets_in_all, int64_t max_len) {
  constexpr int64_t kBytes = sizeof(uint32_t);
  return {.keys = Product({num_sets_in_all, RowLength(max_len), kBytes}),
          .first_digits = Product({num_sets_in_all, kRadixBins, kBytes})};
}

void LaunchSelectTopK(const SelectTopKArgs& args, const SelectTopKScratch& scratch,
                      cudaStream_t stream) {
  int64_t batch_size = args.token_idx.dim(0), num_sets = args.token_idx.dim(1);
  if (batch_size == 0) return;
  int64_t max_len = args.scores.dim(2);
  RankedKeys ranked = {.keys = static_cast<uint32_t*>(scratch.keys),
                       .row_length = RowLength(max_len),
                       .first_digits = static_cast<uint32_t*>(scratch.first_digits)};
  LaunchPoolScores(args, ranked, stream);
  SelectParams p = {.ranked = ranked,
                    .seq_lens = args.seq_lens.data<int32_t>(),
                    .token_idx = args.token_idx.data<int32_t>(),
                    .num_selected = args.num_selected.data<int32_t>(),
                    .places = SetPlaces(args)};
  unsigned size = ChooseClusterSize(SelectTopKKernel, kRadixThreads, batch_size * num_sets,
                                    std::max<int64_t>(1, max_len / kMinSliceLength),
                                    [](unsigned) { return int64_t{0}; });
  LaunchShape shape = {
      .grid = dim3(size, static_cast<unsigned>(num_sets), static_cast<unsigned>(batch_size)),
      .block = dim3(kRadixThreads),
      .cluster_size = size};
  LaunchOverlapped("select_top_k", SelectTopKKernel, shape, stream, p);
  if (args.top_p_mass < 1.0f) LaunchTrimToMass(args, ranked, stream);
}

}  // namespace tidal
