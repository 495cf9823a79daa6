// SelectTopK: from the scores of a select layer to the sets of positions of the sparse layers.
//
// 1. PoolScores: one order-preserving 32-bit key per set and position (granularity kHead skips it:
// the
//    scores themselves are ordered).
// 2. SelectSets: one block per set finds the key of the last position that still fits
// (radix_select.cuh)
//    and writes all better positions, and the first of the equal ones, in ascending order.
#include "kernels/select_top_k.h"

#include <algorithm>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/radix_select.cuh"

namespace tidal {
namespace {

constexpr int kPoolThreads = 256;
constexpr int64_t kMaxPoolBlocks = 4096;  // 2-3 waves on 132 SMs; the kernel strides over the rest
constexpr int kItems = 4;                 // positions of one thread in a tile of the ordered pass
constexpr int kTile = kRadixThreads * kItems;
static_assert(kTile < 1 << 16, "two tile counts share one 32-bit scan");

struct SelectParams {
  const float* scores;      // [B, num_q_heads, max_len]
  const float* lse;         // [B, num_q_heads]
  const int32_t* seq_lens;  // [B]
  uint32_t* keys;           // [B, num_sets, max_len]; null for kHead
  int32_t* token_idx;       // [B, num_sets, token_budget]
  int32_t* num_selected;    // [B]
  int64_t max_len;
  int heads_per_set;
  int token_budget;
  int sink_tokens;
  int recent_tokens;
};

// grid (chunks of positions, num_sets, B); each thread pools one position over the heads of its
// set, in ascending order. Only rows that must choose, and only positions that compete, are pooled.
template <Pooling kPooling>
__global__ void __launch_bounds__(kPoolThreads) PoolScoresKernel(const SelectParams p) {
  int num_tokens = p.seq_lens[blockIdx.z];
  if (num_tokens <= p.token_budget) return;
  int64_t set = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  const float* scores = p.scores + set * p.heads_per_set * p.max_len;
  const float* lse = p.lse + set * p.heads_per_set;
  uint32_t* keys = p.keys + set * p.max_len;
  int end = num_tokens - p.recent_tokens;
  int stride = static_cast<int>(gridDim.x) * kPoolThreads;
  for (int64_t t = p.sink_tokens + static_cast<int64_t>(blockIdx.x) * kPoolThreads + threadIdx.x;
       t < end; t += stride) {
    float pooled = kPooling == Pooling::kSum ? 0.0f : -INFINITY;
    for (int head = 0; head < p.heads_per_set; ++head) {
      float probability = expf(__fsub_rn(scores[head * p.max_len + t], lse[head]));
      // fmaxf drops a NaN: for the maximum it ranks below every score.
      pooled =
          kPooling == Pooling::kSum ? __fadd_rn(pooled, probability) : fmaxf(pooled, probability);
    }
    keys[t] = OrderedKey(pooled);
  }
}

// All of a short row: 0, 1, .., n - 1, then -1.
__device__ void SelectAll(int32_t* token_idx, int num_tokens, int token_budget) {
  for (int i = threadIdx.x; i < token_budget; i += kRadixThreads) {
    token_idx[i] = i < num_tokens ? i : -1;
  }
}

// Writes, ascending, the positions in [begin, end) whose key is above the threshold and the first
// `num_ties` of those at it; `count` in all.
template <typename LoadKey>
__device__ void WriteSelected(int begin, int end, uint32_t threshold, int num_ties, int count,
                              uint32_t (&warp_sums)[kMaxWarps], int32_t* out, LoadKey&& load_key) {
  int num_above = 0, num_equal = 0;  // seen in the tiles so far; the same in every thread
  for (int64_t tile = begin; tile < end; tile += kTile) {
    int64_t first = tile + threadIdx.x * kItems;
    uint32_t keys[kItems], counts = 0;  // counts: above << 16 | equal
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      bool inside = first + i < end;
      keys[i] = inside ? load_key(first + i) : 0;
      if (inside && keys[i] > threshold) counts += 1u << 16;
      if (inside && keys[i] == threshold) counts += 1u;
    }
    ScanResult<uint32_t> scan = BlockScan(counts, warp_sums);
    int above = num_above + static_cast<int>(scan.before >> 16);
    int equal = num_equal + static_cast<int>(scan.before & 0xffffu);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (first + i >= end) break;
      if (keys[i] > threshold) {
        out[above++ + min(equal, num_ties)] = static_cast<int32_t>(first + i);
      } else if (keys[i] == threshold) {
        if (equal < num_ties) out[above + equal] = static_cast<int32_t>(first + i);
        ++equal;
      }
    }
    num_above += static_cast<int>(scan.total >> 16);
    num_equal += static_cast<int>(scan.total & 0xffffu);
    if (num_above + min(num_equal, num_ties) == count) return;
  }
}

// grid (num_sets, B); one block of kRadixThreads per set.
template <bool kRawScores>
__global__ void __launch_bounds__(kRadixThreads) SelectSetsKernel(const SelectParams p) {
  __shared__ RadixShared<uint32_t> shared;
  int num_tokens = p.seq_lens[blockIdx.y];
  int64_t set = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  int32_t* token_idx = p.token_idx + set * p.token_budget;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    p.num_selected[blockIdx.y] = min(num_tokens, p.token_budget);
  }
  if (num_tokens <= p.token_budget) {
    SelectAll(token_idx, num_tokens, p.token_budget);
    return;
  }

  // From here on the positions that compete, [begin, end), outnumber the places left.
  int begin = p.sink_tokens, end = num_tokens - p.recent_tokens;
  int count = p.token_budget - p.sink_tokens - p.recent_tokens;
  for (int i = threadIdx.x; i < p.sink_tokens; i += kRadixThreads) token_idx[i] = i;
  for (int i = threadIdx.x; i < p.recent_tokens; i += kRadixThreads) {
    token_idx[p.sink_tokens + count + i] = end + i;
  }
  if (count == 0) return;

  auto load_key = [&](int64_t t) {
    return kRawScores ? OrderedKey(p.scores[set * p.max_len + t]) : p.keys[set * p.max_len + t];
  };
  auto target = static_cast<uint32_t>(count);
  RadixThreshold<uint32_t> threshold = FindThreshold(shared, target, [&](auto&& add) {
#pragma unroll 4
    for (int t = begin + static_cast<int>(threadIdx.x); t < end; t += kRadixThreads) {
      add(load_key(t), 1u);
    }
  });
  int num_ties = count - static_cast<int>(threshold.above);
  WriteSelected(begin, end, threshold.key, num_ties, count, shared.warp_sums,
                token_idx + p.sink_tokens, load_key);
}

}  // namespace

int64_t SelectTopKScratchBytes(int64_t batch_size, int64_t num_sets, int64_t max_len,
                               Granularity granularity) {
  if (granularity == Granularity::kHead) return 0;
  return batch_size * num_sets * max_len * static_cast<int64_t>(sizeof(uint32_t));
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
  p.heads_per_set = static_cast<int>(args.scores.dim(1) / num_sets);
  p.token_budget = static_cast<int>(args.token_idx.dim(2));
  p.sink_tokens = static_cast<int>(args.sink_tokens);
  p.recent_tokens = static_cast<int>(args.recent_tokens);

  auto sets = static_cast<unsigned>(num_sets), rows = static_cast<unsigned>(batch_size);
  if (args.granularity == Granularity::kHead) {
    SelectSetsKernel<true><<<dim3(sets, rows), kRadixThreads, 0, stream>>>(p);
    TIDAL_LAUNCH_CHECK("select_top_k");
    return;
  }
  int64_t chunks = std::min(CeilDiv(p.max_len, kPoolThreads),
                            std::max<int64_t>(1, kMaxPoolBlocks / (num_sets * batch_size)));
  dim3 pool_grid(static_cast<unsigned>(std::max<int64_t>(1, chunks)), sets, rows);
  auto pool = args.pooling == Pooling::kSum ? PoolScoresKernel<Pooling::kSum>
                                            : PoolScoresKernel<Pooling::kMax>;
  pool<<<pool_grid, kPoolThreads, 0, stream>>>(p);
  TIDAL_LAUNCH_CHECK("select_top_k (pool)");
  SelectSetsKernel<false><<<dim3(sets, rows), kRadixThreads, 0, stream>>>(p);
  TIDAL_LAUNCH_CHECK("select_top_k");
}

}  // namespace tidal
