// AttentionSparse for __nv_bfloat16, head_dim 256, of an fp8 cache.
#include "kernels/attention_sparse.cuh"

namespace tidal {

template void RunAttentionSparse<__nv_bfloat16, Float8, 256>(const AttentionSparseArgs&,
                                                             const AttentionScratch&, CacheReads,
                                                             cudaStream_t);

}  // namespace tidal
