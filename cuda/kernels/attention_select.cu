// AttentionSelect: from run-time dtype and head_dim to the instantiations in cuda/inst.
#include "kernels/attention_select.h"

#include "common/attention_dispatch.h"
#include "kernels/attention_run.h"

namespace tidal {

void LaunchAttentionSelect(const AttentionSelectArgs& args, const AttentionScratch& scratch,
                           CacheReads reads, cudaStream_t stream) {
  const AttentionArgs& attention = args.attention;
  DispatchCachedAttention(
      "attention_select", attention.q, attention.kv, [&](auto type, auto stored, auto head_dim) {
        using T = typename decltype(type)::Type;
        using Stored = typename decltype(stored)::Type;
        RunAttentionFull<T, Stored, head_dim(), ScoreOutput::kStore>(args, scratch, reads, stream);
      });
}

}  // namespace tidal
