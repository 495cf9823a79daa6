// AttentionPrefill on compute capability 9.0 for __nv_bfloat16, head_dim 64.
#include "kernels/attention_prefill_hopper.cuh"

namespace tidal {

template void RunAttentionPrefillHopper<__nv_bfloat16, 64>(const AttentionPrefillArgs&,
                                                           const AttentionScratch&, cudaStream_t);

}  // namespace tidal
