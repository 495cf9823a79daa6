// Sequences for the attention tests, and their way into a paged cache.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "backend_test.h"

namespace tidal::test {

// The heads and pages of one attention test.
struct HeadShape {
  std::string name;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t page_size = 0;
};

// What every backend takes: head_dim 64 and 128, groups of 1 to 16, pages of 8 to 256 tokens.
std::vector<HeadShape> CommonHeadShapes();
// Two that every backend takes, where more of them would tell little.
std::vector<HeadShape> FewHeadShapes();
// `everywhere` on all given backends, heads of 80, 96 and 256 on those that have them, and on the
// CPU's sizes that divide nothing.
std::vector<OpCase<HeadShape>> HeadCases(const std::vector<BackendCase>& backends,
                                         const std::vector<HeadShape>& everywhere);

// Scales of an fp8 cache, of which few values are beyond the largest number.
inline constexpr float kKeyScale = 0.007f, kValueScale = 0.3f;

// Rows of K or of V, one token's head each, as a cache of the dtype holds them.
Values StoredKeys(const Values& rows, int64_t row_size, DType dtype);
Values StoredValues(const Values& rows, int64_t row_size, DType dtype);

// With stored rows.
std::vector<reference::Sequence> RandomSequences(Random& random, const HeadShape& shape,
                                                 const Ints& seq_lens, DType dtype);

class AttentionTest : public OpTest<HeadShape> {
 protected:
  StepLimits Limits() const;
  DType kv_dtype() const { return GetParam().on.kv_dtype(); }
  double sm_scale() const;

  // Scatters the sequences over pages in random order. Free slots, spare pages and everything the
  // page table points to past a row's end hold `unused`: nothing of it may reach a result.
  PagedKv PutCache(const std::vector<reference::Sequence>& sequences, int64_t page_size,
                   double unused = std::numeric_limits<double>::quiet_NaN());

  // Whether one NaN makes NaN of all its row of the cache.
  bool SpreadsNan() const { return DTypeBytes(kv_dtype()) == 1; }

  // Random queries into q, and random K and V in place of what `kv` has as the newest token of each
  // row.
  RopeAppendKvArgs RandomNewest(Random& random, const PagedKv& kv, const Ints& seq_lens,
                                const TensorView& q);

  // Runs `ops` one by one, then as a step until that is recorded and replayed, each time with
  // `changed`, all the tensors that they write, as they are now: the same bits in `changed`.
  void ExpectStepEqualsOps(const std::function<void()>& ops,
                           const std::vector<TensorView>& changed);
};

}  // namespace tidal::test
