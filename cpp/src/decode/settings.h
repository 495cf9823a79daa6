// The settings of an engine: whether they make sense, and what follows from them.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "tidal/config.h"
#include "tidal/plan.h"

namespace tidal {

// Each throws InvalidArgument, naming the setting that is out of range.
void ValidatePlanConfig(const PlanConfig& config);
void ValidateDecodeConfig(const DecodeConfig& config);

BackendOptions OptionsOf(const DecodeConfig& config);

// The plan that the layers of these settings make. Throws InvalidArgument.
DecodePlan MakeDecodePlan(const ModelConfig& model, const PlanConfig& config);

// Fills in the automatic values of a plan, for steps of sequences up to max_seq_len.
void ResolvePlanSettings(const Backend& backend, int64_t max_seq_len, PlanConfig& plan);

// Returns how many pages a sequence of max_seq_len tokens takes.
int64_t PagesOfLongest(const DecodeConfig& config);

// Returns whether there is something to draft with: the text, or the sparse steps of the plan.
bool CanDraft(const DecodeConfig& config, const DecodePlan& plan);

// Returns whether the engine drafts and checks.
bool Verifies(const DecodeConfig& config, const DecodePlan& plan);

// Returns how many tokens of one sequence the largest step takes: 1, or with verification 1 + the
// most drafts.
int64_t TokensPerRow(const DecodeConfig& config, const DecodePlan& plan);

}  // namespace tidal
