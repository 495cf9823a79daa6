// AttentionFewQueries for __half, head_dim 128, of an fp8 cache.
#include "kernels/attention_few_queries.cuh"

namespace tidal {

template void RunAttentionFewQueries<__half, Float8, 128>(const AttentionPrefillArgs&,
                                                          const AttentionScratch&, cudaStream_t);

}  // namespace tidal
