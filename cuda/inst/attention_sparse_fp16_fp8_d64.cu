// AttentionSparse for __half, head_dim 64, of an fp8 cache.
#include "kernels/attention_sparse.cuh"

namespace tidal {

template void RunAttentionSparse<__half, Float8, 64>(const AttentionSparseArgs&,
                                                     const AttentionScratch&, CacheReads,
                                                     cudaStream_t);

}  // namespace tidal
