// AttentionPrefill on compute capability 9.0 for __half, head_dim 64.
#include "kernels/attention_prefill_hopper.cuh"

namespace tidal {

template void RunAttentionPrefillHopper<__half, 64>(const AttentionPrefillArgs&,
                                                    const AttentionScratch&, cudaStream_t);

}  // namespace tidal
