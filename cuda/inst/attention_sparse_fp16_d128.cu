// AttentionSparse for __half, head_dim 128.
#include "kernels/attention_sparse.cuh"

namespace tidal {

template void RunAttentionSparse<__half, __half, 128>(const AttentionSparseArgs&,
                                                      const AttentionScratch&, CacheReads,
                                                      cudaStream_t);

}  // namespace tidal
