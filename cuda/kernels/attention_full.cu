// AttentionFull: from run-time dtype and head_dim to the instantiations in cuda/inst.
#include "kernels/attention_full.h"

#include "common/attention_dispatch.h"
#include "kernels/attention_run.h"

namespace tidal {

void LaunchAttentionFull(const AttentionArgs& args, const AttentionScratch& scratch,
                         CacheReads reads, cudaStream_t stream) {
  DispatchCachedAttention(
      "attention_full", args.q, args.kv, [&](auto type, auto stored, auto head_dim) {
        using T = typename decltype(type)::Type;
        using Stored = typename decltype(stored)::Type;
        RunAttentionFull<T, Stored, head_dim(), ScoreOutput::kNone>(
            {.attention = args, .scores = {}, .lse = {}}, scratch, reads, stream);
      });
}

}  // namespace tidal
