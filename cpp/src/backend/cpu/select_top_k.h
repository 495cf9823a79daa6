// Scratch of SelectTopK, for Reserve.
#pragma once

#include <cstdint>

namespace tidal {

// 32-bit words of scratch; num_sets over all rows.
int64_t SelectScratchWords(int64_t num_sets, int64_t max_len);

}  // namespace tidal
