// Scratch of AttentionPrefill, for Reserve.
#pragma once

#include <cstdint>

namespace tidal {

// Floats of scratch per thread.
int64_t PrefillScratchFloats(int64_t group_size, int64_t head_dim);

// Rows with at most this many queries run as decode does, reading each K and V row once.
inline constexpr int64_t kFewQueries = 8;

}  // namespace tidal
