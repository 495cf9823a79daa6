// ScoreKeys for __nv_bfloat16, head_dim 256.
#include "kernels/score_keys.cuh"

namespace tidal {

template void RunScoreKeys<__nv_bfloat16, __nv_bfloat16, 256>(const ScoreKeysArgs&,
                                                              const AttentionScratch&, CacheReads,
                                                              cudaStream_t);

}  // namespace tidal
