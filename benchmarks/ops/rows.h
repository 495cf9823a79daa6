// The rows of bench_ops: each measures the ops whose names contain `filter` and prints a line of
// JSON for each.
#pragma once

#include <string>

#include "bench_device.h"

namespace tidal {

// Attention and selection of decode steps.
void MeasureDecodeAttention(BenchDevice& bench, const std::string& filter);

// Scored layers as a whole, and what they do for their sets.
void MeasureScoredLayers(BenchDevice& bench, const std::string& filter);

// The projections of decode steps of Llama-3.1-8B, with what is fused to them.
void MeasureProjections(BenchDevice& bench, const std::string& filter);

// The products of its prompts (prompt_linear), with inputs rounded to float8 too.
void MeasurePromptProducts(BenchDevice& bench, const std::string& filter);

// Attention over a prompt, and over short chunks behind long contexts (attention_prefill_behind),
// those once more as batch-invariant attention does them, which splits no tokens.
void MeasurePromptAttention(BenchDevice& bench, const std::string& filter);

}  // namespace tidal
