// AttentionSparse: from run-time dtype and head_dim to the instantiations in cuda/inst.
#include "kernels/attention_sparse.h"

#include "common/attention_dispatch.h"
#include "kernels/attention_run.h"

namespace tidal {

void LaunchAttentionSparse(const AttentionSparseArgs& args, const AttentionScratch& scratch,
                           CacheReads reads, cudaStream_t stream) {
  const AttentionArgs& attention = args.attention;
  DispatchAttention("attention_sparse", attention.q, attention.kv, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::Type;
    RunAttentionSparse<T, head_dim()>(args, scratch, reads, stream);
  });
}

}  // namespace tidal
