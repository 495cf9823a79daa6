// AttentionSparse: from run-time dtype and head_dim to the instantiations in cuda/inst.
#include "kernels/attention_sparse.h"

#include "common/attention_dispatch.h"
#include "kernels/attention_run.h"

namespace tidal {

void LaunchAttentionSparse(const AttentionSparseArgs& args, const AttentionScratch& scratch,
                           CacheReads reads, cudaStream_t stream) {
  const AttentionArgs& attention = args.attention;
  DispatchCachedAttention("attention_sparse", attention.q, attention.kv,
                          [&](auto type, auto stored, auto head_dim) {
                            using T = typename decltype(type)::Type;
                            using Stored = typename decltype(stored)::Type;
                            RunAttentionSparse<T, Stored, head_dim()>(args, scratch, reads, stream);
                          });
}

}  // namespace tidal
