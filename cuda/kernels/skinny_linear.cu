// Which products the skinny kernels take, and the way to their instantiations in cuda/inst.
#include "kernels/skinny_linear.h"

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

bool IsAligned(const TensorView& view) {
  return reinterpret_cast<uintptr_t>(view.ptr) % kCopyAlignment == 0;
}

bool FitsWeight(const LinearArgs& args) {
  int64_t num_tokens = args.x.dim(0), num_outputs = args.weight.dim(0);
  int64_t num_inputs = args.weight.dim(1);
  return num_tokens >= 1 && num_tokens <= kMaxSkinnyTokens && num_outputs >= 1 &&
         num_outputs <= INT32_MAX - kTileRows && num_inputs >= kStepInputs &&
         num_inputs <= kMaxInputs && num_inputs % kStepInputs == 0 && IsAligned(args.weight) &&
         RunsHopperCode(ProbeKernel);
}

bool FitsNormed(const RmsNormArgs& norm, const LinearArgs& linear) {
  if (!FitsWeight(linear) || !IsAligned(norm.x) || !IsAligned(norm.weight)) return false;
  int num_tokens = static_cast<int>(linear.x.dim(0));
  return MakeSkinnyLayout(linear.weight.dim(1), num_tokens, true).Total() <= kMaxSharedBytes;
}

}  // namespace

bool FitsSkinnyLinear(const LinearArgs& args) {
  return FitsWeight(args) && IsAligned(args.x);
}

bool FitsNormLinear(const NormLinearArgs& args) {
  return FitsNormed(args.norm, args.linear);
}

bool FitsQkvRopeAppend(const QkvRopeAppendArgs& args) {
  return FitsNormed(args.norm, args.linear) && !args.append.q_norm && !args.append.k_norm &&
         args.append.q.dim(2) % kTileRows == 0;
}

bool FitsGateUpSiluMul(const GateUpSiluMulArgs& args) {
  return FitsNormed(args.norm, args.linear) && args.silu_mul.out.dim(1) % 8 == 0;
}

void LaunchSkinnyLinear(const LinearArgs& args, int num_sms, cudaStream_t stream) {
  DispatchHalf(args.weight.dtype, "linear", [&](auto tag) {
    RunSkinnyLinear<typename decltype(tag)::Type>(args, nullptr, num_sms, stream);
  });
}

void LaunchNormLinear(const NormLinearArgs& args, int num_sms, cudaStream_t stream) {
  DispatchHalf(args.linear.weight.dtype, "norm_linear", [&](auto tag) {
    RunSkinnyLinear<typename decltype(tag)::Type>(args.linear, &args.norm, num_sms, stream);
  });
}

void LaunchQkvRopeAppend(const QkvRopeAppendArgs& args, int num_sms, cudaStream_t stream) {
  DispatchHalf(args.linear.weight.dtype, "qkv_rope_append", [&](auto tag) {
    RunQkvRopeAppend<typename decltype(tag)::Type>(args, num_sms, stream);
  });
}

void LaunchGateUpSiluMul(const GateUpSiluMulArgs& args, int num_sms, cudaStream_t stream) {
  DispatchHalf(args.linear.weight.dtype, "gate_up_silu_mul", [&](auto tag) {
    RunGateUpSiluMul<typename decltype(tag)::Type>(args, num_sms, stream);
  });
}

}  // namespace tidal
