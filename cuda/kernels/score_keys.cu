// ScoreKeys: from run-time dtype and head_dim to the instantiations in cuda/inst.
#include "kernels/score_keys.h"

#include "common/attention_dispatch.h"
#include "kernels/attention_run.h"

namespace tidal {

void LaunchScoreKeys(const ScoreKeysArgs& args, const AttentionScratch& scratch, CacheReads reads,
                     cudaStream_t stream) {
  DispatchCachedAttention("score_keys", args.q, args.kv,
                          [&](auto type, auto stored, auto head_dim) {
                            using T = typename decltype(type)::Type;
                            using Stored = typename decltype(stored)::Type;
                            RunScoreKeys<T, Stored, head_dim()>(args, scratch, reads, stream);
                          });
}

}  // namespace tidal
