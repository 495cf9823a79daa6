// Prefill: many tokens of each sequence at once, dense, into the paged cache. A chunk of a prompt,
// of decoded tokens to correct, or of drafts to verify.
#pragma once

#include <cstdint>
#include <functional>

#include "backend/backend.h"
#include "decode/pass.h"
#include "decode/transformer.h"

namespace tidal {

struct ChunkRows {
  TensorView q_starts;    // [B + 1] int32 on the device: where each row's tokens begin in the pass
  int64_t max_q_len = 0;  // at least the tokens of any row in the pass
  int64_t max_seq_len = 0;  // at least all of pass.seq_lens
};

// Uploads the tokens [begin, end) of one sequence as a pass of one row. q_starts: [2] int32.
void UploadChunk(Backend& backend, Sequence& sequence, int64_t begin, int64_t end,
                 const TensorView& q_starts, const Pass& pass);

// Told of a layer when pass.q, and the keys in the cache, are its own.
using OnQueries = std::function<void(int64_t layer)>;

// Runs all layers over a pass; pass.hidden is what is left to do the logits from.
void PrefillChunk(Backend& backend, const Transformer& transformer, const ChunkRows& rows,
                  const Pass& pass, const OnQueries& on_queries = nullptr);

}  // namespace tidal
