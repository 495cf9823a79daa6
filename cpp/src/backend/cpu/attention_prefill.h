// Scratch of AttentionPrefill, for Reserve.
#pragma once

#include <cstdint>

#include "tidal/config.h"

namespace tidal {

// Floats of scratch per thread.
int64_t PrefillScratchFloats(int64_t group_size, int64_t head_dim);

// Rows with at most this many queries run as decode does, reading each K and V row once, with its
// results bit for bit. That is for passes over drafts, which should draw what decode steps draw:
// from 9 queries on products of blocks are a tenth faster.
inline constexpr int64_t kFewQueries = kMaxAutomaticDrafts + 1;

}  // namespace tidal
