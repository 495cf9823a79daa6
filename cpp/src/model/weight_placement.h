// Which tensors of a checkpoint a model calls for, and where each goes on a device.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/weights.h"

namespace tidal {

struct RowRun {
  int64_t begin, count;
};
using RowRuns = std::vector<RowRun>;

// Tensors that are stacked, in order, into one device tensor.
struct Placement {
  TensorView* target;
  Weight* matrix;  // whose data the target is, if it may be in codes; else nullptr
  std::vector<std::string> names;
  std::vector<int64_t> rows;       // of each name
  int64_t columns;                 // 0: vectors
  std::string expected_from;       // how the shape follows from the config, for the error
  std::vector<RowRuns> runs = {};  // of each name's rows, in the order in which they are stacked
  bool is_float32 = false;         // whatever the dtype of the others is
  float added = 0.0f;              // to each number; with is_float32
  // Whether it is float32 where it is stored so and products take it beside weights of 16 bits.
  bool may_be_float32 = false;
  // Whether the matrix's products may be of many tokens, for which codes may be decoded first: not
  // the output matrix's, nor those of experts, which work as they are stored.
  bool is_for_prompts = false;

  DType dtype(DType others) const { return is_float32 ? DType::kFloat32 : others; }
};

// Shape of the i-th name.
std::vector<int64_t> ShapeOf(const Placement& placement, size_t i);
int64_t NumRows(const Placement& placement);
int64_t NumElements(const Placement& placement);

// Whether the output matrix has numbers, or codes, of its own.
enum class Head : int32_t { kTied, kOwn };
Head HeadOf(const ModelConfig& model);
Head HeadOf(const ModelConfig& model, const WeightSource& source);

// All tensors of a model; the targets are tensors of `weights`.
std::vector<Placement> PlanWeights(const ModelConfig& model, Head head, ModelWeights& weights);

}  // namespace tidal
