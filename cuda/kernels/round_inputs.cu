#include "kernels/round_inputs.h"

#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/float8.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace tidal {
namespace {

constexpr int kThreads = 256;
// From so many inputs on a group has a block of its own, below a warp.
constexpr int64_t kBlockGroup = 1024;
// Neighbours that a thread takes at once; K is a multiple, and so is a group or it is K.
constexpr int kInputs = 8;

struct RoundParams {
  const void* x;  // [T, K]
  void* out;      // [T, K] codes, or numbers of x's type
  float* scales;  // [G, T], or null
  int64_t num_tokens;
  int64_t num_inputs;
  int64_t group_size;
  int64_t num_groups;
  float scale;  // of all; 0: each group's own
};

// The largest over a team of kTeam threads, in each of them.
template <int kTeam>
__device__ __forceinline__ float TeamMax(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  if constexpr (kTeam == kThreads) {
    constexpr int kNumWarps = kThreads / kWarpSize;
    __shared__ float largest[kNumWarps];
    if (threadIdx.x % kWarpSize == 0) largest[threadIdx.x / kWarpSize] = value;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kNumWarps; ++warp) value = fmaxf(value, largest[warp]);
  }
  return value;
}

// A team of kTeam threads, a warp or the block, has one group of one token. Out: Float8 for codes,
// or T for what they stand for. A NaN does not count for the scale, and stays one.
template <typename T, typename Out, int kTeam>
__global__ void __launch_bounds__(kThreads) RoundInputsKernel(const RoundParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  int64_t team = int64_t{blockIdx.x} * (kThreads / kTeam) + threadIdx.x / kTeam;
  if (team >= p.num_tokens * p.num_groups) return;  // all threads of a team
  int64_t token = team / p.num_groups, group = team - token * p.num_groups;
  int64_t begin = group * p.group_size;
  int64_t count = min(p.group_size, p.num_inputs - begin);
  const T* x = static_cast<const T*>(p.x) + token * p.num_inputs + begin;
  Out* out = static_cast<Out*>(p.out) + token * p.num_inputs + begin;
  int64_t first = threadIdx.x % kTeam * kInputs;
  float values[kInputs], scale = p.scale;
  if (scale == 0.0f) {
    float largest = 0.0f;
    for (int64_t i = first; i < count; i += kTeam * kInputs) {
      LoadFloats<kInputs>(x + i, values);
#pragma unroll
      for (float value : values) largest = fmaxf(largest, fabsf(value));
    }
    scale = Float8Scale(TeamMax<kTeam>(largest));
  }
  for (int64_t i = first; i < count; i += kTeam * kInputs) {
    LoadFloats<kInputs>(x + i, values);
#pragma unroll
    for (float& value : values) {
      value = __fdiv_rn(value, scale);
      if constexpr (!std::is_same_v<Out, Float8>) {
        value = __fmul_rn(DecodeFloat8(EncodeFloat8(value)), scale);
      }
    }
    StoreFloats<kInputs>(out + i, values);
  }
  if (p.scales != nullptr && first == 0) p.scales[group * p.num_tokens + token] = scale;
}

template <typename T, typename Out>
void Launch(const RoundParams& params, cudaStream_t stream) {
  int64_t teams = params.num_tokens * params.num_groups;
  bool is_block = params.group_size >= kBlockGroup;
  int64_t blocks = is_block ? teams : CeilDiv(teams, kThreads / kWarpSize);
  LaunchShape shape = {.grid = dim3(static_cast<unsigned>(blocks)), .block = dim3(kThreads)};
  auto kernel =
      is_block ? RoundInputsKernel<T, Out, kThreads> : RoundInputsKernel<T, Out, kWarpSize>;
  LaunchOverlapped("round_inputs", kernel, shape, stream, params);
}

RoundParams MakeParams(const LinearArgs& linear) {
  const Weight& weight = linear.weight;
  return {.x = linear.x.ptr,
          .out = nullptr,
          .scales = nullptr,
          .num_tokens = linear.x.dim(0),
          .num_inputs = linear.x.dim(1),
          .group_size = weight.group_size,
          .num_groups = CeilDiv(linear.x.dim(1), weight.group_size),
          .scale = weight.input_scale};
}

}  // namespace

void LaunchEncodeInputs(const LinearArgs& linear, const CodedInputs& out, cudaStream_t stream) {
  RoundParams params = MakeParams(linear);
  params.out = out.codes;
  params.scales = out.scales;
  DispatchHalf(linear.x.dtype, "encode_inputs",
               [&](auto tag) { Launch<typename decltype(tag)::Type, Float8>(params, stream); });
}

void LaunchRoundInputs(const LinearArgs& linear, const TensorView& out, cudaStream_t stream) {
  RoundParams params = MakeParams(linear);
  params.out = out.ptr;
  DispatchHalf(linear.x.dtype, "round_inputs", [&](auto tag) {
    using T = typename decltype(tag)::Type;
    Launch<T, T>(params, stream);
  });
}

}  // namespace tidal
