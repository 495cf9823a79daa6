// Prefill: one chunk of one prompt, dense, into the paged cache.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "decode/pass.h"
#include "decode/transformer.h"

namespace tidal {

// Runs all layers over a pass of one sequence. `q_starts`: [2] int32 on the device, {0, T};
// `seq_len`: the host's copy of pass.seq_lens[0].
void PrefillChunk(Backend& backend, const Transformer& transformer, const TensorView& q_starts,
                  int64_t seq_len, const Pass& pass);

}  // namespace tidal
