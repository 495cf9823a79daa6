// Merges partial results of decode attention: of a block's warps, and of a row's splits. Always in
// ascending order, a fixed order: equal input, equal bits, whichever block comes last.
// Split-K flash decoding; each part carries the maximum and the sum of its softmax.
#pragma once

#include <cstdint>

#include "common/decode_split.cuh"
#include "common/dependent_launch.cuh"
#include "common/launch_config.h"
#include "common/reduce.cuh"
#include "common/score_rule.cuh"
#include "common/softmax_state.cuh"
#include "common/vec.cuh"

namespace tidal {

inline constexpr int kDecodeThreads = kDecodeWarps * kWarpSize;

// The dims of an output row that one lane of a warp holds, from lane times their number on; those
// from kHeadDim on are anything.
template <int kHeadDim>
inline constexpr int kLaneDims = kPaddedDim<kHeadDim> / kWarpSize;
template <int kHeadDim>
using LaneDims = Vec<float, kLaneDims<kHeadDim>>;

// The softmax of one head's scores of some tokens, the same in all lanes of a warp; as it stands,
// of none.
struct HeadState {
  float max = NegativeInfinity();
  float sum = 0.0f;  // of exp(score - max)

  // A sum of 0 means that there was no token, or that every score was masked. NaN is not 0 and
  // passes on.
  __device__ __forceinline__ float LogSumExp() const {
    return sum == 0.0f ? NegativeInfinity() : max + logf(sum);
  }
};

// Attention of one head to some tokens, held by a warp; as it stands, to none.
template <int kHeadDim>
struct HeadResult : HeadState {
  LaneDims<kHeadDim> out = {};  // sum of exp(score - max) * v
};

// Parts that a lane has of up to kMaxParts that a warp merges: lane l has l, l + 32 and so on.
template <int kMaxParts>
inline constexpr int kPartsOfLane = (kMaxParts + kWarpSize - 1) / kWarpSize;

// state_of(part), maximum and sum, of this lane's parts < count.
template <int kLaneParts, typename StateOf>
__device__ __forceinline__ void LoadStates(int count, const StateOf& state_of,
                                           float2 (&states)[kLaneParts]) {
  int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kLaneParts; ++i) {
    int part = i * kWarpSize + lane;
    states[i] = part < count ? state_of(part) : make_float2(NegativeInfinity(), 0.0f);
  }
}

// A warp merges what LoadStates loaded. weights: what the outputs of this lane's parts are to be
// multiplied by.
template <int kLaneParts>
__device__ __forceinline__ HeadState MergeLoaded(const float2 (&states)[kLaneParts],
                                                 float (&weights)[kLaneParts]) {
  HeadState merged;
#pragma unroll
  for (int i = 0; i < kLaneParts; ++i) merged.max = fmaxf(merged.max, states[i].x);
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    merged.max = fmaxf(merged.max, __shfl_xor_sync(kFullWarp, merged.max, mask));
  }
#pragma unroll
  for (int i = 0; i < kLaneParts; ++i) {
    weights[i] = SoftmaxWeight(states[i].x, FiniteMax(merged.max));
    merged.sum = __fmaf_rn(weights[i], states[i].y, merged.sum);
  }
  merged.sum = WarpSum(merged.sum);
  return merged;
}

// A warp merges the softmax of one head from `count` <= kMaxParts parts. state_of(part): maximum
// and sum.
template <int kMaxParts, typename StateOf>
__device__ __forceinline__ HeadState MergeStates(int count, const StateOf& state_of) {
  float2 states[kPartsOfLane<kMaxParts>];
  float weights[kPartsOfLane<kMaxParts>];
  LoadStates(count, state_of, states);
  return MergeLoaded(states, weights);
}

// Parts whose outputs a warp loads at a time: 8 KB, which is what the L2's latency asks for.
template <int kHeadDim>
inline constexpr int kMergeLoads = kHeadDim <= 128 ? 16 : 8;

// The same of attention. out_of(part): this lane's dims.
template <int kHeadDim, int kMaxParts, int kMostLoads = kMergeLoads<kHeadDim>, typename StateOf,
          typename OutOf>
__device__ __forceinline__ HeadResult<kHeadDim> MergeParts(int count, const StateOf& state_of,
                                                           const OutOf& out_of) {
  constexpr int kBatch = kMaxParts < kMostLoads ? kMaxParts : kMostLoads;
  constexpr int kLaneParts = kPartsOfLane<kMaxParts>;
  static_assert(kLaneParts <= 2 && (kMaxParts == kBatch || kWarpSize % kBatch == 0));
  float2 states[kLaneParts];
  LoadStates(count, state_of, states);
  LaneDims<kHeadDim> outs[kBatch];
  auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < count) outs[i] = out_of(first + i);
    }
  };
  load(0);  // beside the states

  float weights[kLaneParts];
  HeadResult<kHeadDim> merged = {MergeLoaded(states, weights)};
#pragma unroll 1
  for (int first = 0; first < count; first += kBatch) {
    if (first > 0) load(first);
    float lane_weight = first < kWarpSize ? weights[0] : weights[kLaneParts - 1];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= count) break;
      float weight = __shfl_sync(kFullWarp, lane_weight, (first + i) % kWarpSize);
#pragma unroll
      for (int dim = 0; dim < kLaneDims<kHeadDim>; ++dim) {
        merged.out.elements[dim] =
            __fmaf_rn(weight, outs[i].elements[dim], merged.out.elements[dim]);
      }
    }
  }
  return merged;
}

template <typename T>
struct AttentionOutput {
  T* out;              // [B, Hq, D]
  float* lse;          // [B, Hq], or nullptr: log of the sum of exp(score)
  float scale;         // of the values
  const float* sinks;  // [Hq], or nullptr; not in lse
  uint32_t num_q_heads;

  // A warp writes row batch * Hq + q_head.
  template <int kHeadDim>
  __device__ __forceinline__ void Store(int64_t row, const HeadResult<kHeadDim>& result) const {
    constexpr int kDims = kLaneDims<kHeadDim>;
    int lane = threadIdx.x % kWarpSize;
    float values[kDims], sum = result.sum, keep = 1.0f;
    if (sinks != nullptr) {
      uint32_t head = static_cast<uint32_t>(row) % num_q_heads;
      SumWithSink with_sink(result.max, result.sum, __ldg(sinks + head));
      sum = with_sink.sum;
      keep = with_sink.keep;
    }
#pragma unroll
    for (int dim = 0; dim < kDims; ++dim) {
      values[dim] = sum == 0.0f ? 0.0f : result.out.elements[dim] * keep / sum * scale;
    }
    if (kPaddedDim<kHeadDim> == kHeadDim || lane * kDims < kHeadDim) {
      StoreFloats<kDims>(out + row * kHeadDim + lane * kDims, values);
    }
    if (lse != nullptr && lane == 0) lse[row] = result.LogSumExp();
  }
};

// The output where only the softmax is asked for.
struct LseOutput {
  float* lse;  // [B, Hq]

  // A warp writes row batch * Hq + q_head.
  __device__ __forceinline__ void Store(int64_t row, const HeadState& state) const {
    if (threadIdx.x % kWarpSize == 0) lse[row] = state.LogSumExp();
  }
};

// What one block of an attention kernel works on.
struct BlockWork {
  int64_t first_row;      // of the output: token * Hq + q_head of its first head
  int64_t first_partial;  // of the partial results, a row for each head
  int num_heads;
  int split;
  int num_splits;     // that a row has at most
  int num_used;       // of the row
  int counter_index;  // of the row and these heads
  // Where the heads are those of several queries that follow each other (DecodeQuery).
  int heads_per_query = kMaxGroupSize;
  int64_t query_stride = 0;

  __device__ __forceinline__ int64_t OutputRow(int head) const {
    return first_row + head / heads_per_query * query_stride + head % heads_per_query;
  }
  // The row of a split's partial result.
  __device__ __forceinline__ int64_t Part(int head, int of_split) const {
    return (first_partial + head) * num_splits + of_split;
  }
};

// Calls fn(head), each by one warp, for those of the heads that fall to this block: the `rank`-th
// of num_blocks that share them.
template <typename Fn>
__device__ __forceinline__ void ForEachHead(int num_heads, int rank, int num_blocks, const Fn& fn) {
  int first = rank + static_cast<int>(threadIdx.x) / kWarpSize * num_blocks;
  int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
#pragma unroll 1
  for (int head = first; head < num_heads; head += num_warps * num_blocks) fn(head);
}

// The end of a block whose split has no tokens; the first one writes the row if no other does.
// Result: what `output` stores of a head.
template <typename Result, typename Output>
__device__ __forceinline__ void EndUnusedSplit(const BlockWork& work, const Output& output) {
  if (work.split > 0) return;
  WaitForPreviousKernel();
  LetNextKernelStart();
  ForEachHead(work.num_heads, 0, 1,
              [&](int head) { output.Store(work.OutputRow(head), Result()); });
}

// Loads from L2: the L1 may hold what was there before other SMs wrote.
__device__ __forceinline__ Vec<float, 4> LoadFromL2(const Vec<float, 4>* source) {
  float4 v = __ldcg(reinterpret_cast<const float4*>(source));
  return {v.x, v.y, v.z, v.w};
}
__device__ __forceinline__ Vec<float, 2> LoadFromL2(const Vec<float, 2>* source) {
  float2 v = __ldcg(reinterpret_cast<const float2*>(source));
  return {v.x, v.y};
}
__device__ __forceinline__ Vec<float, 8> LoadFromL2(const Vec<float, 8>* source) {
  float4 v = __ldcg(reinterpret_cast<const float4*>(source));
  float4 w = __ldcg(reinterpret_cast<const float4*>(source) + 1);
  return {v.x, v.y, v.z, v.w, w.x, w.y, w.z, w.w};
}

// Counts a split, by one thread behind a barrier of those that wrote what it found. Returns whether
// it is the last of the num_used: then what the others wrote before is seen behind the next
// barrier, and the counter is 0 again.
__device__ __forceinline__ bool CountSplit(uint32_t* counter, int num_used) {
  // Counts to num_used - 1 and wraps to 0. Releases what the block wrote before, and acquires what
  // the blocks that counted before it wrote.
  uint32_t last = num_used - 1, before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;\n"
               : "=r"(before)
               : "l"(counter), "r"(last)
               : "memory");
  return before == last;
}

// Whether this block is the last of its row's used splits to call this: then it sees all that
// those wrote before, and the counter is 0 again.
__device__ __forceinline__ bool IsLastSplit(uint32_t* counter, int num_used) {
  __shared__ bool is_last;
  __syncthreads();  // all of the block has written
  if (threadIdx.x == 0) is_last = CountSplit(counter, num_used);
  __syncthreads();
  return is_last;
}

// The end of the only used split of a row. block_result(head): called by whole warps.
template <typename Output, typename BlockResult>
__device__ __forceinline__ void StoreAlone(const BlockWork& work, const Output& output,
                                           const BlockResult& block_result) {
  ForEachHead(work.num_heads, 0, 1,
              [&](int head) { output.Store(work.OutputRow(head), block_result(head)); });
}

// The splits leave their results in device memory, and the last block to finish merges them.
// block_result(head): of this split, called by whole warps. kMostLoads: as of MergeParts.
template <typename T, int kHeadDim, int kMostLoads = kMergeLoads<kHeadDim>, typename BlockResult>
__device__ __forceinline__ void MergeInLastBlock(const BlockWork& work,
                                                 const PartialResults& partials,
                                                 const AttentionOutput<T>& output,
                                                 const BlockResult& block_result) {
  if (work.num_used == 1) {
    StoreAlone(work, output, block_result);
    return;
  }
  int lane = threadIdx.x % kWarpSize;
  auto outs = reinterpret_cast<LaneDims<kHeadDim>*>(partials.out) + lane;
  ForEachHead(work.num_heads, 0, 1, [&](int head) {
    HeadResult<kHeadDim> result = block_result(head);
    int64_t part = work.Part(head, work.split);
    outs[part * kWarpSize] = result.out;
    if (lane == 0) partials.state[part] = make_float2(result.max, result.sum);
  });
  if (!IsLastSplit(partials.counter + work.counter_index, work.num_used)) return;
  ForEachHead(work.num_heads, 0, 1, [&](int head) {
    int64_t first_part = work.Part(head, 0);
    auto state_of = [&](int split) { return __ldcg(partials.state + first_part + split); };
    auto out_of = [&](int split) { return LoadFromL2(outs + (first_part + split) * kWarpSize); };
    output.Store(work.OutputRow(head),
                 MergeParts<kHeadDim, kMaxSplits, kMostLoads>(work.num_used, state_of, out_of));
  });
}

// The same where only the softmax is asked for. block_state(head): of this split.
template <typename BlockState>
__device__ __forceinline__ void MergeStatesInLastBlock(const BlockWork& work,
                                                       const PartialResults& partials,
                                                       const LseOutput& output,
                                                       const BlockState& block_state) {
  if (work.num_used == 1) {
    StoreAlone(work, output, block_state);
    return;
  }
  ForEachHead(work.num_heads, 0, 1, [&](int head) {
    HeadState state = block_state(head);
    if (threadIdx.x % kWarpSize == 0) {
      partials.state[work.Part(head, work.split)] = make_float2(state.max, state.sum);
    }
  });
  if (!IsLastSplit(partials.counter + work.counter_index, work.num_used)) return;
  ForEachHead(work.num_heads, 0, 1, [&](int head) {
    const float2* first = partials.state + work.Part(head, 0);
    auto state_of = [&](int split) { return __ldcg(first + split); };
    output.Store(work.OutputRow(head), MergeStates<kMaxSplits>(work.num_used, state_of));
  });
}

// The object of another block of the cluster.
template <typename Object>
__device__ __forceinline__ const Object& InBlock(const Object& object, int block) {
#if __CUDA_ARCH__ >= 900
  return *static_cast<const Object*>(__cluster_map_shared_rank(&object, block));
#else
  return object;
#endif
}

// The splits of a row are one cluster of blocks (compute capability 9.0): they leave their results
// in shared memory, and each merges some of the heads. Saves three trips to the L2 over
// MergeInLastBlock.
template <typename T, int kHeadDim, typename BlockResult>
__device__ __forceinline__ void MergeInCluster(const BlockWork& work,
                                               const AttentionOutput<T>& output,
                                               const BlockResult& block_result) {
#if __CUDA_ARCH__ >= 900
  if (work.num_used == 1) {
    StoreAlone(work, output, block_result);
    return;
  }
  __shared__ LaneDims<kHeadDim> outs[kBlockHeads][kWarpSize];
  __shared__ float2 states[kBlockHeads];
  int lane = threadIdx.x % kWarpSize;
  ForEachHead(work.num_heads, 0, 1, [&](int head) {
    HeadResult<kHeadDim> result = block_result(head);
    outs[head][lane] = result.out;
    if (lane == 0) states[head] = make_float2(result.max, result.sum);
  });
  // Waits for the blocks that have not ended: those of unused splits have.
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  ForEachHead(work.num_heads, work.split, work.num_used, [&](int head) {
    auto state_of = [&](int split) { return InBlock(states[head], split); };
    auto out_of = [&](int split) { return InBlock(outs[head][lane], split); };
    output.Store(work.OutputRow(head),
                 MergeParts<kHeadDim, kMaxClusterSplits>(work.num_used, state_of, out_of));
  });
  // No block ends while others read its shared memory. Nothing is handed on, so nothing that was
  // written needs to be waited for.
  __cluster_barrier_arrive_relaxed();
  __cluster_barrier_wait();
#endif
}

}  // namespace tidal
