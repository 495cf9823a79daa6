// Logprobs: log-probabilities of a row's token and of its most likely ones. It runs outside of
// recorded steps, where somebody asks for them.
#include "kernels/logprobs.h"

#include "common/check.h"
#include "common/token_candidate.cuh"

namespace tidal {
namespace {

struct LogprobsParams {
  const float* logits;       // [B, V]
  const int32_t* rows;       // [R]
  const int32_t* token_ids;  // [R]
  float* logprobs;           // [R, width]
  int32_t* ids;              // [R, width]
  int vocab_size;
  int width;
};

struct LogprobsShared {
  Candidate warp_max[kMaxWarps];
  float warp_sums[kMaxWarps];
  uint32_t warp_counts[kMaxWarps];
};

// The thread's best token behind `last`, which all threads have passed; 0: none above -inf.
__device__ Candidate BestAfter(const float* logits, int vocab_size, Candidate last) {
  Candidate best = 0;
  BlockForEachInBatches<8>(
      vocab_size, [&](int i) { return logits[i]; },
      [&](int i, float value) {
        if (!(value > -INFINITY)) return;
        Candidate candidate = PackCandidate(value, i);
        if (candidate < last) best = max(best, candidate);
      });
  return best;
}

// grid (R); a block of kRadixThreads threads reads one row, each thread the tokens that are its own
// in all passes.
__global__ void __launch_bounds__(kRadixThreads) LogprobsKernel(const LogprobsParams p) {
  __shared__ LogprobsShared shared;
  const float* logits = p.logits + static_cast<int64_t>(p.rows[blockIdx.x]) * p.vocab_size;
  float* logprobs = p.logprobs + static_cast<int64_t>(blockIdx.x) * p.width;
  int32_t* ids = p.ids + static_cast<int64_t>(blockIdx.x) * p.width;
  const int32_t token_id = p.token_ids[blockIdx.x];
  const Candidate token = token_id < 0 ? ~Candidate{0} : PackCandidate(logits[token_id], token_id);

  Candidate own = BestAfter(logits, p.vocab_size, ~Candidate{0});
  Candidate best = BlockMax(own, shared.warp_max);
  const float most = best == 0 ? 0.0f : CandidateValue(best);
  float sum = 0.0f;
  uint32_t before = 0;  // tokens in front of the row's
  BlockForEachInBatches<8>(
      p.vocab_size, [&](int i) { return logits[i]; },
      [&](int i, float value) {
        sum += expf(value - most);
        before += PackCandidate(value, i) > token ? 1 : 0;
      });
  sum = BlockSum(sum, shared.warp_sums);
  before = BlockScan(before, shared.warp_counts).total;
  const float log_sum = logf(sum);
  if (threadIdx.x == 0) {
    logprobs[0] = token_id < 0 ? -INFINITY : (logits[token_id] - most) - log_sum;
    ids[0] = token_id < 0 ? 0 : static_cast<int32_t>(before) + 1;
  }
  for (int place = 1; place < p.width; ++place) {
    if (threadIdx.x == 0) {
      logprobs[place] = best == 0 ? -INFINITY : (CandidateValue(best) - most) - log_sum;
      ids[place] = best == 0 ? -1 : CandidateId(best);
    }
    if (best != 0 && own == best) own = BestAfter(logits, p.vocab_size, best);
    best = BlockMax(own, shared.warp_max);
  }
}

}  // namespace

void LaunchLogprobs(const LogprobsArgs& args, cudaStream_t stream) {
  const int64_t num_rows = args.rows.dim(0);
  if (num_rows == 0) return;
  LogprobsParams p = {};
  p.logits = args.logits.data<float>();
  p.rows = args.rows.data<int32_t>();
  p.token_ids = args.token_ids.data<int32_t>();
  p.logprobs = args.logprobs.data<float>();
  p.ids = args.ids.data<int32_t>();
  p.vocab_size = static_cast<int>(args.logits.dim(1));
  p.width = static_cast<int>(args.logprobs.dim(1));
  LogprobsKernel<<<static_cast<unsigned>(num_rows), kRadixThreads, 0, stream>>>(p);
  TIDAL_LAUNCH_CHECK("logprobs");
}

}  // namespace tidal
