// ScoreKeys from keys of 4 bits; called by CpuScoreKeys.
#pragma once

#include <cstdint>

#include "backend/cpu/context.h"
#include "backend/op_args.h"

namespace tidal {

void CpuScoreShadow(CpuContext& context, const ScoreKeysArgs& args);

// Bytes of scratch for the queries of a step, for Reserve.
int64_t ShadowQueryBytes(int64_t num_rows, int64_t num_q_heads, int64_t head_dim);

}  // namespace tidal
