// AttentionPrefill for __half, head_dim 64.
#include "kernels/attention_prefill.cuh"

namespace tidal {

template void RunAttentionPrefill<__half, 64>(const AttentionPrefillArgs&, cudaStream_t);

}  // namespace tidal
