// The edge of every op: shapes and dtypes of its arguments, tied to each other by the letters of
// backend/op_args.h. Every backend calls these before it works; they allocate nothing when all is
// well.
//
// Check throws InvalidArgument that names op, tensor, what was got and what was expected. `act` is
// the backend's activation dtype, where it has a fixed one; without it, the act tensors of an op
// must agree.
#pragma once

#include <optional>

#include "backend/op_args.h"

namespace tidal {

void Check(const EmbedArgs& args, std::optional<DType> act = std::nullopt);
void Check(const RmsNormArgs& args, std::optional<DType> act = std::nullopt);
void Check(const LinearArgs& args, std::optional<DType> act = std::nullopt);
void Check(const RopeTableArgs& args, std::optional<DType> act = std::nullopt);
void Check(const RopeAppendKvArgs& args, std::optional<DType> act = std::nullopt);
void Check(const AttentionPrefillArgs& args, std::optional<DType> act = std::nullopt);
void Check(const AttentionArgs& args, std::optional<DType> act = std::nullopt);
void Check(const AttentionSelectArgs& args, std::optional<DType> act = std::nullopt);
void Check(const AppendShadowArgs& args, std::optional<DType> act = std::nullopt);
void Check(const ScoreKeysArgs& args, std::optional<DType> act = std::nullopt);
void Check(const SelectTopKArgs& args, std::optional<DType> act = std::nullopt);
void Check(const AttentionSparseArgs& args, std::optional<DType> act = std::nullopt);
void Check(const GateMulArgs& args, std::optional<DType> act = std::nullopt);
void Check(const GateRowsArgs& args, std::optional<DType> act = std::nullopt);
void Check(const SelectExpertsArgs& args, std::optional<DType> act = std::nullopt);
void Check(const ExpertLinearArgs& args, std::optional<DType> act = std::nullopt);
void Check(const AddExpertsArgs& args, std::optional<DType> act = std::nullopt);
void Check(const ScaleLogitsArgs& args, std::optional<DType> act = std::nullopt);
void Check(const GatherRowsArgs& args, std::optional<DType> act = std::nullopt);
void Check(const SampleArgs& args, std::optional<DType> act = std::nullopt);
void Check(const LogprobsArgs& args, std::optional<DType> act = std::nullopt);
void Check(const NormLinearArgs& args, std::optional<DType> act = std::nullopt);
void Check(const QkvRopeAppendArgs& args, std::optional<DType> act = std::nullopt);
void Check(const GateUpMulArgs& args, std::optional<DType> act = std::nullopt);
void Check(const ExpertMlpArgs& args, std::optional<DType> act = std::nullopt);
void Check(const AppendShadowScoreKeysArgs& args, std::optional<DType> act = std::nullopt);

}  // namespace tidal
