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

}  // namespace

bool FitsSkinnyLinear(const LinearArgs& args) {
  int64_t num_tokens = args.x.dim(0), num_outputs = args.weight.dim(0);
  int64_t num_inputs = args.weight.dim(1);
  return num_tokens >= 1 && num_tokens <= kMaxSkinnyTokens && num_outputs >= 1 &&
         num_outputs <= INT32_MAX - kTileRows && num_inputs >= kStepInputs &&
         num_inputs <= kMaxInputs && num_inputs % kStepInputs == 0 && IsAligned(args.weight) &&
         IsAligned(args.x) && RunsHopperCode(ProbeKernel) && DeviceHasRoom();
}

bool FitsLinearRopeAppend(const LinearArgs& linear, const RopeAppendKvArgs& append) {
  int64_t head_dim = append.q.dim(2);  // as LaunchRopeAppendKv takes
  return FitsSkinnyLinear(linear) && !append.q_norm && !append.k_norm &&
         (head_dim == 64 || head_dim == 128);
}

bool FitsLinearSiluMul(const LinearArgs& linear, const SiluMulArgs& silu_mul) {
  return FitsSkinnyLinear(linear) && silu_mul.out.dim(1) % (kTileRows / 2) == 0;
}

bool FitsNorm(const RmsNormArgs& norm) {
  int64_t num_tokens = norm.x.dim(0), num_inputs = norm.x.dim(1);
  constexpr int64_t kEqualShares = int64_t{kChunk} * kMultiplyWarps;
  if (num_tokens > kMaxNormedTokens || num_inputs % kEqualShares != 0) return false;
  SkinnyLayout layout =
      MakeSkinnyLayout(num_inputs, static_cast<int>(num_tokens), true, kMinStages);
  // The products with the norm's weights are rounded before they are scaled: float16 could
  // overflow.
  return layout.Total() <= kMaxSharedBytes && norm.out.dtype == DType::kBFloat16 &&
         IsAligned(norm.x) && IsAligned(norm.weight);
}

void LaunchSkinnyLinear(const LinearArgs& args, const RmsNormArgs* norm, int num_sms,
                        cudaStream_t stream) {
  DispatchHalf(args.weight.dtype, "linear", [&](auto tag) {
    RunSkinnyLinear<typename decltype(tag)::Type>(args, norm, num_sms, stream);
  });
}

void LaunchLinearRopeAppend(const LinearArgs& linear, const RmsNormArgs* norm,
                            const RopeAppendKvArgs& append, int num_sms, cudaStream_t stream) {
  DispatchHalf(linear.weight.dtype, "qkv_rope_append", [&](auto tag) {
    RunLinearRopeAppend<typename decltype(tag)::Type>(linear, norm, append, num_sms, stream);
  });
}

void LaunchLinearSiluMul(const LinearArgs& linear, const RmsNormArgs* norm,
                         const SiluMulArgs& silu_mul, int num_sms, cudaStream_t stream) {
  DispatchHalf(linear.weight.dtype, "gate_up_silu_mul", [&](auto tag) {
    RunLinearSiluMul<typename decltype(tag)::Type>(linear, norm, silu_mul, num_sms, stream);
  });
}

}  // namespace tidal
