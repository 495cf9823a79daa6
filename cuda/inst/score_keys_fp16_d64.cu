// ScoreKeys for __half, head_dim 64.
#include "kernels/score_keys.cuh"

namespace tidal {

template void RunScoreKeys<__half, __half, 64>(const ScoreKeysArgs&, const AttentionScratch&,
                                               CacheReads, cudaStream_t);

}  // namespace tidal
