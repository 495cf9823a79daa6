// ScoreKeys from a shadow with every instruction set of this processor: products of codes are
// integers, so the scores are the same bit for bit.
#include <gtest/gtest.h>

#include "backend/cpu/cpu_backend.h"
#include "backend_test.h"

namespace tidal::test {
namespace {

constexpr int64_t kHeads = 2, kQueryHeads = 6, kMaxLen = 1204;

class OpShadowIsa : public ::testing::TestWithParam<CpuIsa> {
 protected:
  struct Scores {
    std::vector<float> scores, lse;
  };

  // Scores of two sequences, of arbitrary codes in pages in any order.
  Scores Score(CpuIsa isa, int64_t head_dim, int64_t page_size) {
    Random random(static_cast<uint64_t>(31 * head_dim + page_size));
    Ints seq_lens = {1203, 37};
    const int64_t pages_each = (kMaxLen + page_size - 1) / page_size, pages = 2 * pages_each;
    const int64_t slots = pages * kHeads * page_size;
    Ints table = random.Permutation(pages);
    const Ints drawn_codes = random.Below(slots * head_dim / 2, 256);
    std::vector<uint8_t> codes(drawn_codes.begin(), drawn_codes.end());
    Bytes scales = Encode(random.Normal(slots, DType::kFloat32, 0.1), DType::kFloat16);
    const Values drawn = random.Normal(2 * kQueryHeads * head_dim, DType::kFloat32, 1.0);
    std::vector<float> q(drawn.begin(), drawn.end());
    std::vector<float> balance(static_cast<size_t>(kHeads * head_dim), 1.0f);
    std::vector<float> keys(static_cast<size_t>(slots * head_dim));
    Scores out;
    out.scores.assign(static_cast<size_t>(2 * kQueryHeads * kMaxLen), 0.0f);
    out.lse.assign(static_cast<size_t>(2 * kQueryHeads), 0.0f);
    const TensorView cache(keys.data(), DType::kFloat32, {pages, kHeads, page_size, head_dim});
    const PagedKv kv = {.k_pages = cache,
                        .v_pages = cache,
                        .page_table = {table.data(), DType::kInt32, {2, pages_each}},
                        .seq_lens = {seq_lens.data(), DType::kInt32, {2}}};
    const ShadowKeys shadow = {
        .codes = {codes.data(), DType::kUInt8, {pages, kHeads, page_size, head_dim / 2}},
        .scales = {scales.data(), DType::kFloat16, {pages, kHeads, page_size}},
        .balance = {balance.data(), DType::kFloat32, {kHeads, head_dim}}};
    MakeCpuBackend({.device = {}, .num_threads = 2}, isa)
        ->ScoreKeys({.q = {q.data(), DType::kFloat32, {2, kQueryHeads, head_dim}},
                     .kv = kv,
                     .shadow = shadow,
                     .rule = {.sm_scale = 0.125f},
                     .scores = {out.scores.data(), DType::kFloat32, {2, kQueryHeads, kMaxLen}},
                     .lse = {out.lse.data(), DType::kFloat32, {2, kQueryHeads}}});
    return out;
  }
};

TEST_P(OpShadowIsa, ScoresHaveTheSameBits) {
  if (!HasIsa(GetParam())) GTEST_SKIP() << "this processor does not have it";
  for (int64_t head_dim : {32, 64, 80, 96, 128, 256, 512}) {
    for (int64_t page_size : {1, 8, 16, 24, 64}) {
      const Scores want = Score(CpuIsa::kGeneric, head_dim, page_size);
      const Scores got = Score(GetParam(), head_dim, page_size);
      EXPECT_EQ(got.scores, want.scores) << head_dim << " in pages of " << page_size;
      for (size_t i = 0; i < want.lse.size(); ++i) EXPECT_NEAR(got.lse[i], want.lse[i], 1e-5);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, OpShadowIsa,
                         ::testing::Values(CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAvx512Vnni));

}  // namespace
}  // namespace tidal::test
