// Which products the skinny kernels take, and the way to their instantiations in cuda/inst.
#include "kernels/skinny_linear.h"

#include <algorithm>
#include <type_traits>

#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "common/head_dims.h"
#include "kernels/skinny_layout.h"
#include "kernels/skinny_run.h"

namespace tidal {
namespace {

constexpr uintptr_t kCopyAlignment = 16;  // of cp.async
constexpr int kMaxInputs = 1 << 20;       // keeps byte counts within 32 bits

// Stands for the kernels in cuda/inst, which are compiled for the same devices.
__global__ void ProbeKernel() {}

bool IsAligned(const TensorView& view) {
  return reinterpret_cast<uintptr_t>(view.ptr) % kCopyAlignment == 0;
}

// Whether a weight and as many tokens find room in a block, with as few stages as there may be.
template <typename Shape>
bool FitsBlock(const Weight& weight, int64_t num_tokens, bool normed) {
  return MakeSkinnyLayout<Shape>({.num_inputs = weight.num_inputs(),
                                  .num_tokens = static_cast<int>(num_tokens),
                                  .normed = normed,
                                  .max_stages = Shape::kMinStages,
                                  .scale_sets = ScaleSets(weight)})
             .Total() <= kMaxSharedBytes;
}

// So many tokens, up to kTokens, find room beside the stages of a weight: short rows have so few
// parts that their buffers may leave none, and scales of groups take some.
template <int kTokens, WeightKind kKind>
int64_t TokensThatFit(const Weight& weight) {
  using Shape = SkinnyShape<kTokens, kKind>;
  int64_t num_tokens = kTokens;
  while (num_tokens > 0 && !FitsBlock<Shape>(weight, num_tokens, false)) --num_tokens;
  return num_tokens;
}

constexpr int kSixteen = static_cast<int>(kMaxSkinnyTokens);

// Calls fn(dtype, width, kind) for the narrowest kernel that takes the tokens; kAnyWidth takes any
// number, of plain weights.
template <typename Fn>
void DispatchKernel(const char* op, const LinearArgs& linear, const Fn& fn) {
  const int64_t num_tokens = linear.x.dim(0);
  DispatchHalf(linear.x.dtype, op, [&](auto tag) {
    DispatchKind(linear.weight, [&](auto kind) {
      if (num_tokens <= TokensThatFit<kTileTokens, kind()>(linear.weight)) {
        fn(tag, std::integral_constant<int, kTileTokens>(), kind);
      } else if (kind() != WeightKind::kHalf ||
                 num_tokens <= TokensThatFit<kSixteen, kind()>(linear.weight)) {
        fn(tag, std::integral_constant<int, kSixteen>(), kind);
      } else if constexpr (kind() == WeightKind::kHalf) {
        fn(tag, std::integral_constant<int, kAnyWidth>(), kind);
      }
    });
  });
}

// The most tokens that some kernel of codes takes; it takes fewer, too.
int64_t MostTokensOfCodes(const Weight& weight) {
  int64_t most = 0;
  DispatchKind(weight, [&](auto kind) {
    most = std::max(TokensThatFit<kTileTokens, kind()>(weight),
                    TokensThatFit<kSixteen, kind()>(weight));
  });
  return most;
}

// Whether a weight in codes has what copies of 16 bytes, and groups of whole steps, ask of it.
bool HasGoodCodes(const Weight& weight) {
  if (!weight.is_coded()) return true;
  if (weight.codes == WeightCodes::kMxfp4) return false;
  int64_t group = weight.group_size;
  bool divides = group == weight.num_inputs() || group == 32 || group == 64 || group % kChunk == 0;
  return divides && weight.num_outputs() % (kTileRows / 2) == 0 && IsAligned(weight.scales) &&
         (!weight.zeros || IsAligned(weight.zeros)) && MostTokensOfCodes(weight) >= kTileTokens;
}

}  // namespace

bool HasSharedMemory() {
  int device = 0, bytes = 0;
  TIDAL_CUDA_CHECK(cudaGetDevice(&device));
  TIDAL_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes >= kMaxSharedBytes;
}

bool StreamsWeight(const Weight& weight) {
  int64_t num_outputs = weight.num_outputs(), num_inputs = weight.num_inputs();
  return num_outputs >= 1 && num_outputs <= INT32_MAX - kTileRows && num_inputs >= kStepInputs &&
         num_inputs <= kMaxInputs && num_inputs % kStepInputs == 0 && IsAligned(weight.data) &&
         HasGoodCodes(weight) && RunsHopperCode(ProbeKernel) && HasSharedMemory();
}

bool StreamsLinear(const LinearArgs& args) {
  return args.x.dim(0) >= 1 && IsAligned(args.x) && StreamsWeight(args.weight);
}

int64_t MaxStreamedTokens(const Weight& weight) {
  return weight.is_coded() ? MostTokensOfCodes(weight) : INT64_MAX;
}

bool StreamsLinearRopeAppend(const LinearArgs& linear, const RopeAppendKvArgs& append) {
  return StreamsLinear(linear) && !append.q_norm && !append.k_norm &&
         HasHeadDim(append.q.dim(2), append.q.dtype);  // as LaunchRopeAppendKv takes
}

bool StreamsLinearGateMul(const LinearArgs& linear, const GateMulArgs& gate_mul) {
  return StreamsLinear(linear) && gate_mul.out.dim(1) % (kTileRows / 2) == 0;
}

bool FitsNorm(const RmsNormArgs& norm, const Weight& weight) {
  int64_t num_tokens = norm.x.dim(0);
  if (num_tokens > kMaxNormedTokens) return false;
  constexpr int kCodedWarps = SkinnyShape<kTileTokens, WeightKind::kInt4>::kWarps;
  if (weight.is_coded() && norm.x.dim(1) % (kChunk * kCodedWarps) != 0) return false;
  bool fits = false;
  DispatchKind(weight, [&](auto kind) {
    fits = FitsBlock<SkinnyShape<kTileTokens, kind()>>(weight, num_tokens, true);
  });
  return fits;
}

void LaunchSkinnyLinear(const LinearArgs& args, const SkinnyRun& run) {
  DispatchKernel("linear", args, [&](auto tag, auto width, auto kind) {
    RunSkinnyLinear<typename decltype(tag)::Type, width(), kind()>(args, run);
  });
}

void LaunchLinearRopeAppend(const LinearArgs& linear, const RopeAppendKvArgs& append,
                            const SkinnyRun& run) {
  DispatchKernel("qkv_rope_append", linear, [&](auto tag, auto width, auto kind) {
    RunLinearRopeAppend<typename decltype(tag)::Type, width(), kind()>(linear, append, run);
  });
}

void LaunchLinearGateMul(const LinearArgs& linear, const GateMulArgs& gate_mul,
                         const SkinnyRun& run) {
  DispatchKernel("gate_up_mul", linear, [&](auto tag, auto width, auto kind) {
    RunLinearGateMul<typename decltype(tag)::Type, width(), kind()>(linear, gate_mul, run);
  });
}

}  // namespace tidal
