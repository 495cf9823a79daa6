// Merges the splits of decode attention in ascending order, a fixed order: equal input, equal bits.
// Split-K flash decoding; each split carries the maximum and the sum of its softmax.
#pragma once

#include <cstdint>

#include "common/decode_split.cuh"
#include "common/reduce.cuh"
#include "common/softmax_state.cuh"
#include "common/vec.cuh"

namespace tidal {

// grid (num_q_heads, batch_size), head_dim threads: thread d owns dim d of one output row. Shared:
// the weight of each split and its weighted sum. Splits that got no tokens are not read.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kHeadDim)
    CombineSplitsKernel(PartialResults partials, AttendedTokens attended, int num_splits, T* out,
                        float* lse) {
  __shared__ float weights[kMaxSplits];
  __shared__ float weighted_sums[kMaxSplits];
  int q_head = blockIdx.x, num_q_heads = gridDim.x, batch = blockIdx.y, thread = threadIdx.x;
  int count = attended.Count(batch);
  int span = SpanOfSplit(0, num_splits, count).end;
  int num_used = count > 0 ? (count - 1) / span + 1 : 0;
  int64_t first_row = PartialResults::Row(batch, num_q_heads, q_head, num_splits, 0);

  // Each warp finds the maximum by itself: cheaper than a barrier.
  float max = NegativeInfinity();
  for (int split = thread % kWarpSize; split < num_used; split += kWarpSize) {
    max = fmaxf(max, partials.state[first_row + split].x);
  }
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, mask));
  }
  for (int split = thread; split < num_used; split += kHeadDim) {
    float2 state = partials.state[first_row + split];
    float weight = SoftmaxWeight(state.x, FiniteMax(max));
    weights[split] = weight;
    weighted_sums[split] = __fmul_rn(weight, state.y);
  }
  __syncthreads();

  float sum = 0.0f, total = 0.0f;
  const float* partial = partials.out + first_row * kHeadDim + thread;
#pragma unroll 8
  for (int split = 0; split < num_used; ++split) {
    total = __fmaf_rn(weights[split], partial[int64_t{split} * kHeadDim], total);
    sum = __fadd_rn(sum, weighted_sums[split]);
  }
  // A sum of 0 means that every score was masked. NaN is not 0 and passes on.
  int64_t row = int64_t{batch} * num_q_heads + q_head;
  out[row * kHeadDim + thread] = FromFloat32<T>(sum == 0.0f ? 0.0f : total / sum);
  if (lse != nullptr && thread == 0) {
    lse[row] = sum == 0.0f ? NegativeInfinity() : max + logf(sum);
  }
}

}  // namespace tidal
