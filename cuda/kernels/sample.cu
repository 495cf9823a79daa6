// Sample: from a row of logits to the next token, one cluster of blocks per row, one slice of the
// vocabulary per block.
//
// Every filter keeps a set of the form "keys above a threshold, and of those equal to it the ids up
// to some id" (Kept), found by radix selection: by count for top-k, by probability mass for top-p.
// Masses are integers (probability relative to the best token, times 2^40), so their sums are exact
// and the same in every run. The draw is the Gumbel-max rule of core/philox.h over what is kept.
#include "kernels/sample.h"

#include <algorithm>
#include <climits>

#include "common/block_cluster.cuh"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/radix_select.cuh"
#include "common/token_candidate.cuh"
#include "core/philox.h"

namespace tidal {
namespace {

using Mass = unsigned long long;

// A token's mass is at most 2^40, so rows of up to 2^23 tokens cannot overflow 64 bits; a token
// 2^-40 times as likely as the best counts as nothing.
constexpr float kMassOfBest = 1099511627776.0f;
constexpr int64_t kMinSliceLength = 1024;  // less is not worth another block

struct SampleParams {
  float* logits;            // [B, V]
  const SamplingRow* rows;  // [B]
  const int32_t* seq_lens;  // [B]
  int32_t* history;         // [num_slots, V]
  const TokenBias* biases;  // [num_slots, max_biases]
  const uint32_t* masks;    // [B, num_words]
  float* copies;            // [C, V]
  int32_t* token_ids;       // [B]
  int64_t vocab_size;
  int64_t max_biases;
  int64_t num_words;
};

// What a row's draw goes by, beside its logits.
struct RowInputs {
  SamplingRow sampling;
  const int32_t* history;   // [V]
  const TokenBias* biases;  // [sampling.num_biases]
  const uint32_t* mask;     // [W]

  // Greedy, by the logits as they are.
  __device__ bool is_plain() const {
    return sampling.temperature == 0.0f && sampling.num_biases == 0 && sampling.has_mask == 0 &&
           !UsesHistory(sampling);
  }
};

// The block's slice of a row: of the logits of the ids from first_id on. The filters see it
// penalised, masked and divided by the temperature.
struct Slice {
  float* logits;
  int first_id;
  int length;
};

// Tokens with a key above `key`, and those at it with id <= last_tie.
struct Kept {
  uint32_t key;
  int last_tie;

  __device__ bool Has(uint32_t other, int id) const {
    return other > key || (other == key && id <= last_tie);
  }
};

// Results that the blocks of a cluster tell each other, by rank: each has slots of its own.
struct SampleShared {
  union {
    RadixShared<uint32_t> count;
    RadixShared<Mass> mass;
  };
  Mass warp_results[kMaxWarps];
  Mass best[kMaxClusterSize];
  Mass drawn[kMaxClusterSize];
  Mass sums[kMaxClusterSize];
  Mass ties[kMaxClusterSize];
  int last_tie;
};

// What every step works on.
struct Row {
  BlockCluster cluster;
  SampleShared& shared;
  Slice slice;
  int vocab_size;
  float max;  // of the whole row, after the temperature; finite
};

// What a row with a NaN or +inf gives: above all candidates.
constexpr Candidate kUnusable = ~Candidate{0};

// The best of a thread's tokens, which come by ascending id; none if nothing is above -inf.
struct BestToken {
  float value = -INFINITY;
  int id = -1;

  __device__ void Take(float other, int other_id) {
    if (!(other > value)) return;
    value = other;
    id = other_id;
  }
  __device__ Candidate Packed() const { return id < 0 ? 0 : PackCandidate(value, id); }
};

// The largest value of the cluster, in every thread.
__device__ Candidate ClusterMax(const BlockCluster& cluster, Candidate value,
                                Candidate (&warp_max)[kMaxWarps],
                                Candidate (&slots)[kMaxClusterSize]) {
  int lane = threadIdx.x % kWarpSize;
  ShareWithCluster(cluster, BlockMax(value, warp_max), slots);
  return WarpMax(lane < cluster.size() ? slots[lane] : 0);
}

// The sum over the cluster, in every thread.
__device__ Mass ClusterSum(const BlockCluster& cluster, Mass value, Mass (&warp_sums)[kMaxWarps],
                           Mass (&slots)[kMaxClusterSize]) {
  ShareWithCluster(cluster, BlockScan(value, warp_sums).total, slots);
  Mass sum = 0;
  for (int rank = 0; rank < cluster.size(); ++rank) sum += slots[rank];
  return sum;
}

// Calls visit(value, id) for the thread's logits of the slice.
template <int kBatch = 8, typename Visit>
__device__ __forceinline__ void ForEachLogit(const Slice& slice, Visit&& visit) {
  BlockForEachInBatches<kBatch>(
      slice.length, [&](int i) { return slice.logits[i]; },
      [&](int i, float value) { visit(value, slice.first_id + i); });
}

__device__ __forceinline__ bool IsUsable(float value) {
  return value < INFINITY;  // false for NaN too
}

// The thread's best candidate, or kUnusable.
__device__ Candidate BestOfPlainRow(const Slice& slice) {
  BestToken best;
  bool usable = true;
  ForEachLogit<16>(slice, [&](float value, int id) {
    usable = usable && IsUsable(value);
    best.Take(value, id);
  });
  return usable ? best.Packed() : kUnusable;
}

// Moves to a copy of the slice. Each thread copies what it reads in all passes.
__device__ void CopySlice(Slice& slice, float* copy) {
  BlockForEachInBatches<8>(
      slice.length, [&](int i) { return slice.logits[i]; },
      [&](int i, float value) { copy[i] = value; });
  slice.logits = copy;
}

__device__ void AddBiases(const Slice& slice, const RowInputs& row) {
  __syncthreads();  // a copy is by other threads
  for (int i = threadIdx.x; i < row.sampling.num_biases; i += kRadixThreads) {
    int place = row.biases[i].token_id - slice.first_id;
    if (place < 0 || place >= slice.length) continue;
    slice.logits[place] = __fadd_rn(slice.logits[place], row.biases[i].bias);
  }
  __syncthreads();
}

__device__ __forceinline__ float Penalised(float value, int32_t marks, const SamplingRow& row) {
  if (marks == 0) return value;
  value = value > 0.0f ? __fdiv_rn(value, row.repetition_penalty)
                       : __fmul_rn(value, row.repetition_penalty);
  int32_t count = marks / kGeneratedMark;
  if (count == 0) return value;
  value = __fsub_rn(value, __fmul_rn(row.frequency_penalty, static_cast<float>(count)));
  return __fsub_rn(value, row.presence_penalty);
}

// The thread's best candidate after penalties and mask, or kUnusable; divides by the temperature in
// place, unless that is 0.
__device__ Candidate BestOfScaledRow(const Slice& slice, const RowInputs& row) {
  const SamplingRow& sampling = row.sampling;
  bool penalise = UsesHistory(sampling);
  struct Logit {
    float value;
    int32_t marks;
    bool is_allowed;
  };
  auto load = [&](int i) {
    int id = slice.first_id + i;
    return Logit{slice.logits[i], penalise ? row.history[id] : 0,
                 sampling.has_mask == 0 || (row.mask[id / 32] >> (id % 32) & 1) != 0};
  };
  BestToken best;
  bool usable = true;
  BlockForEachInBatches<4>(slice.length, load, [&](int i, Logit logit) {
    float value = logit.value;
    usable = usable && IsUsable(value);  // before the penalties as well: they could hide a +inf
    value = Penalised(value, logit.marks, sampling);
    usable = usable && IsUsable(value);
    if (!logit.is_allowed) value = -INFINITY;
    best.Take(value, slice.first_id + i);
    if (sampling.temperature > 0.0f) slice.logits[i] = __fdiv_rn(value, sampling.temperature);
  });
  return usable ? best.Packed() : kUnusable;
}

// Applies all that comes before the filters. Returns the row's best candidate before the
// temperature, 0 if the row is unusable: a NaN or +inf, or nothing above -inf.
__device__ Candidate PrepareRow(const BlockCluster& cluster, SampleShared& shared,
                                const Slice& slice, const RowInputs& row) {
  if (row.sampling.num_biases > 0) AddBiases(slice, row);
  Candidate best = row.is_plain() ? BestOfPlainRow(slice) : BestOfScaledRow(slice, row);
  best = ClusterMax(cluster, best, shared.warp_results, shared.best);
  return best == kUnusable ? 0 : best;
}

// The id of the num_ties-th kept token, by ascending id, whose key is `key`.
__device__ int FindLastTie(const Row& row, const Kept& kept, uint32_t key, Mass num_ties) {
  const Slice& slice = row.slice;
  SampleShared& shared = row.shared;
  auto is_tie = [&](float value, int id) {
    uint32_t other = OrderedKey(value);
    return other == key && kept.Has(other, id);
  };
  Mass ties = 0;
  ForEachLogit(slice, [&](float value, int id) { ties += is_tie(value, id); });
  ties = BlockScan(ties, shared.warp_results).total;
  ShareWithCluster(row.cluster, ties, shared.ties);
  Mass found = 0;
  for (int rank = 0; rank < row.cluster.rank(); ++rank) found += shared.ties[rank];
  bool is_here = found < num_ties && num_ties <= found + ties;  // in one block only
  for (int first = 0; is_here && found < num_ties; first += kRadixThreads) {
    int i = first + static_cast<int>(threadIdx.x), id = slice.first_id + i;
    bool tie = i < slice.length && is_tie(slice.logits[i], id);
    auto scan = BlockScan(tie ? Mass{1} : Mass{0}, shared.warp_results);
    if (tie && found + scan.before + 1 == num_ties) {
      for (int rank = 0; rank < row.cluster.size(); ++rank) {
        *row.cluster.Map(&shared.last_tie, rank) = id;
      }
    }
    found += scan.total;
  }
  row.cluster.Sync();
  return shared.last_tie;
}

// Exactly top_k tokens, the lower ids of equals.
__device__ Kept KeepTopK(const Row& row, int top_k) {
  auto target = static_cast<uint32_t>(top_k);
  auto visit = [&](auto&& add) {
    ForEachLogit(row.slice, [&](float value, int) { add(OrderedKey(value), 1u); });
  };
  auto threshold = FindThreshold(row.cluster, row.shared.count, target, visit, visit);
  uint32_t num_ties = target - threshold.above;
  if (num_ties == threshold.at) return {threshold.key, INT_MAX};
  return {threshold.key, FindLastTie(row, {0, INT_MAX}, threshold.key, num_ties)};
}

__device__ __forceinline__ Mass MassOf(const Row& row, float value) {
  return static_cast<Mass>(__fmul_rn(expf(__fsub_rn(value, row.max)), kMassOfBest));
}

__device__ Mass MassOfAll(const Row& row, const Kept& kept) {
  Mass sum = 0;
  ForEachLogit(row.slice, [&](float value, int id) {
    if (kept.Has(OrderedKey(value), id)) sum += MassOf(row, value);
  });
  return ClusterSum(row.cluster, sum, row.shared.warp_results, row.shared.sums);
}

// The smallest prefix of the kept tokens, most likely first, whose mass reaches top_p of the whole.
__device__ Kept KeepTopP(const Row& row, const Kept& kept, float top_p) {
  Mass total = MassOfAll(row, kept);
  double wanted = ceil(static_cast<double>(top_p) * static_cast<double>(total));
  Mass target = max(Mass{1}, min(total, static_cast<Mass>(wanted)));
  // Tokens too unlikely to be needed even if all tokens were as unlikely take no part in the
  // search.
  Mass negligible = (total - target) / static_cast<Mass>(row.vocab_size);
  auto visit = [&](auto&& add) {
    ForEachLogit(row.slice, [&](float value, int id) {
      uint32_t key = OrderedKey(value);
      if (!kept.Has(key, id)) return;
      Mass mass = MassOf(row, value);
      if (mass > negligible || negligible == 0) add(key, mass);
    });
  };
  auto threshold = FindThreshold(row.cluster, row.shared.mass, target, visit, visit);
  Mass tie_mass = MassOf(row, KeyToFloat(threshold.key));  // > 0: the threshold's bin has mass
  Mass num_ties = (target - threshold.above + tie_mass - 1) / tie_mass;
  if (num_ties == threshold.at / tie_mass) {
    return {threshold.key, threshold.key == kept.key ? kept.last_tie : INT_MAX};
  }
  return {threshold.key, FindLastTie(row, kept, threshold.key, num_ties)};
}

// Draws one of the kept tokens that are at least min_p times as likely as the best.
__device__ int Draw(const Row& row, const Kept& kept, const SamplingRow& sampling,
                    uint32_t position) {
  BestToken best;
  ForEachLogit(row.slice, [&](float value, int id) {
    if (!kept.Has(OrderedKey(value), id)) return;
    if (expf(__fsub_rn(value, row.max)) < sampling.min_p) return;
    float noise = GumbelNoise(sampling.seed, position, static_cast<uint32_t>(id));
    best.Take(__fadd_rn(value, noise), id);
  });
  return CandidateId(
      ClusterMax(row.cluster, best.Packed(), row.shared.warp_results, row.shared.drawn));
}

// grid (cluster size, B): a cluster per row.
__global__ void __launch_bounds__(kRadixThreads) SampleKernel(const SampleParams p) {
  __shared__ SampleShared shared;
  WaitForPreviousKernel();
  LetNextKernelStart();
  BlockCluster cluster;
  int64_t b = blockIdx.y;
  bool writes = cluster.rank() == 0 && threadIdx.x == 0;
  int position = p.seq_lens[b];
  if (position <= 0) {
    if (writes) p.token_ids[b] = 0;
    return;
  }
  SamplingRow sampling = p.rows[b];
  int vocab_size = static_cast<int>(p.vocab_size);
  int share = (vocab_size + cluster.size() - 1) / cluster.size(), first = cluster.rank() * share;
  Slice slice = {p.logits + b * p.vocab_size + first, first,
                 max(min(vocab_size - first, share), 0)};
  int32_t* history = p.history + sampling.slot * p.vocab_size;
  RowInputs inputs = {sampling, history, p.biases + sampling.slot * p.max_biases,
                      p.masks + b * p.num_words};
  if (sampling.keeps_logits != 0 && !inputs.is_plain()) {
    CopySlice(slice, p.copies + b * p.vocab_size + first);
  }

  Candidate best = PrepareRow(cluster, shared, slice, inputs);
  int token_id = best == 0 ? -1 : CandidateId(best);
  float scaled = sampling.temperature > 0.0f ? __fdiv_rn(CandidateValue(best), sampling.temperature)
                                             : INFINITY;
  // Greedy, or so cold that the best logit overflows: the limit is greedy.
  if (best != 0 && isfinite(scaled)) {
    Row row = {cluster, shared, slice, vocab_size, scaled};
    Kept kept = {0, INT_MAX};
    if (sampling.top_k > 0 && sampling.top_k < vocab_size) kept = KeepTopK(row, sampling.top_k);
    if (sampling.top_p < 1.0f) kept = KeepTopP(row, kept, sampling.top_p);
    token_id = Draw(row, kept, sampling, static_cast<uint32_t>(position));
  }
  if (writes) {
    p.token_ids[b] = token_id;
    if (token_id >= 0 && UsesHistory(sampling)) history[token_id] += kGeneratedMark;
  }
}

}  // namespace

void LaunchSample(const SampleArgs& args, cudaStream_t stream) {
  int64_t batch_size = args.logits.dim(0);
  if (batch_size == 0) return;
  SampleParams p = {};
  p.logits = args.logits.data<float>();
  p.rows = static_cast<const SamplingRow*>(args.rows.ptr);
  p.seq_lens = args.seq_lens.data<int32_t>();
  p.history = args.history.data<int32_t>();
  p.biases = static_cast<const TokenBias*>(args.biases.ptr);
  p.masks = static_cast<const uint32_t*>(args.masks.ptr);
  p.copies = args.copies.data<float>();
  p.token_ids = args.token_ids.data<int32_t>();
  p.vocab_size = args.logits.dim(1);
  p.max_biases = args.biases.dim(1) / static_cast<int64_t>(sizeof(TokenBias));
  p.num_words = args.masks.dim(1);

  int64_t max_size = std::max<int64_t>(1, p.vocab_size / kMinSliceLength);
  unsigned size = ChooseClusterSize(SampleKernel, kRadixThreads, batch_size, max_size,
                                    [](unsigned) { return int64_t{0}; });
  LaunchShape shape = {.grid = dim3(size, static_cast<unsigned>(batch_size)),
                       .block = dim3(kRadixThreads),
                       .cluster_size = size};
  LaunchOverlapped("sample", SampleKernel, shape, stream, p);
}

}  // namespace tidal
