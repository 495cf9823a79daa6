// AttentionPrefill for __nv_bfloat16, head_dim 64.
#include "kernels/attention_prefill.cuh"

namespace tidal {

template void RunAttentionPrefill<__nv_bfloat16, 64>(const AttentionPrefillArgs&, cudaStream_t);

}  // namespace tidal
