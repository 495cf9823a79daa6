// Sample: from a row of logits to the next token, one block per row.
//
// Every filter keeps a set of the form "keys above a threshold, and of those equal to it the ids up
// to some id" (Kept), found by radix selection: by count for top-k, by probability mass for top-p.
// Masses are integers (probability relative to the best token, times 2^40), so their sums are exact
// and the same in every run. The draw is the Gumbel-max rule of core/philox.h over what is kept.
#include "kernels/sample.h"

#include <climits>

#include "common/check.h"
#include "common/radix_select.cuh"
#include "core/philox.h"

namespace tidal {
namespace {

using Mass = unsigned long long;

// A token's mass is at most 2^40, so rows of up to 2^23 tokens cannot overflow 64 bits; a token
// 2^-40 times as likely as the best counts as nothing.
constexpr float kMassOfBest = 1099511627776.0f;

struct SampleParams {
  float* logits;            // [B, V]
  const SamplingRow* rows;  // [B]
  const int32_t* seq_lens;  // [B]
  uint8_t* seen;            // [num_slots, V]
  int32_t* token_ids;       // [B]
  int64_t vocab_size;
};

// The row as the filters see it: penalised, divided by the temperature.
struct Row {
  const float* logits;
  int vocab_size;
  float max;  // finite
};

// Tokens with a key above `key`, and those at it with id <= last_tie.
struct Kept {
  uint32_t key;
  int last_tie;

  __device__ bool Has(uint32_t other, int id) const {
    return other > key || (other == key && id <= last_tie);
  }
};

union SampleShared {
  RadixShared<uint32_t> count;
  RadixShared<Mass> mass;
};

// Orders by value, then by lower id, as one integer; NaN lowest.
__device__ __forceinline__ Mass Candidate(float value, int id) {
  return static_cast<Mass>(OrderedKey(value)) << 32 | ~static_cast<uint32_t>(id);
}
__device__ __forceinline__ int CandidateId(Mass candidate) {
  return static_cast<int>(~static_cast<uint32_t>(candidate));
}
__device__ __forceinline__ float CandidateValue(Mass candidate) {
  return KeyToFloat(static_cast<uint32_t>(candidate >> 32));
}

// The largest candidate of the block, in every thread.
__device__ Mass BlockBest(Mass best, Mass (&warp_best)[kMaxWarps]) {
  int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    best = max(best, __shfl_xor_sync(kFullWarp, best, offset));
  }
  __syncthreads();
  if (lane == 0) warp_best[warp] = best;
  __syncthreads();
  best = warp_best[lane];
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    best = max(best, __shfl_xor_sync(kFullWarp, best, offset));
  }
  return best;
}

// Applies penalty and temperature in place. Returns the best candidate before the temperature, 0 if
// the row is unusable: a NaN or +inf, or nothing above -inf.
__device__ Mass PrepareRow(float* logits, const uint8_t* seen, int vocab_size,
                           const SamplingRow& row, Mass (&warp_best)[kMaxWarps]) {
  Mass best = 0;
  bool unusable = false;
  for (int id = threadIdx.x; id < vocab_size; id += kRadixThreads) {
    float value = logits[id];
    // Before the penalty as well: it could hide a +inf.
    unusable |= isnan(value) || value == INFINITY;
    if (row.repetition_penalty != 1.0f && seen[id] != 0) {
      value = value > 0.0f ? __fdiv_rn(value, row.repetition_penalty)
                           : __fmul_rn(value, row.repetition_penalty);
      unusable |= value == INFINITY;
    }
    best = max(best, Candidate(value, id));
    logits[id] = row.temperature > 0.0f ? __fdiv_rn(value, row.temperature) : value;
  }
  best = BlockBest(best, warp_best);
  if (__syncthreads_or(unusable) || CandidateValue(best) == -INFINITY) return 0;
  return best;
}

// The id of the num_ties-th kept token, by ascending id, whose key is `key`.
__device__ int FindLastTie(const Row& row, const Kept& kept, uint32_t key, uint32_t num_ties,
                           uint32_t (&warp_sums)[kMaxWarps], int* last_tie) {
  uint32_t found = 0;
  for (int first = 0; first < row.vocab_size && found < num_ties; first += kRadixThreads) {
    int id = first + static_cast<int>(threadIdx.x);
    uint32_t other = id < row.vocab_size ? OrderedKey(row.logits[id]) : 0;
    bool tie = id < row.vocab_size && other == key && kept.Has(other, id);
    ScanResult<uint32_t> scan = BlockScan(tie ? 1u : 0u, warp_sums);
    if (tie && found + scan.before + 1 == num_ties) *last_tie = id;
    found += scan.total;
  }
  __syncthreads();
  return *last_tie;
}

// Exactly top_k tokens, the lower ids of equals.
__device__ Kept KeepTopK(const Row& row, int top_k, RadixShared<uint32_t>& shared, int* last_tie) {
  Kept all = {0, INT_MAX};
  auto target = static_cast<uint32_t>(top_k);
  RadixThreshold<uint32_t> threshold = FindThreshold(shared, target, [&](auto&& add) {
    for (int id = threadIdx.x; id < row.vocab_size; id += kRadixThreads) {
      add(OrderedKey(row.logits[id]), 1u);
    }
  });
  uint32_t num_ties = target - threshold.above;
  if (num_ties == threshold.at) return {threshold.key, INT_MAX};
  return {threshold.key,
          FindLastTie(row, all, threshold.key, num_ties, shared.warp_sums, last_tie)};
}

__device__ __forceinline__ Mass MassOf(const Row& row, float value) {
  return static_cast<Mass>(__fmul_rn(expf(__fsub_rn(value, row.max)), kMassOfBest));
}

__device__ Mass BlockMass(const Row& row, const Kept& kept, Mass (&warp_sums)[kMaxWarps]) {
  Mass sum = 0;
  for (int id = threadIdx.x; id < row.vocab_size; id += kRadixThreads) {
    float value = row.logits[id];
    if (kept.Has(OrderedKey(value), id)) sum += MassOf(row, value);
  }
  return BlockScan(sum, warp_sums).total;
}

// The smallest prefix of the kept tokens, most likely first, whose mass reaches top_p of the whole.
__device__ Kept KeepTopP(const Row& row, const Kept& kept, float top_p, SampleShared& shared,
                         int* last_tie) {
  Mass total = BlockMass(row, kept, shared.mass.warp_sums);
  double wanted = ceil(static_cast<double>(top_p) * static_cast<double>(total));
  Mass target = max(Mass{1}, min(total, static_cast<Mass>(wanted)));
  // Tokens too unlikely to be needed even if all tokens were as unlikely take no part in the
  // search.
  Mass negligible = (total - target) / static_cast<Mass>(row.vocab_size);
  RadixThreshold<Mass> threshold = FindThreshold(shared.mass, target, [&](auto&& add) {
    for (int id = threadIdx.x; id < row.vocab_size; id += kRadixThreads) {
      float value = row.logits[id];
      uint32_t key = OrderedKey(value);
      if (!kept.Has(key, id)) continue;
      Mass mass = MassOf(row, value);
      if (mass > negligible || negligible == 0) add(key, mass);
    }
  });
  Mass tie_mass = MassOf(row, KeyToFloat(threshold.key));  // > 0: the threshold's bin has mass
  Mass num_ties = (target - threshold.above + tie_mass - 1) / tie_mass;
  if (num_ties == threshold.at / tie_mass) {
    return {threshold.key, threshold.key == kept.key ? kept.last_tie : INT_MAX};
  }
  return {threshold.key, FindLastTie(row, kept, threshold.key, static_cast<uint32_t>(num_ties),
                                     shared.count.warp_sums, last_tie)};
}

// Draws one of the kept tokens that are at least min_p times as likely as the best.
__device__ int Draw(const Row& row, const Kept& kept, const SamplingRow& sampling,
                    uint32_t position, Mass (&warp_best)[kMaxWarps]) {
  Mass best = 0;
  for (int id = threadIdx.x; id < row.vocab_size; id += kRadixThreads) {
    float value = row.logits[id];
    if (!kept.Has(OrderedKey(value), id)) continue;
    if (expf(__fsub_rn(value, row.max)) < sampling.min_p) continue;
    float noise = GumbelNoise(sampling.seed, position, static_cast<uint32_t>(id));
    best = max(best, Candidate(__fadd_rn(value, noise), id));
  }
  return CandidateId(BlockBest(best, warp_best));
}

// grid (B); one block of kRadixThreads per row.
__global__ void __launch_bounds__(kRadixThreads) SampleKernel(const SampleParams p) {
  __shared__ SampleShared shared;
  __shared__ Mass warp_best[kMaxWarps];
  __shared__ int last_tie;
  int position = p.seq_lens[blockIdx.x];
  if (position <= 0) {
    if (threadIdx.x == 0) p.token_ids[blockIdx.x] = 0;
    return;
  }
  SamplingRow sampling = p.rows[blockIdx.x];
  float* logits = p.logits + blockIdx.x * p.vocab_size;
  uint8_t* seen = p.seen + sampling.slot * p.vocab_size;
  int vocab_size = static_cast<int>(p.vocab_size);

  Mass best = PrepareRow(logits, seen, vocab_size, sampling, warp_best);
  int token_id = best == 0 ? -1 : CandidateId(best);
  float scaled = sampling.temperature > 0.0f ? __fdiv_rn(CandidateValue(best), sampling.temperature)
                                             : INFINITY;
  // Greedy, or so cold that the best logit overflows: the limit is greedy.
  if (best != 0 && isfinite(scaled)) {
    Row row = {logits, vocab_size, scaled};
    Kept kept = {0, INT_MAX};
    if (sampling.top_k > 0 && sampling.top_k < vocab_size) {
      kept = KeepTopK(row, sampling.top_k, shared.count, &last_tie);
    }
    if (sampling.top_p < 1.0f) kept = KeepTopP(row, kept, sampling.top_p, shared, &last_tie);
    token_id = Draw(row, kept, sampling, static_cast<uint32_t>(position), warp_best);
  }
  if (threadIdx.x == 0) {
    p.token_ids[blockIdx.x] = token_id;
    if (token_id >= 0) seen[token_id] = 1;
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
  p.seen = args.seen.data<uint8_t>();
  p.token_ids = args.token_ids.data<int32_t>();
  p.vocab_size = args.logits.dim(1);
  SampleKernel<<<static_cast<unsigned>(batch_size), kRadixThreads, 0, stream>>>(p);
  TIDAL_LAUNCH_CHECK("sample");
}

}  // namespace tidal
