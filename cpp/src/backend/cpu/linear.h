// What Linear reads, and its scratch, for the backend.
#pragma once

#include <cstdint>

#include "backend/op_args.h"

namespace tidal {

// Returns whether Linear takes this weight in its codes.
bool CpuReadsCodes(const Weight& weight);

// Floats of scratch per thread.
int64_t LinearScratchFloats(int64_t in_features);

// Integers of scratch for so many choices of experts, for Reserve.
int64_t ChoiceInts(int64_t num_choices, int64_t num_experts);

}  // namespace tidal
