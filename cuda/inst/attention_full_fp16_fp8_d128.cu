// AttentionFull and AttentionSelect for __half, head_dim 128, of an fp8 cache.
#include "kernels/attention_full.cuh"

namespace tidal {

template void RunAttentionFull<__half, Float8, 128, ScoreOutput::kNone>(const AttentionSelectArgs&,
                                                                        const AttentionScratch&,
                                                                        CacheReads, cudaStream_t);
template void RunAttentionFull<__half, Float8, 128, ScoreOutput::kStore>(const AttentionSelectArgs&,
                                                                         const AttentionScratch&,
                                                                         CacheReads, cudaStream_t);

}  // namespace tidal
