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
  DispatchAttention("attention_few_queries", args.q, args.kv, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::Type;
    RunAttentionFewQueries<T, head_dim()>(args, scratch, stream);
  });
}

}  // namespace tidal
