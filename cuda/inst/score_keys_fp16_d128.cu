// ScoreKeys for __half, head_dim 128.
#include "kernels/score_keys.cuh"

namespace tidal {

template void RunScoreKeys<__half, __half, 128>(const ScoreKeysArgs&, const AttentionScratch&,
                                                CacheReads, cudaStream_t);

}  // namespace tidal
