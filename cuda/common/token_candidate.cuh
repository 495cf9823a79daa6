// A token with its logit as one integer that orders by logit, then by lower id: the largest of some
// is the most likely token.
#pragma once

#include <cstdint>

#include "common/radix_select.cuh"
#include "common/reduce.cuh"

namespace tidal {

using Candidate = unsigned long long;  // 0: none

__device__ __forceinline__ Candidate PackCandidate(float value, int id) {
  return static_cast<Candidate>(OrderedKey(value)) << 32 | ~static_cast<uint32_t>(id);
}
__device__ __forceinline__ int CandidateId(Candidate candidate) {
  return static_cast<int>(~static_cast<uint32_t>(candidate));
}
__device__ __forceinline__ float CandidateValue(Candidate candidate) {
  return KeyToFloat(static_cast<uint32_t>(candidate >> 32));
}

__device__ __forceinline__ Candidate WarpMax(Candidate value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

// The largest value of the block, in every thread.
__device__ __forceinline__ Candidate BlockMax(Candidate value, Candidate (&warp_max)[kMaxWarps]) {
  int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  value = WarpMax(value);
  __syncthreads();
  if (lane == 0) warp_max[warp] = value;
  __syncthreads();
  int num_warps = blockDim.x / kWarpSize;
  return WarpMax(lane < num_warps ? warp_max[lane] : 0);
}

}  // namespace tidal
