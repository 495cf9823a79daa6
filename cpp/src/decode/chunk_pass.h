// A chunk pass: some tokens of each sequence at once, dense, into the paged cache. A chunk of a
// prompt, of decoded tokens to correct, or of drafts to check.
#pragma once

#include <cstdint>
#include <functional>

#include "backend/backend.h"
#include "decode/pass.h"
#include "decode/transformer.h"

namespace tidal {

// Told of a layer when pass.q, and the keys in the cache, are its own.
using OnQueries = std::function<void(int64_t layer)>;

// Queues all layers of a pass; pass.hidden is what is left to do the logits from.
void ChunkPass(Backend& backend, const Transformer& transformer, const Pass& pass,
               const OnQueries& on_queries = nullptr);

}  // namespace tidal
