// The ops of the CPU backend as functions; meaning and shapes: backend/op_args.h. The arguments
// have been checked (backend/check_args.h).
#pragma once

#include "backend/backend.h"
#include "backend/cpu/context.h"
#include "backend/op_args.h"

namespace tidal {

void CpuEmbed(CpuContext& context, const EmbedArgs& args);
void CpuRmsNorm(CpuContext& context, const RmsNormArgs& args);
void CpuLinear(CpuContext& context, const LinearArgs& args);
void CpuRopeTable(CpuContext& context, const RopeTableArgs& args);
void CpuRopeAppendKv(CpuContext& context, const RopeAppendKvArgs& args);
void CpuAttentionPrefill(CpuContext& context, const AttentionPrefillArgs& args);
void CpuAttentionFull(CpuContext& context, const AttentionArgs& args);
void CpuAttentionSelect(CpuContext& context, const AttentionSelectArgs& args);
void CpuAppendShadow(CpuContext& context, const AppendShadowArgs& args);
void CpuScoreKeys(CpuContext& context, const ScoreKeysArgs& args);
void CpuSelectTopK(CpuContext& context, const SelectTopKArgs& args);
void CpuAttentionSparse(CpuContext& context, const AttentionSparseArgs& args);
void CpuGateMul(CpuContext& context, const GateMulArgs& args);
void CpuGateRows(CpuContext& context, const GateRowsArgs& args);
void CpuSelectExperts(CpuContext& context, const SelectExpertsArgs& args);
void CpuExpertLinear(CpuContext& context, const ExpertLinearArgs& args);
void CpuAddExperts(CpuContext& context, const AddExpertsArgs& args);
void CpuScaleLogits(CpuContext& context, const ScaleLogitsArgs& args);
void CpuGatherRows(CpuContext& context, const GatherRowsArgs& args);
void CpuSample(CpuContext& context, const SampleArgs& args);
void CpuLogprobs(CpuContext& context, const LogprobsArgs& args);

// Takes the scratch of every op at its largest, so that steps allocate nothing: ScratchBytes of it.
void ReserveScratch(CpuContext& context, const StepLimits& limits);
int64_t ScratchBytes(int num_threads, const StepLimits& limits);

}  // namespace tidal
