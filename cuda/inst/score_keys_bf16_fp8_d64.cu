// ScoreKeys for __nv_bfloat16, head_dim 64, of an fp8 cache.
#include "kernels/score_keys.cuh"

namespace tidal {

template void RunScoreKeys<__nv_bfloat16, Float8, 64>(const ScoreKeysArgs&, const AttentionScratch&,
                                                      CacheReads, cudaStream_t);

}  // namespace tidal
