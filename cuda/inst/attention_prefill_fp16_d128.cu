// AttentionPrefill for __half, head_dim 128.
#include "kernels/attention_prefill.cuh"

namespace tidal {

template void RunAttentionPrefill<__half, 128>(const AttentionPrefillArgs&, cudaStream_t);

}  // namespace tidal
