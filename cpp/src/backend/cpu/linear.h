// Scratch of Linear, for Reserve.
#pragma once

#include <cstdint>

namespace tidal {

// Floats of scratch per thread.
int64_t LinearScratchFloats(int64_t in_features);

}  // namespace tidal
