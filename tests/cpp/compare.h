// How test results are compared: one tolerance table for all ops, and assertions that look at every
// element and say where the worst one is.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "reference.h"
#include "tidal/dtype.h"

namespace tidal::test {

enum class Op : int32_t {
  kLinear,
  kRmsNorm,
  kRopeTable,
  kRope,  // q, and k and v as the cache holds them
  kAttention,
  kAttentionLargeScores,  // of some hundreds
  kScores,                // q.k and its log-sum-exp
  kGateMul,
  kFused,   // several ops in one against its parts
  kLogits,  // a whole model
};

// |got - want| <= abs + rel * |want|
struct Tolerance {
  double abs = 0.0;
  double rel = 0.0;
};

// By the op and the dtype its output is stored in: sums are float32 everywhere, inputs are rounded
// before both sides see them, so what is left is the output's rounding and the order of the sums.
Tolerance ToleranceFor(Op op, DType output_dtype);

// Every element within the tolerance; NaN and infinities in the same places.
::testing::AssertionResult Close(const Values& got, const Values& want, Tolerance tolerance);

// The same bytes; `element_bytes` turns the first difference into an index.
::testing::AssertionResult SameBits(const std::vector<uint8_t>& got,
                                    const std::vector<uint8_t>& want, int64_t element_bytes);

// |got - want| / |want| in the Euclidean norm: for logits, where single elements say little.
double RelativeError(const Values& got, const Values& want);

}  // namespace tidal::test
