// ScoreKeys: from run-time dtype and head_dim to the instantiations in cuda/inst.
#include "kernels/score_keys.h"

#include "common/attention_dispatch.h"
#include "kernels/attention_run.h"

namespace tidal {

void LaunchScoreKeys(const ScoreKeysArgs& args, const AttentionScratch& scratch, CacheReads reads,
                     cudaStream_t stream) {
  DispatchAttention("score_keys", args.q, args.kv, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::Type;
    RunScoreKeys<T, head_dim()>(args, scratch, reads, stream);
  });
}

}  // namespace tidal
