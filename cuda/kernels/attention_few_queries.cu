// AttentionFewQueries: from run-time dtype and head_dim to the instantiations in cuda/inst.
#include "kernels/attention_few_queries.h"

#include "common/attention_dispatch.h"
#include "common/launch_config.h"
#include "kernels/attention_run.h"

namespace tidal {

bool HasFewQueries(const AttentionPrefillArgs& args) {
  return args.max_q_len <= kMaxFewQueries;
}

void LaunchAttentionFewQueries(const AttentionPrefillArgs& args, const AttentionScratch& scratch,
                               cudaStream_t stream) {
  DispatchCachedAttention("attention_few_queries", args.q, args.kv,
                          [&](auto type, auto stored, auto head_dim) {
                            using T = typename decltype(type)::Type;
                            using Stored = typename decltype(stored)::Type;
                            RunAttentionFewQueries<T, Stored, head_dim()>(args, scratch, stream);
                          });
}

}  // namespace tidal
