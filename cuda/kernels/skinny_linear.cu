// Which products the skinny kernels take, and the way to their instantiations in cuda/inst.
#include "kernels/skinny_linear.h"

#include <type_traits>

#include "common/dependent_launch.cuh"
#include "common/dispatch.h"
#include "kernels/skinny_layout.h"
#include "kernels/skinny_run.h"

namespace tidal {
namespace {

constexpr uintptr_t kCopyAlignment = 16;  // of cp.async
constexpr int kMaxInputs = 1 << 20;       // keeps byte counts within 32 bits

// Stands for the kernels in cuda/inst, which are compiled for the same devices.
__global__ void ProbeKernel() {}

// Other chips of the kinds that run this code have less shared memory.
bool DeviceHasRoom() {
  int device = 0, bytes = 0;
  TIDAL_CUDA_CHECK(cudaGetDevice(&device));
  TIDAL_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes >= kMaxSharedBytes;
}

bool IsAligned(const TensorView& view) {
  return reinterpret_cast<uintptr_t>(view.ptr) % kCopyAlignment == 0;
}

// Short rows have so few parts that their buffers leave no room for the stages of 16 tokens.
bool FitsSixteen(int64_t num_inputs) {
  return MakeSkinnyLayout<kMaxSkinnyTokens>(num_inputs, kMaxSkinnyTokens, false, kMaxStages)
             .Total() <= kMaxSharedBytes;
}

// Calls fn(dtype, width) for the narrowest kernel that takes the tokens; kAnyWidth takes any
// number.
template <typename Fn>
void DispatchKernel(const char* op, const LinearArgs& linear, const Fn& fn) {
  const int64_t num_tokens = linear.x.dim(0);
  DispatchHalf(linear.weight.dtype, op, [&](auto tag) {
    if (num_tokens <= kTileTokens) {
      fn(tag, std::integral_constant<int, kTileTokens>());
    } else if (num_tokens <= kMaxSkinnyTokens && FitsSixteen(linear.weight.dim(1))) {
      fn(tag, std::integral_constant<int, static_cast<int>(kMaxSkinnyTokens)>());
    } else {
      fn(tag, std::integral_constant<int, kAnyWidth>());
    }
  });
}

}  // namespace

bool StreamsLinear(const LinearArgs& args) {
  int64_t num_outputs = args.weight.dim(0), num_inputs = args.weight.dim(1);
  return args.x.dim(0) >= 1 && num_outputs >= 1 && num_outputs <= INT32_MAX - kTileRows &&
         num_inputs >= kStepInputs && num_inputs <= kMaxInputs && num_inputs % kStepInputs == 0 &&
         IsAligned(args.weight) && IsAligned(args.x) && RunsHopperCode(ProbeKernel) &&
         DeviceHasRoom();
}

bool StreamsLinearRopeAppend(const LinearArgs& linear, const RopeAppendKvArgs& append) {
  int64_t head_dim = append.q.dim(2);  // as LaunchRopeAppendKv takes
  return StreamsLinear(linear) && !append.q_norm && !append.k_norm &&
         (head_dim == 64 || head_dim == 128);
}

bool StreamsLinearSiluMul(const LinearArgs& linear, const SiluMulArgs& silu_mul) {
  return StreamsLinear(linear) && silu_mul.out.dim(1) % (kTileRows / 2) == 0;
}

bool FitsNorm(const RmsNormArgs& norm) {
  int64_t num_tokens = norm.x.dim(0);
  if (num_tokens > kMaxNormedTokens) return false;
  SkinnyLayout layout = MakeSkinnyLayout<kTileTokens>(norm.x.dim(1), static_cast<int>(num_tokens),
                                                      true, SkinnyShape<kTileTokens>::kMinStages);
  return layout.Total() <= kMaxSharedBytes;
}

void LaunchSkinnyLinear(const LinearArgs& args, const SkinnyRun& run) {
  DispatchKernel("linear", args, [&](auto tag, auto width) {
    RunSkinnyLinear<typename decltype(tag)::Type, width()>(args, run);
  });
}

void LaunchLinearRopeAppend(const LinearArgs& linear, const RopeAppendKvArgs& append,
                            const SkinnyRun& run) {
  DispatchKernel("qkv_rope_append", linear, [&](auto tag, auto width) {
    RunLinearRopeAppend<typename decltype(tag)::Type, width()>(linear, append, run);
  });
}

void LaunchLinearSiluMul(const LinearArgs& linear, const SiluMulArgs& silu_mul,
                         const SkinnyRun& run) {
  DispatchKernel("gate_up_silu_mul", linear, [&](auto tag, auto width) {
    RunLinearSiluMul<typename decltype(tag)::Type, width()>(linear, silu_mul, run);
  });
}

}  // namespace tidal
