// What the dispatch files (attention_*.cu, score_keys.cu) call and the instantiation files
// (cuda/inst) define: one function for each kernel, dtype of activations, type of the cache's
// numbers (T or Float8) and head_dim, so that each kernel is compiled in a file of its own.
#pragma once

#include <cuda_runtime.h>

#include "backend/op_args.h"
#include "common/attention_scratch.h"
#include "common/cache_reads.h"

namespace tidal {

// Whether the attention kernel writes its scores and their log-sum-exp.
enum class ScoreOutput { kNone, kStore };

// With kNone, `scores` and `lse` of the arguments are ignored. Defined in attention_full.cuh.
template <typename T, typename Stored, int kHeadDim, ScoreOutput kScores>
void RunAttentionFull(const AttentionSelectArgs& args, const AttentionScratch& scratch,
                      CacheReads reads, cudaStream_t stream);

// Defined in score_keys.cuh.
template <typename T, typename Stored, int kHeadDim>
void RunScoreKeys(const ScoreKeysArgs& args, const AttentionScratch& scratch, CacheReads reads,
                  cudaStream_t stream);

// Defined in attention_sparse.cuh.
template <typename T, typename Stored, int kHeadDim>
void RunAttentionSparse(const AttentionSparseArgs& args, const AttentionScratch& scratch,
                        CacheReads reads, cudaStream_t stream);

// Defined in attention_few_queries.cuh.
template <typename T, typename Stored, int kHeadDim>
void RunAttentionFewQueries(const AttentionPrefillArgs& args, const AttentionScratch& scratch,
                            cudaStream_t stream);

// Defined in attention_prefill.cuh.
template <typename T, int kHeadDim>
void RunAttentionPrefill(const AttentionPrefillArgs& args, cudaStream_t stream);

// Defined in attention_prefill_hopper.cuh.
template <typename T, int kHeadDim>
void RunAttentionPrefillHopper(const AttentionPrefillArgs& args, const AttentionScratch& scratch,
                               cudaStream_t stream);

}  // namespace tidal
