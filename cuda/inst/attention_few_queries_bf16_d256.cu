// AttentionFewQueries for __nv_bfloat16, head_dim 256.
#include "kernels/attention_few_queries.cuh"

namespace tidal {

template void RunAttentionFewQueries<__nv_bfloat16, __nv_bfloat16, 256>(const AttentionPrefillArgs&,
                                                                        const AttentionScratch&,
                                                                        cudaStream_t);

}  // namespace tidal
