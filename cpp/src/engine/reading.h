// Reading: tokens that a sequence has and the cache has not, densely, a chunk at a time.
#pragma once

#include <cstdint>
#include <span>

#include "decode/batch.h"
#include "decode/model_runner.h"

namespace tidal {

// The next chunk of the tokens up to `end`, as a batch row that draws nothing.
BatchRow NextChunk(const ModelRunner& runner, Sequence& sequence, int64_t end);

// The whole pages of tokens that begin like earlier ones. The last token is in none of them, for
// somebody has to compute what follows it.
int64_t NumCommonPages(std::span<const int32_t> earlier, std::span<const int32_t> tokens,
                       int64_t page_size);

// If `interval` tokens of the sequence (0: never) have been decoded sparsely since the last time,
// rewrites their K and V as a prompt's, chunk by chunk.
void CorrectCache(ModelRunner& runner, Sequence& sequence, int64_t interval);

}  // namespace tidal
