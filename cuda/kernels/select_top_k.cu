// SelectTopK: from the scores of a select layer to the sets of positions of the sparse layers.
//
// 1. PoolScores: one order-preserving 32-bit key per set and position (granularity kHead skips it:
// the
//    scores themselves are ordered).
// 2. SelectSets: finds the key of the last position that still fits (radix_select.cuh) and writes
// all
//    better positions, and the first of the equal ones, in ascending order. A cluster of blocks per
//    set, which keeps the set's keys in its shared memory; where that is too small or the device
//    has no clusters (before compute capability 9.0), one block per set, which reads them once per
//    pass.
#include "kernels/select_top_k.h"

#include <cooperative_groups.h>

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
constexpr int kMaxClusterSize = 8;  // the largest that every device with clusters has
// Keys of one block in its dynamic shared memory: 227 KiB a block, less some 20 KiB of histograms.
constexpr int64_t kMaxClusterKeys = 51200;

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

// Keys of the positions before some point: above the threshold, and at it.
struct Counts {
  int above;
  int equal;
};

// Writes, ascending, the positions in [begin, end) whose key is above the threshold and those at it
// that are among the first `num_ties` of the set; `before` counts the set's positions before
// `begin`. Stops when `count` are written in all.
template <typename LoadKey>
__device__ void WriteSelected(int begin, int end, Counts before, uint32_t threshold, int num_ties,
                              int count, uint32_t (&warp_sums)[kMaxWarps], int32_t* out,
                              LoadKey&& load_key) {
  int num_above = before.above, num_equal = before.equal;  // the same in every thread
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

// The part of a set that is chosen by score: `count` of the more than `count` positions [begin,
// end); nothing if count is 0.
struct Contest {
  int begin;
  int end;
  int count;
};

// Writes what is chosen whatever the scores are: num_selected, all of a short row, sinks and
// recents; in one block per set (`writes`). Returns what is left to be decided by score.
__device__ Contest WriteForced(const SelectParams& p, int row, bool is_first_set, bool writes,
                               int32_t* token_idx) {
  int num_tokens = p.seq_lens[row];
  if (writes && is_first_set && threadIdx.x == 0) {
    p.num_selected[row] = min(num_tokens, p.token_budget);
  }
  if (num_tokens <= p.token_budget) {
    if (writes) SelectAll(token_idx, num_tokens, p.token_budget);
    return {0, 0, 0};
  }
  int begin = p.sink_tokens, end = num_tokens - p.recent_tokens;
  int count = p.token_budget - p.sink_tokens - p.recent_tokens;
  if (writes) {
    for (int i = threadIdx.x; i < p.sink_tokens; i += kRadixThreads) token_idx[i] = i;
    for (int i = threadIdx.x; i < p.recent_tokens; i += kRadixThreads) {
      token_idx[p.sink_tokens + count + i] = end + i;
    }
  }
  return {begin, end, count};
}

template <bool kRawScores>
__device__ __forceinline__ uint32_t LoadKey(const SelectParams& p, int64_t set, int64_t t) {
  return kRawScores ? OrderedKey(p.scores[set * p.max_len + t]) : p.keys[set * p.max_len + t];
}

// grid (num_sets, B); one block of kRadixThreads per set.
template <bool kRawScores>
__global__ void __launch_bounds__(kRadixThreads) SelectSetsKernel(const SelectParams p) {
  __shared__ RadixShared<uint32_t> shared;
  int64_t set = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  int32_t* token_idx = p.token_idx + set * p.token_budget;
  auto [begin, end, count] =
      WriteForced(p, static_cast<int>(blockIdx.y), blockIdx.x == 0, true, token_idx);
  if (count == 0) return;

  auto load_key = [&](int64_t t) { return LoadKey<kRawScores>(p, set, t); };
  auto target = static_cast<uint32_t>(count);
  RadixThreshold<uint32_t> threshold = FindThreshold(shared, target, [&](auto&& add) {
#pragma unroll 4
    for (int t = begin + static_cast<int>(threadIdx.x); t < end; t += kRadixThreads) {
      add(load_key(t), 1u);
    }
  });
  int num_ties = count - static_cast<int>(threshold.above);
  WriteSelected(begin, end, {0, 0}, threshold.key, num_ties, count, shared.warp_sums,
                token_idx + p.sink_tokens, load_key);
}

struct ClusterShared {
  RadixShared<uint32_t> radix;           // .low: the histogram over the whole cluster
  uint32_t histogram[kRadixBins];        // of this block's keys
  Counts slice_counts[kMaxClusterSize];  // of every block's keys
};

// grid (num_sets * cluster size, B), clusters of 1 to kMaxClusterSize blocks of kRadixThreads: one
// cluster per set, one slice of its positions per block. Dynamic shared memory: the slice's keys,
// read once. Histograms are merged, and counts exchanged, through distributed shared memory.
template <bool kRawScores>
__global__ void __launch_bounds__(kRadixThreads) SelectSetsClusterKernel(const SelectParams p) {
#if __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  extern __shared__ uint32_t slice_keys[];
  __shared__ ClusterShared shared;
  cg::cluster_group cluster = cg::this_cluster();
  int rank = static_cast<int>(cluster.block_rank());
  int size = static_cast<int>(cluster.num_blocks());
  int num_sets = static_cast<int>(gridDim.x) / size;
  int set_in_row = static_cast<int>(blockIdx.x) / size;
  int64_t set = static_cast<int64_t>(blockIdx.y) * num_sets + set_in_row;
  int32_t* token_idx = p.token_idx + set * p.token_budget;
  auto [begin, end, count] =
      WriteForced(p, static_cast<int>(blockIdx.y), set_in_row == 0, rank == 0, token_idx);
  if (count == 0) return;  // the same in all blocks of the cluster

  int slice = (end - begin + size - 1) / size;
  int first = min(end, begin + rank * slice), last = min(end, first + slice);
#pragma unroll 4
  for (int i = threadIdx.x; i < last - first; i += kRadixThreads) {
    slice_keys[i] = LoadKey<kRawScores>(p, set, first + i);
  }

  auto target = static_cast<uint32_t>(count);
  RadixThreshold<uint32_t> threshold = {0, 0, 0};
  uint32_t prefix_mask = 0;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    uint32_t digit_mask = pass == 2 ? 0x3ffu : 0x7ffu;
    for (int bin = threadIdx.x; bin < kRadixBins; bin += kRadixThreads) shared.histogram[bin] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < last - first; i += kRadixThreads) {
      uint32_t key = slice_keys[i];
      if ((key & prefix_mask) == threshold.key) {
        atomicAdd(&shared.histogram[(key >> shift) & digit_mask], 1u);
      }
    }
    cluster.sync();  // all histograms are complete; the last pass's merged one has been read
    int bins_per_block = kRadixBins / size;
    for (int i = threadIdx.x; i < bins_per_block; i += kRadixThreads) {
      int bin = rank * bins_per_block + i;
      uint32_t sum = 0;
      for (int other = 0; other < size; ++other) {
        sum += cluster.map_shared_rank(shared.histogram, other)[bin];
      }
      for (int other = 0; other < size; ++other) {
        cluster.map_shared_rank(shared.radix.low, other)[bin] = sum;
      }
    }
    cluster.sync();  // the merged histogram is everywhere, and the blocks' own may be cleared
    RadixThreshold<uint32_t> bin = FindRadixBin(shared.radix, threshold.above, target);
    threshold = {threshold.key | bin.key << shift, bin.above, bin.at};
    prefix_mask |= digit_mask << shift;
  }

  int above = 0, equal = 0;
  for (int i = threadIdx.x; i < last - first; i += kRadixThreads) {
    above += slice_keys[i] > threshold.key;
    equal += slice_keys[i] == threshold.key;
  }
  int num_above =
      static_cast<int>(BlockScan(static_cast<uint32_t>(above), shared.radix.warp_sums).total);
  int num_equal =
      static_cast<int>(BlockScan(static_cast<uint32_t>(equal), shared.radix.warp_sums).total);
  if (static_cast<int>(threadIdx.x) < size) {
    *cluster.map_shared_rank(&shared.slice_counts[rank], static_cast<int>(threadIdx.x)) = {
        num_above, num_equal};
  }
  cluster.sync();  // no block touches another's shared memory after this
  Counts before = {0, 0};
  for (int other = 0; other < rank; ++other) {
    before.above += shared.slice_counts[other].above;
    before.equal += shared.slice_counts[other].equal;
  }
  int num_ties = count - static_cast<int>(threshold.above);
  WriteSelected(first, last, before, threshold.key, num_ties, count, shared.radix.warp_sums,
                token_idx + p.sink_tokens, [&](int64_t t) { return slice_keys[t - first]; });
#endif
}

// Blocks per set: as many as keep the device's processors busy and as the keys need; 0 if even the
// largest cluster cannot hold them.
int64_t ClusterSize(int64_t max_len, int64_t num_sets_in_all) {
  int device = 0, num_sms = 0;
  TIDAL_CUDA_CHECK(cudaGetDevice(&device));
  TIDAL_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  int64_t size = kMaxClusterSize;
  if (CeilDiv(max_len, size) > kMaxClusterKeys) return 0;
  while (size > 1 && num_sets_in_all * size > num_sms &&
         CeilDiv(max_len, size / 2) <= kMaxClusterKeys) {
    size /= 2;
  }
  return size;
}

template <bool kRawScores>
void LaunchSelectSets(const SelectParams& p, unsigned num_sets, unsigned num_rows,
                      cudaStream_t stream) {
  auto kernel = SelectSetsClusterKernel<kRawScores>;
  cudaFuncAttributes compiled = {};
  TIDAL_CUDA_CHECK(cudaFuncGetAttributes(&compiled, kernel));
  int64_t size = compiled.binaryVersion < 90 || compiled.ptxVersion < 90
                     ? 0
                     : ClusterSize(p.max_len, int64_t{num_sets} * num_rows);
  if (size == 0) {
    SelectSetsKernel<kRawScores><<<dim3(num_sets, num_rows), kRadixThreads, 0, stream>>>(p);
    TIDAL_LAUNCH_CHECK("select_top_k");
    return;
  }
  int64_t slice = CeilDiv(p.max_len, size);
  auto shared_bytes = static_cast<size_t>(slice) * sizeof(uint32_t);
  TIDAL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(num_sets * static_cast<unsigned>(size), num_rows);
  launch.blockDim = dim3(kRadixThreads);
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = stream;
  launch.attrs = &cluster;
  launch.numAttrs = 1;
  TIDAL_CUDA_CHECK(cudaLaunchKernelEx(&launch, kernel, p));
  TIDAL_LAUNCH_CHECK("select_top_k (cluster)");
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
    LaunchSelectSets<true>(p, sets, rows, stream);
    return;
  }
  int64_t chunks = std::min(CeilDiv(p.max_len, kPoolThreads),
                            std::max<int64_t>(1, kMaxPoolBlocks / (num_sets * batch_size)));
  dim3 pool_grid(static_cast<unsigned>(std::max<int64_t>(1, chunks)), sets, rows);
  auto pool = args.pooling == Pooling::kSum ? PoolScoresKernel<Pooling::kSum>
                                            : PoolScoresKernel<Pooling::kMax>;
  pool<<<pool_grid, kPoolThreads, 0, stream>>>(p);
  TIDAL_LAUNCH_CHECK("select_top_k (pool)");
  LaunchSelectSets<false>(p, sets, rows, stream);
}

}  // namespace tidal
