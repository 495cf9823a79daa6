// Sums, scans and radix bins over a warp or a block. Fixed order: the same input gives the same
// bits.
//
// Block functions are called by all threads of the block, whose size is a multiple of 32 and at
// most 1024; they begin with a barrier, so the same shared memory may be handed to one after
// another.
#pragma once

#include <cstdint>

namespace tidal {

inline constexpr int kWarpSize = 32;
inline constexpr int kMaxWarps = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float WarpSum(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

// The sum over the block, in every thread.
__device__ __forceinline__ float BlockSum(float value, float (&warp_sums)[kMaxWarps]) {
  int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  value = WarpSum(value);
  __syncthreads();
  if (lane == 0) warp_sums[warp] = value;
  __syncthreads();
  int num_warps = blockDim.x / kWarpSize;
  return WarpSum(lane < num_warps ? warp_sums[lane] : 0.0f);
}

template <typename T>
struct ScanResult {
  T before;  // sum over the threads before this one
  T total;   // sum over the block
};

// Exclusive prefix sum in thread order. T: uint32_t or unsigned long long.
template <typename T>
__device__ __forceinline__ ScanResult<T> BlockScan(T value, T (&warp_sums)[kMaxWarps]) {
  int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  T inclusive = value;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    T left = __shfl_up_sync(kFullWarp, inclusive, offset);
    if (lane >= offset) inclusive += left;
  }
  __syncthreads();
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  int num_warps = blockDim.x / kWarpSize;
  T warps_inclusive = lane < num_warps ? warp_sums[lane] : T{0};
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    T left = __shfl_up_sync(kFullWarp, warps_inclusive, offset);
    if (lane >= offset) warps_inclusive += left;
  }
  T before_warp = __shfl_sync(kFullWarp, warps_inclusive, warp > 0 ? warp - 1 : 0);
  T total = __shfl_sync(kFullWarp, warps_inclusive, kWarpSize - 1);
  return {(warp > 0 ? before_warp : T{0}) + inclusive - value, total};
}

}  // namespace tidal
