// Tolerances and comparisons of test results (compare.h).
#include "compare.h"

#include <cmath>

namespace tidal::test {
namespace {

struct Row {
  Op op;
  Tolerance float32;
  Tolerance bfloat16;
  Tolerance float16;
};

// A stored bfloat16 is off by at most 2^-9 = 2e-3 of its value, a float16 by 2^-11 = 5e-4. The
// absolute parts are for inputs of size about 1: where terms cancel, the error is of the terms'
// size. Attention in 16 bits may also round the probabilities before they meet V (tensor cores).
constexpr Row kTable[] = {
    // op               float32         bfloat16        float16
    {Op::kLinear, {2e-5, 1e-5}, {2e-3, 4e-3}, {4e-4, 1e-3}},
    {Op::kRmsNorm, {1e-6, 1e-5}, {1e-6, 4e-3}, {1e-6, 1e-3}},
    {Op::kRopeTable, {1e-6, 1e-6}, {0, 0}, {0, 0}},
    {Op::kRope, {1e-5, 1e-5}, {1e-4, 4e-3}, {1e-4, 1e-3}},
    // A float32 score, a sum of up to 256 products, is good to 1e-5.
    {Op::kAttention, {2e-5, 1e-5}, {8e-3, 8e-3}, {1e-3, 2e-3}},
    // A float32 score of 300 is good to 2e-5, and so, relatively, is its exponential.
    {Op::kAttentionLargeScores, {1e-4, 1e-4}, {8e-3, 8e-3}, {2e-3, 2e-3}},
    {Op::kScores, {2e-5, 1e-5}, {0, 0}, {0, 0}},
    {Op::kGateMul, {1e-6, 1e-5}, {1e-4, 4e-3}, {1e-5, 1e-3}},
    // Parts round what stands between them; a rotation mixes the errors of two numbers.
    {Op::kFused, {1e-5, 1e-5}, {2e-2, 2e-2}, {3e-3, 3e-3}},
    {Op::kLogits, {1e-4, 1e-4}, {2e-2, 2e-2}, {4e-3, 4e-3}},
};

bool Matches(double got, double want, Tolerance tolerance) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::abs(got - want) <= tolerance.abs + tolerance.rel * std::abs(want);
}

// How far past the tolerance; infinite where NaN or infinity is missing or out of place.
double Badness(double got, double want, Tolerance tolerance) {
  if (!std::isfinite(got) || !std::isfinite(want)) return INFINITY;
  return std::abs(got - want) - tolerance.rel * std::abs(want);
}

}  // namespace

Tolerance ToleranceFor(Op op, DType output_dtype) {
  for (const Row& row : kTable) {
    if (row.op != op) continue;
    if (output_dtype == DType::kBFloat16) return row.bfloat16;
    if (output_dtype == DType::kFloat16) return row.float16;
    return row.float32;
  }
  return {};
}

::testing::AssertionResult Close(const Values& got, const Values& want, Tolerance tolerance) {
  if (got.size() != want.size()) {
    return ::testing::AssertionFailure()
           << "got " << got.size() << " elements, expected " << want.size();
  }
  size_t failures = 0, worst = 0;
  double worst_badness = -1.0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (Matches(got[i], want[i], tolerance)) continue;
    ++failures;
    const double badness = Badness(got[i], want[i], tolerance);
    if (badness > worst_badness) {
      worst = i;
      worst_badness = badness;
    }
  }
  if (failures == 0) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << failures << " of " << got.size() << " elements are off; the worst is [" << worst
         << "]: got " << got[worst] << ", expected " << want[worst] << " within " << tolerance.abs
         << " + " << tolerance.rel << " x |expected|";
}

::testing::AssertionResult SameBits(const std::vector<uint8_t>& got,
                                    const std::vector<uint8_t>& want, int64_t element_bytes) {
  if (got.size() != want.size()) {
    return ::testing::AssertionFailure()
           << "got " << got.size() << " bytes, expected " << want.size();
  }
  const size_t width = static_cast<size_t>(element_bytes);
  size_t failures = 0, first = 0;
  for (size_t begin = 0; begin < got.size(); begin += width) {
    if (std::equal(got.begin() + begin, got.begin() + begin + width, want.begin() + begin))
      continue;
    if (failures++ == 0) first = begin / width;
  }
  if (failures == 0) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << failures << " of " << got.size() / width << " elements differ in bits; the first is ["
         << first << "]";
}

double RelativeError(const Values& got, const Values& want) {
  double difference = 0.0, norm = 0.0;
  for (size_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / norm);
}

}  // namespace tidal::test
