// AttentionSparse for __half, head_dim 64.
#include "kernels/attention_sparse.cuh"

namespace tidal {

template void RunAttentionSparse<__half, __half, 64>(const AttentionSparseArgs&,
                                                     const AttentionScratch&, CacheReads,
                                                     cudaStream_t);

}  // namespace tidal
