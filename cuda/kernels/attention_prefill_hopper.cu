// Which calls of AttentionPrefill the kernel for compute capability 9.0 takes, and the way to its
// instantiations in cuda/inst.
#include "kernels/attention_prefill_hopper.h"

#include <cstdint>

#include "common/attention_dispatch.h"
#include "common/check.h"
#include "kernels/attention_run.h"

namespace tidal {
namespace {

int Attribute(int device, cudaDeviceAttr name) {
  int value = 0;
  TIDAL_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// As tensor maps want it.
bool IsAligned(const TensorView& view) {
  return reinterpret_cast<uintptr_t>(view.ptr) % 16 == 0;
}

}  // namespace

// Code for sm_90a runs on 9.0 and on nothing newer.
bool HasAttentionPrefillHopper(int device) {
  return Attribute(device, cudaDevAttrComputeCapabilityMajor) == 9 &&
         Attribute(device, cudaDevAttrComputeCapabilityMinor) == 0;
}

bool FitsAttentionPrefillHopper(const AttentionPrefillArgs& args) {
  int device = 0;
  TIDAL_CUDA_CHECK(cudaGetDevice(&device));
  return HasAttentionPrefillHopper(device) && IsPromptHeadDim(args.q.dim(2)) && IsAligned(args.q) &&
         IsAligned(args.out) && IsAligned(args.kv.k_pages) && IsAligned(args.kv.v_pages);
}

void LaunchAttentionPrefillHopper(const AttentionPrefillArgs& args, const AttentionScratch& scratch,
                                  cudaStream_t stream) {
  DispatchAttention("attention_prefill", args.q, args.kv, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::Type;
    if constexpr (IsPromptHeadDim(head_dim())) {
      RunAttentionPrefillHopper<T, head_dim()>(args, scratch, stream);
    }
  });
}

}  // namespace tidal
