// AttentionPrefill for __nv_bfloat16, head_dim 256.
#include "kernels/attention_prefill.cuh"

namespace tidal {

template void RunAttentionPrefill<__nv_bfloat16, 256>(const AttentionPrefillArgs&, cudaStream_t);

}  // namespace tidal
