// AttentionFull and AttentionSelect for __nv_bfloat16, head_dim 256, of an fp8 cache.
#include "kernels/attention_full.cuh"

namespace tidal {

template void RunAttentionFull<__nv_bfloat16, Float8, 256, ScoreOutput::kNone>(
    const AttentionSelectArgs&, const AttentionScratch&, CacheReads, cudaStream_t);
template void RunAttentionFull<__nv_bfloat16, Float8, 256, ScoreOutput::kStore>(
    const AttentionSelectArgs&, const AttentionScratch&, CacheReads, cudaStream_t);

}  // namespace tidal
