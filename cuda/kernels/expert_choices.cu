#include "kernels/expert_choices.h"

#include <algorithm>
#include <climits>

#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace tidal {
namespace {

constexpr int kSelectWarps = 8;
constexpr int kOrderThreads = 1024;
constexpr int64_t kLeastOrderThreads = 128;
constexpr int64_t kMaxTokensAtOnce = kOrderThreads / kWarpSize;  // a warp each
constexpr int kAddThreads = 128;
constexpr int kAddVec = 4;
constexpr int64_t kAlignment = 16;

struct SelectParams {
  const float* logits;      // [T, E]
  const float* correction;  // [E], or nullptr
  int32_t* expert_ids;      // [T, k]
  float* weights;           // [T, k]
  int num_tokens;
  int num_experts;
  int chosen;
  RouterScore score;
  bool normalized;
  float scale;
};

// Is added to a token's likelihoods before they are divided by their sum, as transformers does.
constexpr float kLeastSum = 1e-20f;

// Numbers as integers in the same order, NaN below all.
__device__ __forceinline__ unsigned KeyOf(float choice) {
  unsigned bits = __float_as_uint(choice);
  return isnan(choice) ? 0u : bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// By a warp. NaN makes all weights of a token NaN. Up to kHeld experts a lane are held in
// registers; without, read again for each choice.
template <int kHeld>
__device__ void SelectOf(const SelectParams& p, int64_t token, int lane) {
  const float* logits = p.logits + token * p.num_experts;
  float top = -INFINITY;
  bool is_nan = false;
  for (int e = lane; e < p.num_experts; e += kWarpSize) {
    float logit = logits[e];
    is_nan = is_nan || isnan(logit);
    top = fmaxf(top, logit);
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, offset));
  }
  is_nan = __any_sync(kFullWarp, is_nan);
  const bool is_sigmoid = p.score == RouterScore::kSigmoid;
  auto likely_of = [&](int e) {  // not yet divided by total
    return is_sigmoid ? 1.0f / (1.0f + expf(-logits[e])) : expf(logits[e] - top);
  };
  float likely[kHeld > 0 ? kHeld : 1];
  float total = 0.0f;
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      int e = lane + i * kWarpSize;
      likely[i] = e < p.num_experts ? likely_of(e) : 0.0f;
      total += likely[i];
    }
  } else {
    for (int e = lane; e < p.num_experts; e += kWarpSize) total += likely_of(e);
  }
  total = is_sigmoid ? 1.0f : WarpSum(total);
  auto key_of = [&](float likely, int e) {
    return KeyOf(p.correction ? likely / total + p.correction[e] : likely);
  };
  unsigned held[kHeld > 0 ? kHeld : 1];
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      int e = lane + i * kWarpSize;
      held[i] = e < p.num_experts ? key_of(likely[i], e) : 0u;
    }
  }

  unsigned last = UINT_MAX;
  int last_id = -1;
  int32_t* ids = p.expert_ids + token * p.chosen;
  float* weights = p.weights + token * p.chosen;
  for (int j = 0; j < p.chosen; ++j) {
    unsigned best = 0;
    int best_id = INT_MAX;
    // The best behind the last one; of equals the lower id.
    auto take = [&](unsigned key, int e) {
      bool is_behind = key < last || (key == last && e > last_id);
      if (!is_behind || (best_id != INT_MAX && key <= best)) return;
      best = key;
      best_id = e;
    };
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (lane + i * kWarpSize < p.num_experts) take(held[i], lane + i * kWarpSize);
      }
    } else {
      for (int e = lane; e < p.num_experts; e += kWarpSize) take(key_of(likely_of(e), e), e);
    }
    unsigned key = __reduce_max_sync(kFullWarp, best);
    int id = __reduce_min_sync(kFullWarp, best == key ? best_id : INT_MAX);
    last = key;
    last_id = id;
    if (lane == j % kWarpSize) ids[j] = id;  // which weighs it below
  }
  float sum = 0.0f;
  for (int j = lane; j < p.chosen; j += kWarpSize) sum += weights[j] = likely_of(ids[j]);
  sum = WarpSum(sum);
  float share = is_nan || isnan(total) ? NAN : p.scale / (p.normalized ? sum + kLeastSum : total);
  for (int j = lane; j < p.chosen; j += kWarpSize) weights[j] *= share;
}

__device__ void SelectOf(const SelectParams& p, int64_t token, int lane) {
  constexpr int kFew = 4, kSome = 16;
  if (p.num_experts <= kFew * kWarpSize) {
    SelectOf<kFew>(p, token, lane);
  } else if (p.num_experts <= kSome * kWarpSize) {
    SelectOf<kSome>(p, token, lane);
  } else {
    SelectOf<0>(p, token, lane);
  }
}

// grid (ceil(T / kSelectWarps)); a warp has a token.
__global__ void SelectExpertsKernel(const SelectParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  int64_t token = static_cast<int64_t>(blockIdx.x) * kSelectWarps + threadIdx.x / kWarpSize;
  if (token < p.num_tokens) SelectOf(p, token, static_cast<int>(threadIdx.x % kWarpSize));
}

// By one block. counts [E], shared.
__device__ void OrderChoices(const int32_t* expert_ids, int num_choices, int num_experts,
                             const ExpertOrder& out, int* counts) {
  __shared__ unsigned long long warp_sums[kMaxWarps];
  int thread = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);
  for (int e = thread; e < num_experts; e += num_threads) counts[e] = 0;
  __syncthreads();
  for (int i = thread; i < num_choices; i += num_threads) atomicAdd(counts + expert_ids[i], 1);
  __syncthreads();
  // Choices before an expert's in the lower half of a number, tiles in the upper.
  unsigned long long before = 0;
  for (int first = 0; first < num_experts; first += num_threads) {
    int e = first + thread;
    int count = e < num_experts ? counts[e] : 0;
    int tiles = (count + out.tile_choices - 1) / out.tile_choices;
    unsigned long long value =
        static_cast<unsigned long long>(tiles) << 32 | static_cast<unsigned>(count);
    ScanResult<unsigned long long> scan = BlockScan(value, warp_sums);
    unsigned long long mine = before + scan.before;
    int place = static_cast<int>(mine & 0xffffffffu);
    ExpertTile* tile = out.tiles + (mine >> 32);
    for (int i = 0; i < tiles; ++i) {
      int taken = i * out.tile_choices;
      tile[i] = {e, place + taken, min(count - taken, out.tile_choices)};
    }
    if (e < num_experts) counts[e] = place;
    before += scan.total;
  }
  if (thread == 0) *out.num_tiles = static_cast<int>(before >> 32);
  __syncthreads();
  for (int i = thread; i < num_choices; i += num_threads) {
    out.order[atomicAdd(counts + expert_ids[i], 1)] = i;
  }
}

// grid (1); shared: E integers.
__global__ void __launch_bounds__(kOrderThreads)
    OrderChoicesKernel(const int32_t* expert_ids, int num_choices, int num_experts,
                       const ExpertOrder out) {
  extern __shared__ int counts[];
  WaitForPreviousKernel();
  LetNextKernelStart();
  OrderChoices(expert_ids, num_choices, num_experts, out, counts);
}

// Likewise; a warp has a token.
__global__ void __launch_bounds__(kOrderThreads)
    SelectAndOrderKernel(const SelectParams p, const ExpertOrder out) {
  extern __shared__ int counts[];
  WaitForPreviousKernel();
  LetNextKernelStart();
  int token = static_cast<int>(threadIdx.x / kWarpSize);
  if (token < p.num_tokens) SelectOf(p, token, static_cast<int>(threadIdx.x % kWarpSize));
  __syncthreads();
  OrderChoices(p.expert_ids, p.num_tokens * p.chosen, p.num_experts, out, counts);
}

// grid (T, ceil(H / (kAddThreads * kVec))).
template <typename T, int kVec>
__global__ void AddExpertsKernel(const T* x, const float* weights, float* out, int chosen,
                                 int64_t hidden_size) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  int64_t column = (static_cast<int64_t>(blockIdx.y) * kAddThreads + threadIdx.x) * kVec;
  if (column >= hidden_size) return;
  int64_t token = blockIdx.x;
  float* target = out + token * hidden_size + column;
  float sums[kVec];
  LoadFloats<kVec>(target, sums);
#pragma unroll 4
  for (int j = 0; j < chosen; ++j) {
    float values[kVec];
    LoadFloats<kVec>(x + (token * chosen + j) * hidden_size + column, values);
    float weight = weights[token * chosen + j];
#pragma unroll
    for (int i = 0; i < kVec; ++i) sums[i] += weight * values[i];
  }
  StoreFloats<kVec>(target, sums);
}

SelectParams MakeParams(const SelectExpertsArgs& args) {
  return {.logits = args.logits.data<float>(),
          .correction = args.correction ? args.correction.data<float>() : nullptr,
          .expert_ids = args.expert_ids.data<int32_t>(),
          .weights = args.weights.data<float>(),
          .num_tokens = static_cast<int>(args.logits.dim(0)),
          .num_experts = static_cast<int>(args.logits.dim(1)),
          .chosen = static_cast<int>(args.expert_ids.dim(1)),
          .score = args.score,
          .normalized = args.normalized,
          .scale = args.scale};
}

LaunchShape OneBlock(int64_t num_threads, int64_t num_experts) {
  return {.grid = 1,
          .block = static_cast<unsigned>(num_threads),
          .shared_bytes = static_cast<size_t>(num_experts) * sizeof(int)};
}

int64_t Aligned(int64_t bytes) {
  return CeilDiv(bytes, kAlignment) * kAlignment;
}

}  // namespace

int64_t ExpertOrder::OrderBytes(int64_t num_choices) {
  // As many tiles as choices, if tiles are short or experts many.
  return kAlignment + Aligned(num_choices * int64_t{sizeof(int32_t)}) +
         num_choices * int64_t{sizeof(ExpertTile)};
}

ExpertOrder ExpertOrder::In(void* memory, int64_t num_choices, int64_t num_experts,
                            int64_t tile_choices) {
  // Each expert that somebody has begins a tile, and full ones come on top.
  const int64_t tiles =
      std::min(num_choices, std::min(num_choices, num_experts) + num_choices / tile_choices);
  auto* bytes = static_cast<char*>(memory);
  auto* order = reinterpret_cast<int32_t*>(bytes + kAlignment);
  auto* behind = bytes + kAlignment + Aligned(num_choices * int64_t{sizeof(int32_t)});
  return {.order = order,
          .tiles = reinterpret_cast<ExpertTile*>(behind),
          .num_tiles = reinterpret_cast<int32_t*>(bytes),
          .max_tiles = static_cast<int32_t>(tiles),
          .tile_choices = static_cast<int32_t>(tile_choices)};
}

void LaunchSelectExperts(const SelectExpertsArgs& args, cudaStream_t stream) {
  if (args.logits.dim(0) == 0) return;
  LaunchShape shape = {.grid = static_cast<unsigned>(CeilDiv(args.logits.dim(0), kSelectWarps)),
                       .block = kSelectWarps * kWarpSize};
  LaunchOverlapped("select_experts", SelectExpertsKernel, shape, stream, MakeParams(args));
}

void LaunchOrderChoices(const TensorView& expert_ids, int64_t num_experts, const ExpertOrder& order,
                        cudaStream_t stream) {
  LaunchOverlapped("expert_linear", OrderChoicesKernel, OneBlock(kOrderThreads, num_experts),
                   stream, expert_ids.data<int32_t>(), static_cast<int>(expert_ids.numel()),
                   static_cast<int>(num_experts), order);
}

bool OrdersAtOnce(const SelectExpertsArgs& args) {
  return args.logits.dim(0) <= kMaxTokensAtOnce;
}

void LaunchSelectAndOrder(const SelectExpertsArgs& args, const ExpertOrder& order,
                          cudaStream_t stream) {
  const int64_t num_threads = std::max(kLeastOrderThreads, args.logits.dim(0) * kWarpSize);
  LaunchOverlapped("select_experts", SelectAndOrderKernel,
                   OneBlock(num_threads, args.logits.dim(1)), stream, MakeParams(args), order);
}

void LaunchAddExperts(const AddExpertsArgs& args, cudaStream_t stream) {
  const int64_t num_tokens = args.out.dim(0), hidden_size = args.out.dim(1);
  if (num_tokens == 0) return;
  const bool vectorize = IsVectorizable(args.x, hidden_size, kAddVec) &&
                         IsVectorizable(args.out, hidden_size, kAddVec);
  const int64_t columns = kAddThreads * (vectorize ? kAddVec : 1);
  LaunchShape shape = {.grid = dim3(static_cast<unsigned>(num_tokens),
                                    static_cast<unsigned>(CeilDiv(hidden_size, columns))),
                       .block = kAddThreads};
  DispatchHalf(args.x.dtype, "add_experts", [&](auto tag) {
    using T = typename decltype(tag)::Type;
    auto kernel = vectorize ? AddExpertsKernel<T, kAddVec> : AddExpertsKernel<T, 1>;
    LaunchOverlapped("add_experts", kernel, shape, stream, static_cast<const T*>(args.x.ptr),
                     args.weights.data<float>(), args.out.data<float>(),
                     static_cast<int>(args.weights.dim(1)), hidden_size);
  });
}

}  // namespace tidal
