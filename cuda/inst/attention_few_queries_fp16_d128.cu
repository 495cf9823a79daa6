// AttentionFewQueries for __half, head_dim 128.
#include "kernels/attention_few_queries.cuh"

namespace tidal {

template void RunAttentionFewQueries<__half, __half, 128>(const AttentionPrefillArgs&,
                                                          const AttentionScratch&, cudaStream_t);

}  // namespace tidal
