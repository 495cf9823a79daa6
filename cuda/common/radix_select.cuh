// Exact selection by value in one cluster of blocks: float order as integer keys, and the key at
// which the weights of the larger keys reach a target (a count for top-k, a probability mass for
// top-p).
//
// Radix selection from the highest digit down: a histogram of the digit under the prefix found so
// far, then the bin in which the target falls. Every block counts its own elements; the blocks'
// histograms are added up in distributed shared memory, each block keeping the sums of its share of
// the bins. All sums are of integers, so results never depend on the order in which atomics arrive.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/block_cluster.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace tidal {

inline constexpr int kRadixThreads = 512;  // block size of all functions here
inline constexpr int kRadixBins = 2048;
inline constexpr int kRadixPasses = 3;
inline constexpr int kBinsPerThread = kRadixBins / kRadixThreads;
inline constexpr int kMaxShare = kRadixBins / 2;  // of a cluster's bins in one of its blocks
static_assert(kBinsPerThread == 4, "a thread's bins travel as one 16-byte vector");

// The digit of a key that a pass looks at: 11, 11 and 10 bits from the top.
struct RadixDigit {
  int shift;
  uint32_t mask;
};
__device__ __forceinline__ RadixDigit DigitOfPass(int pass) {
  return {pass == 0 ? 21 : pass == 1 ? 10 : 0, pass == kRadixPasses - 1 ? 0x3ffu : 0x7ffu};
}

__device__ __forceinline__ uint32_t FirstDigit(uint32_t key) {
  return key >> DigitOfPass(0).shift;
}

// Unsigned order equals float order; -0 equals +0; NaN lowest, below -inf.
__device__ __forceinline__ uint32_t OrderedKey(float value) {
  if (isnan(value)) return 0;
  uint32_t bits = value == 0.0f ? 0u : __float_as_uint(value);
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

// Inverse of OrderedKey, for keys of numbers.
__device__ __forceinline__ float KeyToFloat(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) ? key & 0x7fffffffu : ~key);
}

// Calls visit(i, load(i)) for i = first, first + step, .. below `last`, a whole batch of loads
// ahead of the visits, so that they overlap.
template <int kBatch, typename Load, typename Visit>
__device__ __forceinline__ void ForEachInBatches(int first, int last, int step, Load&& load,
                                                 Visit&& visit) {
  for (int begin = first; begin < last; begin += kBatch * step) {
    decltype(load(0)) values[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (begin + j * step < last) values[j] = load(begin + j * step);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (begin + j * step < last) visit(begin + j * step, values[j]);
    }
  }
}

// The same for 0 <= i < count, dealt out to the threads of the block in turn.
template <int kBatch, typename Load, typename Visit>
__device__ __forceinline__ void BlockForEachInBatches(int count, Load&& load, Visit&& visit) {
  ForEachInBatches<kBatch>(static_cast<int>(threadIdx.x), count, kRadixThreads, load, visit);
}

// Weights by bin, zero in the beginning. Weight: uint32_t or unsigned long long.
template <typename Weight, int kCount>
struct RadixBins {
  alignas(16) uint32_t low[kCount];   // lower 32 bits
  alignas(16) uint32_t high[kCount];  // upper 32 bits
};
template <int kCount>
struct RadixBins<uint32_t, kCount> {
  alignas(16) uint32_t low[kCount];
};

template <int kCount>
__device__ __forceinline__ void AddToBin(RadixBins<uint32_t, kCount>& bins, int bin,
                                         uint32_t weight) {
  // A weight of 1 becomes one instruction that adds up the lanes of a warp that meet in a bin
  // (SASS: ATOMS.POPC.INC), so the few bins that scores fall into do not slow it down.
  atomicAdd(&bins.low[bin], weight);
}

// A 64-bit sum from 32-bit atomics, which shared memory has natively: whoever makes the lower word
// wrap carries into the upper one.
template <int kCount>
__device__ __forceinline__ void AddToBin(RadixBins<unsigned long long, kCount>& bins, int bin,
                                         unsigned long long weight) {
  auto weight_low = static_cast<uint32_t>(weight);
  uint32_t before = atomicAdd(&bins.low[bin], weight_low);
  uint32_t carry = before + weight_low < before ? 1u : 0u;
  uint32_t weight_high = static_cast<uint32_t>(weight >> 32) + carry;
  if (weight_high != 0) atomicAdd(&bins.high[bin], weight_high);
}

template <int kCount>
__device__ __forceinline__ void ClearBins(uint32_t (&words)[kCount]) {
#pragma unroll
  for (int done = 0; done < kCount; done += 4 * kRadixThreads) {
    int i = done + 4 * static_cast<int>(threadIdx.x);
    if (i < kCount) *reinterpret_cast<Vec<uint32_t, 4>*>(&words[i]) = {};
  }
}
template <typename Weight, int kCount>
__device__ __forceinline__ void ClearBins(RadixBins<Weight, kCount>& bins) {
  ClearBins(bins.low);
  if constexpr (sizeof(Weight) > sizeof(uint32_t)) ClearBins(bins.high);
}

// Reads the bins [first, first + kBinsPerThread).
template <typename Weight, int kCount>
__device__ __forceinline__ void ReadBins(const RadixBins<Weight, kCount>& bins, int first,
                                         Weight (&weights)[kBinsPerThread]) {
  using Words = Vec<uint32_t, kBinsPerThread>;
  Words low = *reinterpret_cast<const Words*>(&bins.low[first]), high = {};
  if constexpr (sizeof(Weight) > sizeof(uint32_t)) {
    high = *reinterpret_cast<const Words*>(&bins.high[first]);
  }
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    weights[i] = low.elements[i];
    if constexpr (sizeof(Weight) > sizeof(uint32_t)) {
      weights[i] |= static_cast<Weight>(high.elements[i]) << 32;
    }
  }
}

// Reads them and makes them zero.
template <typename Weight, int kCount>
__device__ __forceinline__ void TakeBins(RadixBins<Weight, kCount>& bins, int first,
                                         Weight (&weights)[kBinsPerThread]) {
  using Words = Vec<uint32_t, kBinsPerThread>;
  ReadBins(bins, first, weights);
  *reinterpret_cast<Words*>(&bins.low[first]) = {};
  if constexpr (sizeof(Weight) > sizeof(uint32_t)) {
    *reinterpret_cast<Words*>(&bins.high[first]) = {};
  }
}

template <typename Weight>
struct RadixThreshold {
  uint32_t key;  // weight(keys > key) < target <= weight(keys >= key)
  Weight above;  // weight of keys > key
  Weight at;     // weight of keys == key
};

template <typename Weight>
struct RadixShared {
  RadixBins<Weight, kRadixBins> block_bins;  // of this block's elements, in the current pass
  // This block's share of the cluster's bins, for each pass anew, so that one barrier a pass will
  // do. Used by clusters of two blocks or more.
  RadixBins<Weight, kRadixPasses * kMaxShare> cluster_bins;
  Weight warp_sums[kMaxWarps];
  RadixThreshold<Weight> found;  // .key holds one digit
};

// Whose elements a pass counts.
enum class RadixElements { kOfThisBlock, kSameInAllBlocks };

// How far a search has come: the threshold's digits down to the last pass.
template <typename Weight>
struct RadixSearch {
  RadixThreshold<Weight> threshold = {0, 0, 0};
  uint32_t prefix_mask = 0;
  int pass = 0;  // the next one

  __device__ bool Contains(uint32_t key) const { return (key & prefix_mask) == threshold.key; }

  // Goes on with the keys of one bin of the next pass.
  __device__ void Narrow(const RadixThreshold<Weight>& bin) {
    RadixDigit digit = DigitOfPass(pass);
    threshold = {threshold.key | bin.key << digit.shift, bin.above, bin.at};
    prefix_mask |= digit.mask << digit.shift;
    ++pass;
  }

  // Counts (uint32_t) are found early if all keys of a bin are wanted: then `key` ends in zeros,
  // `above` and `at` are those of the bin, above + at == target, and the wanted keys are those >=
  // key.
  __device__ bool IsDone(Weight target) const {
    bool is_count = std::is_same_v<Weight, uint32_t>;
    return pass == kRadixPasses ||
           (pass > 0 && is_count && threshold.above + threshold.at == target);
  }
};

// From the block's weights of the thread's bins, [first, first + kBinsPerThread), to the cluster's.
template <typename Weight>
__device__ __forceinline__ void AddUpCluster(const BlockCluster& cluster,
                                             RadixShared<Weight>& shared, int pass, int first,
                                             Weight (&weights)[kBinsPerThread]) {
  if (cluster.size() == 1) return;
  // Dealt out in turn: the bins in use are neighbours, and one owner could not keep up with all.
  int group = first / kBinsPerThread;
  auto& owners_bins = *cluster.Map(&shared.cluster_bins, group % cluster.size());
  int offset = pass * kMaxShare + group / cluster.size() * kBinsPerThread;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (weights[i] != 0) AddToBin(owners_bins, offset + i, weights[i]);
  }
  cluster.Sync();
  ReadBins(owners_bins, offset, weights);
}

// The first of the thread's bins: the first thread has the highest.
__device__ __forceinline__ int FirstBin() {
  return kRadixBins - kBinsPerThread * (static_cast<int>(threadIdx.x) + 1);
}

// The bin, from the highest down, in which `above` plus the bins' weights reaches `target`.
// `first`: FirstBin(), of which on the thread has `weights`.
template <typename Weight>
__device__ __forceinline__ RadixThreshold<Weight> FindBin(RadixShared<Weight>& shared, int first,
                                                          const Weight (&weights)[kBinsPerThread],
                                                          Weight above, Weight target) {
  Weight sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) sum += weights[i];
  Weight before = above + BlockScan(sum, shared.warp_sums).before;
#pragma unroll
  for (int i = kBinsPerThread - 1; i >= 0; --i) {
    if (before < target && target <= before + weights[i]) {  // true for one bin only
      shared.found = {static_cast<uint32_t>(first + i), before, weights[i]};
    }
    before += weights[i];
  }
  __syncthreads();
  return shared.found;
}

// Before the first pass, by all threads of the cluster.
template <typename Weight>
__device__ void BeginSearch(const BlockCluster& cluster, RadixShared<Weight>& shared) {
  ClearBins(shared.block_bins);
  ClearBins(shared.cluster_bins);
  __syncthreads();
  cluster.Arrive();  // other blocks may add to the cluster's bins
}

// One pass: the next digit of the threshold. Every thread calls visit(add), which calls
// add(key, weight) for each of the thread's own elements, of which only those in the bin found so
// far count. The first pass is of kOfThisBlock.
template <RadixElements kElements, typename Weight, typename Visit>
__device__ __forceinline__ void FindDigit(const BlockCluster& cluster, RadixShared<Weight>& shared,
                                          Weight target, RadixSearch<Weight>& search,
                                          Visit&& visit) {
  RadixDigit digit = DigitOfPass(search.pass);
  visit([&](uint32_t key, Weight weight) {
    if (!search.Contains(key)) return;
    AddToBin(shared.block_bins, static_cast<int>((key >> digit.shift) & digit.mask), weight);
  });
  __syncthreads();
  int first = FirstBin();
  Weight weights[kBinsPerThread];
  TakeBins(shared.block_bins, first, weights);
  if constexpr (kElements == RadixElements::kOfThisBlock) {
    if (search.pass == 0) cluster.Wait();
    AddUpCluster(cluster, shared, search.pass, first, weights);
  }
  search.Narrow(FindBin(shared, first, weights, search.threshold.above, target));
}

// The threshold over all (key, weight) that the cluster's blocks name, the same in all of them.
// visit(add) is called in each pass, the first time as first_visit(add). 1 <= target <= the sum of
// all weights. Another barrier of the cluster follows before `shared` is used again or a block
// ends: others may still be reading it.
template <typename Weight, typename FirstVisit, typename Visit>
__device__ RadixThreshold<Weight> FindThreshold(const BlockCluster& cluster,
                                                RadixShared<Weight>& shared, Weight target,
                                                FirstVisit&& first_visit, Visit&& visit) {
  constexpr RadixElements kOwn = RadixElements::kOfThisBlock;
  RadixSearch<Weight> search;
  BeginSearch(cluster, shared);
  FindDigit<kOwn>(cluster, shared, target, search, first_visit);
#pragma unroll 1
  while (!search.IsDone(target)) FindDigit<kOwn>(cluster, shared, target, search, visit);
  return search.threshold;
}

}  // namespace tidal
