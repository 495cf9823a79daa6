// ScoreKeys for __nv_bfloat16, head_dim 256, of an fp8 cache.
#include "kernels/score_keys.cuh"

namespace tidal {

template void RunScoreKeys<__nv_bfloat16, Float8, 256>(const ScoreKeysArgs&,
                                                       const AttentionScratch&, CacheReads,
                                                       cudaStream_t);

}  // namespace tidal
