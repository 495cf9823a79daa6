// Reading, without a scheduler: tokens that a sequence has and the cache has not, densely, a chunk
// at a time.
#pragma once

#include <cstdint>

#include "decode/batch.h"
#include "decode/model_runner.h"

namespace tidal::test {

// The next chunk of the tokens up to `end`, as a batch row that draws nothing.
BatchRow NextChunk(const ModelRunner& runner, Sequence& sequence, int64_t end);

// If `interval` tokens of the sequence (0: never) have been decoded sparsely since the last time,
// rewrites their K and V as a prompt's, chunk by chunk.
void CorrectCache(ModelRunner& runner, Sequence& sequence, int64_t interval);

}  // namespace tidal::test
