// AttentionPrefill: from run-time dtype and head_dim to the instantiations in cuda/inst.
#include "kernels/attention_prefill.h"

#include "common/attention_dispatch.h"
#include "kernels/attention_prefill_hopper.h"
#include "kernels/attention_run.h"

namespace tidal {

void LaunchAttentionPrefill(const AttentionPrefillArgs& args, const AttentionScratch& scratch,
                            cudaStream_t stream) {
  if (FitsAttentionPrefillHopper(args)) {
    LaunchAttentionPrefillHopper(args, scratch, stream);
    return;
  }
  DispatchAttention("attention_prefill", args.q, args.kv, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::Type;
    RunAttentionPrefill<T, head_dim()>(args, stream);
  });
}

}  // namespace tidal
