// ScoreKeys for __half, head_dim 128, of an fp8 cache.
#include "kernels/score_keys.cuh"

namespace tidal {

template void RunScoreKeys<__half, Float8, 128>(const ScoreKeysArgs&, const AttentionScratch&,
                                                CacheReads, cudaStream_t);

}  // namespace tidal
