// AttentionFewQueries for __nv_bfloat16, head_dim 256, of an fp8 cache.
#include "kernels/attention_few_queries.cuh"

namespace tidal {

template void RunAttentionFewQueries<__nv_bfloat16, Float8, 256>(const AttentionPrefillArgs&,
                                                                 const AttentionScratch&,
                                                                 cudaStream_t);

}  // namespace tidal
