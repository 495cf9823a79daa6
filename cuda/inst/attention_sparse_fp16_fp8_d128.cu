// AttentionSparse for __half, head_dim 128, of an fp8 cache.
#include "kernels/attention_sparse.cuh"

namespace tidal {

template void RunAttentionSparse<__half, Float8, 128>(const AttentionSparseArgs&,
                                                      const AttentionScratch&, CacheReads,
                                                      cudaStream_t);

}  // namespace tidal
