// PoolScores: a thread pools a few adjacent positions over the heads of their set.
#include "kernels/pool_scores.h"

#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/radix_select.cuh"
#include "kernels/pooled_scores.cuh"

namespace tidal {
namespace {

constexpr int kThreads = 128;
constexpr int kVec = 4;  // positions of a thread, in one load a head

struct PoolParams {
  const void* scores;       // [B, num_q_heads, max_len] float32 or float16
  const float* lse;         // [B, num_q_heads]
  const int32_t* seq_lens;  // [B]
  uint32_t* keys;           // [B, num_sets, max_len]
  int64_t max_len;
  int heads_per_set;
};

// grid (ceil(max_len / (kThreads * kWidth)), num_sets, B).
template <typename Score, KeySource kSource, int kWidth>
__global__ void __launch_bounds__(kThreads) PoolScoresKernel(const PoolParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  int64_t set = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  int64_t position = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (position >= min(static_cast<int64_t>(p.seq_lens[blockIdx.z]), p.max_len)) return;
  SetScores<Score> scores = {
      .scores = static_cast<const Score*>(p.scores) + set * p.heads_per_set * p.max_len,
      .lse = p.lse + set * p.heads_per_set,
      .max_len = p.max_len,
      .num_heads = p.heads_per_set};
  Scores<kWidth> pooled = PoolHeads<kSource, kWidth>(scores, position);
  Vec<uint32_t, kWidth> made;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) made.elements[i] = OrderedKey(pooled.elements[i]);
  *reinterpret_cast<Vec<uint32_t, kWidth>*>(p.keys + set * p.max_len + position) = made;
}

template <typename Score, KeySource kSource>
void Launch(const PoolParams& p, const SelectTopKArgs& args, cudaStream_t stream) {
  bool vectorized = IsVectorizable(args.scores, p.max_len, kVec);
  auto kernel =
      vectorized ? PoolScoresKernel<Score, kSource, kVec> : PoolScoresKernel<Score, kSource, 1>;
  int64_t positions = kThreads * (vectorized ? kVec : 1);
  LaunchShape shape = {.grid = dim3(static_cast<unsigned>(CeilDiv(p.max_len, positions)),
                                    static_cast<unsigned>(args.token_idx.dim(1)),
                                    static_cast<unsigned>(args.token_idx.dim(0))),
                       .block = kThreads};
  LaunchOverlapped("pool_scores", kernel, shape, stream, p);
}

template <typename Score>
void LaunchAs(const PoolParams& p, const SelectTopKArgs& args, cudaStream_t stream) {
  if (args.granularity == Granularity::kHead) {
    Launch<Score, KeySource::kRawScores>(p, args, stream);
  } else if (args.pooling == Pooling::kSum) {
    Launch<Score, KeySource::kSumOfWeights>(p, args, stream);
  } else {
    Launch<Score, KeySource::kMaxOfWeights>(p, args, stream);
  }
}

}  // namespace

void LaunchPoolScores(const SelectTopKArgs& args, uint32_t* keys, cudaStream_t stream) {
  PoolParams p = {.scores = args.scores.ptr,
                  .lse = args.lse.data<float>(),
                  .seq_lens = args.seq_lens.data<int32_t>(),
                  .keys = keys,
                  .max_len = args.scores.dim(2),
                  .heads_per_set = static_cast<int>(args.scores.dim(1) / args.token_idx.dim(1))};
  if (args.scores.dtype == DType::kFloat16) {
    LaunchAs<__half>(p, args, stream);
  } else {
    LaunchAs<float>(p, args, stream);
  }
}

}  // namespace tidal
