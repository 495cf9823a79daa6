// Exact selection by value in one block: float order as integer keys, and the key at which the
// weights of the larger keys reach a target (a count for top-k, a probability mass for top-p).
//
// Radix selection from the highest digit down: a histogram of the digit under the prefix found so
// far, then the bin in which the target falls. All sums are of integers, so results never depend on
// the order in which atomics arrive.
#pragma once

#include <cstdint>

#include "common/reduce.cuh"

namespace tidal {

inline constexpr int kRadixThreads = 1024;  // block size of all functions here
inline constexpr int kRadixBins = 2048;     // digits of 11, 11 and 10 bits

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

template <typename Weight>  // uint32_t or unsigned long long
struct RadixThreshold {
  uint32_t key;  // weight(keys > key) < target <= weight(keys >= key)
  Weight above;  // weight of keys > key
  Weight at;     // weight of keys == key
};

template <typename Weight>
struct RadixShared {
  uint32_t low[kRadixBins];   // a bin's weight, lower 32 bits
  uint32_t high[kRadixBins];  // upper 32 bits
  Weight warp_sums[kMaxWarps];
  RadixThreshold<Weight> found;  // .key holds one digit
};

template <>
struct RadixShared<uint32_t> {
  uint32_t low[kRadixBins];
  uint32_t warp_sums[kMaxWarps];
  RadixThreshold<uint32_t> found;
};

__device__ __forceinline__ void AddToBin(RadixShared<uint32_t>& shared, uint32_t bin,
                                         uint32_t weight) {
  atomicAdd(&shared.low[bin], weight);
}

// A 64-bit sum from 32-bit atomics, which shared memory has natively: whoever makes the lower word
// wrap carries into the upper one.
__device__ __forceinline__ void AddToBin(RadixShared<unsigned long long>& shared, uint32_t bin,
                                         unsigned long long weight) {
  auto weight_low = static_cast<uint32_t>(weight);
  uint32_t before = atomicAdd(&shared.low[bin], weight_low);
  uint32_t carry = before + weight_low < before ? 1u : 0u;
  uint32_t weight_high = static_cast<uint32_t>(weight >> 32) + carry;
  if (weight_high != 0) atomicAdd(&shared.high[bin], weight_high);
}

__device__ __forceinline__ void ClearBin(RadixShared<uint32_t>& shared, int bin) {
  shared.low[bin] = 0;
}
__device__ __forceinline__ void ClearBin(RadixShared<unsigned long long>& shared, int bin) {
  shared.low[bin] = 0;
  shared.high[bin] = 0;
}
__device__ __forceinline__ uint32_t BinWeight(const RadixShared<uint32_t>& shared, int bin) {
  return shared.low[bin];
}
__device__ __forceinline__ unsigned long long BinWeight(
    const RadixShared<unsigned long long>& shared, int bin) {
  return static_cast<unsigned long long>(shared.high[bin]) << 32 | shared.low[bin];
}

// The bin, from the highest down, in which `above` plus the bins' weights reaches `target`.
template <typename Weight>
__device__ RadixThreshold<Weight> FindRadixBin(RadixShared<Weight>& shared, Weight above,
                                               Weight target) {
  constexpr int kBinsPerThread = kRadixBins / kRadixThreads;
  int first = kRadixBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;
  Weight sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) sum += BinWeight(shared, first - i);
  Weight before = above + BlockScan(sum, shared.warp_sums).before;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    Weight weight = BinWeight(shared, first - i);
    if (before < target && target <= before + weight) {
      shared.found = {static_cast<uint32_t>(first - i), before, weight};  // true in one thread only
    }
    before += weight;
  }
  __syncthreads();
  return shared.found;
}

// The threshold over all (key, weight) that `visit` names: `visit(add)` is called by every thread,
// three times, and calls `add(key, weight)` for each of the thread's own elements.
// 1 <= target <= the sum of all weights.
template <typename Weight, typename Visit>
__device__ RadixThreshold<Weight> FindThreshold(RadixShared<Weight>& shared, Weight target,
                                                Visit&& visit) {
  RadixThreshold<Weight> threshold = {0, 0, 0};
  uint32_t prefix_mask = 0;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    uint32_t digit_mask = pass == 2 ? 0x3ffu : 0x7ffu;
    __syncthreads();  // the last pass's bins and result have been read
    for (int bin = threadIdx.x; bin < kRadixBins; bin += kRadixThreads) ClearBin(shared, bin);
    __syncthreads();
    visit([&](uint32_t key, Weight weight) {
      if ((key & prefix_mask) == threshold.key) {
        AddToBin(shared, (key >> shift) & digit_mask, weight);
      }
    });
    __syncthreads();
    RadixThreshold<Weight> bin = FindRadixBin(shared, threshold.above, target);
    threshold = {threshold.key | bin.key << shift, bin.above, bin.at};
    prefix_mask |= digit_mask << shift;
  }
  return threshold;
}

}  // namespace tidal
