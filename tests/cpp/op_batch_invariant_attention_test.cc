// With BackendOptions::batch_invariant attention to a row is the same bits whatever else is in the
// call, and the same in a check of several tokens as in a step of each.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "paged_cache.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

constexpr int64_t kTokenBudget = 256;

class OpBatchInvariantAttention : public AttentionTest {
 protected:
  void Prepare(const Ints& seq_lens, Granularity granularity = Granularity::kLayer) {
    seq_lens_ = seq_lens;
    StepLimits limits = Limits();
    limits.max_batch_size = static_cast<int64_t>(seq_lens.size());
    limits.granularity = granularity;
    limits.token_budget = kTokenBudget;
    limits.max_seq_len = 16384;
    Open(GetParam().on, limits, {.device = {}, .batch_invariant = true});
    const auto sequences = RandomSequences(random_, shape(), seq_lens_, kv_dtype());
    kv_ = PutCache(sequences, shape().page_size);
    rule_ = {.sm_scale = static_cast<float>(sm_scale())};
  }

  // Caps scores and has sinks.
  void CapScores() {
    const int64_t heads = shape().num_q_heads;
    rule_.softcap = 4.0f;
    rule_.sinks = Put(random_.Normal(heads, DType::kFloat32, 4.0), DType::kFloat32, {heads});
  }

  // With all kinds of rules. On a device of 132 processors and with 8 KV heads the begin of the
  // longest window, and the length of splits, change among the queries of one check.
  void ForEachRule(const std::function<void()>& test) {
    for (int64_t window : {0, 1, 262, 8195}) {
      SCOPED_TRACE(Concat("window ", window));
      rule_.window = window;
      test();
    }
    SCOPED_TRACE("a window, a cap and sinks");
    rule_.window = 262;
    CapScores();
    test();
  }

  TensorView RandomQ(int64_t count) {
    const int64_t heads = shape().num_q_heads, dim = shape().head_dim;
    return Put(random_.Normal(count * heads * dim, act(), 3.0), act(), {count, heads, dim});
  }

  TensorView OutputLike(const TensorView& q) {
    return Output(act(), {q.dim(0), q.dim(1), q.dim(2)});
  }

  AttentionArgs Args(const TensorView& q, const PagedKv& kv, const TensorView& out) const {
    return {.q = q, .kv = kv, .rule = rule_, .out = out};
  }

  int64_t num_rows() const { return static_cast<int64_t>(seq_lens_.size()); }

  // Some that end where the length of splits changes, or behind.
  static Ints Lengths() {
    return {1, 8447, 300, 0, 8449, 2500, 257, 64, 4097, 256, 700, 8448, 33, 511, 1025, 2049};
  }

  // Each row of `out` as `run(first, count)` leaves it together with the others and alone.
  void ExpectSame(const std::function<void(int64_t, int64_t)>& run, const TensorView& out) {
    backend().RunStep(NewStep(), [&] { run(0, num_rows()); });
    std::vector<Bytes> together;
    for (int64_t row = 0; row < num_rows(); ++row) together.push_back(GetBytes(out.Rows(row, 1)));
    for (int64_t count : {1, 3, 9}) {
      for (int64_t first = 0; first < num_rows(); first += count) {
        const int64_t some = std::min(count, num_rows() - first);
        backend().RunStep(NewStep(), [&] { run(first, some); });
      }
      for (int64_t row = 0; row < num_rows(); ++row) {
        EXPECT_TRUE(SameBits(GetBytes(out.Rows(row, 1)), together[row], DTypeBytes(out.dtype)))
            << "row " << row << " of " << count;
      }
    }
  }

  // The last `count` tokens of all rows in one call, one fewer of the last row: each as a decode
  // step has it.
  void ExpectCheckEqualsSteps(int64_t count) {
    Ints q_starts = {0};
    for (int64_t row = 0; row < num_rows(); ++row) {
      const int64_t queries = row + 1 == num_rows() ? std::max<int64_t>(count - 1, 1) : count;
      q_starts.push_back(q_starts.back() + static_cast<int32_t>(queries));
    }
    const TensorView q = RandomQ(q_starts.back()), out = OutputLike(q), alone = OutputLike(q);
    backend().RunStep(NewStep(), [&] {
      backend().AttentionPrefill({.q = q,
                                  .q_starts = PutInts(q_starts, {num_rows() + 1}),
                                  .kv = kv_,
                                  .rule = rule_,
                                  .out = out,
                                  .max_q_len = count,
                                  .max_seq_len = 8512});
    });
    for (int64_t row = 0; row < num_rows(); ++row) {
      for (int32_t query = q_starts[row]; query < q_starts[row + 1]; ++query) {
        PagedKv kv = RowsOf(row, 1);
        kv.seq_lens = PutInts({seq_lens_[row] - (q_starts[row + 1] - 1 - query)}, {1});
        backend().RunStep(NewStep(), [&] {
          backend().AttentionFull(Args(q.Rows(query, 1), kv, alone.Rows(query, 1)));
        });
        ASSERT_TRUE(SameBits(GetBytes(out.Rows(query, 1)), GetBytes(alone.Rows(query, 1)),
                             DTypeBytes(act())))
            << "row " << row << ", query " << query - q_starts[row];
      }
    }
  }

  PagedKv RowsOf(int64_t first, int64_t count) const {
    PagedKv kv = kv_;
    kv.page_table = kv.page_table.Rows(first, count);
    kv.seq_lens = kv.seq_lens.Rows(first, count);
    return kv;
  }

  Random random_{5};
  Ints seq_lens_;
  PagedKv kv_;
  AttentionRule rule_;
};

TEST_P(OpBatchInvariantAttention, Full) {
  Prepare(Lengths());
  const TensorView q = RandomQ(num_rows()), out = OutputLike(q);
  ForEachRule([&] {
    ExpectSame(
        [&](int64_t first, int64_t count) {
          backend().AttentionFull(
              Args(q.Rows(first, count), RowsOf(first, count), out.Rows(first, count)));
        },
        out);
  });
}

TEST_P(OpBatchInvariantAttention, SelectAndScores) {
  Prepare(Lengths());
  CapScores();
  const int64_t heads = shape().num_q_heads;
  const TensorView q = RandomQ(num_rows()), out = OutputLike(q);
  const TensorView scores = Output(DType::kFloat32, {num_rows(), heads, 8512});
  const TensorView lse = Output(DType::kFloat32, {num_rows(), heads});
  const TensorView lse_alone = Output(DType::kFloat32, {num_rows(), heads});
  auto select = [&](int64_t first, int64_t count) {
    backend().AttentionSelect(
        {.attention = Args(q.Rows(first, count), RowsOf(first, count), out.Rows(first, count)),
         .scores = scores.Rows(first, count),
         .lse = lse.Rows(first, count)});
  };
  auto score = [&](int64_t first, int64_t count) {
    backend().ScoreKeys({.q = q.Rows(first, count),
                         .kv = RowsOf(first, count),
                         .shadow = {},
                         .rule = rule_,
                         .scores = scores.Rows(first, count),
                         .lse = lse_alone.Rows(first, count)});
  };
  ExpectSame(select, out);
  ExpectSame(select, lse);
  ExpectSame(score, lse_alone);
}

TEST_P(OpBatchInvariantAttention, SparseAndItsDenseRows) {
  constexpr int64_t kDenseLen = 1024;
  for (Granularity granularity : {Granularity::kLayer, Granularity::kKvHead, Granularity::kHead}) {
    SCOPED_TRACE(static_cast<int>(granularity));
    Prepare(Lengths(), granularity);
    CapScores();
    const int64_t num_sets = NumSets(granularity, shape().num_q_heads, shape().num_kv_heads);
    Ints token_idx, num_selected;
    for (int32_t n : seq_lens_) {
      const int64_t size = std::min<int64_t>(kTokenBudget, n);
      for (int64_t set = 0; set < num_sets; ++set) {
        Ints chosen = random_.Subset(size, n);
        chosen.resize(kTokenBudget, -1);
        token_idx.insert(token_idx.end(), chosen.begin(), chosen.end());
        num_selected.push_back(static_cast<int32_t>(size));
      }
    }
    const TensorView idx = PutInts(token_idx, {num_rows(), num_sets, kTokenBudget});
    const TensorView selected = PutInts(num_selected, {num_rows(), num_sets});
    const TensorView q = RandomQ(num_rows()), out = OutputLike(q), full = OutputLike(q);
    for (SetSizes sizes : {SetSizes::kEqual, SetSizes::kRagged}) {
      ExpectSame(
          [&](int64_t first, int64_t count) {
            backend().AttentionSparse({.attention = Args(q.Rows(first, count), RowsOf(first, count),
                                                         out.Rows(first, count)),
                                       .token_idx = idx.Rows(first, count),
                                       .num_selected = selected.Rows(first, count),
                                       .set_sizes = sizes,
                                       .dense_len = kDenseLen});
          },
          out);
      backend().RunStep(NewStep(), [&] { backend().AttentionFull(Args(q, kv_, full)); });
      for (int64_t row = 0; row < num_rows(); ++row) {
        if (seq_lens_[row] > kDenseLen) continue;
        EXPECT_TRUE(
            SameBits(GetBytes(out.Rows(row, 1)), GetBytes(full.Rows(row, 1)), DTypeBytes(act())))
            << "row " << row;
      }
    }
  }
}

// A check of drafts: each query as in a decode step when its token was the newest.
TEST_P(OpBatchInvariantAttention, FewQueriesEqualDecodeSteps) {
  Prepare({8460, 300, 80, 8448, 2049});
  std::vector<int64_t> counts = {1, 2, 3, 4, 5, 6, 7, 8, 9, 17};
  if (!on().is_cpu()) counts.insert(counts.end(), {33, 65});
  ForEachRule([&] {
    for (int64_t count : counts) {
      SCOPED_TRACE(count);
      ExpectCheckEqualsSteps(count);
    }
  });
}

// Outside steps, where prompts are read: chunks of any length, beside others or alone. As usual
// their tokens would be split here, by the length of the chunk.
TEST_P(OpBatchInvariantAttention, PromptsInAnyChunks) {
  if (on().is_cpu()) GTEST_SKIP() << "on the CPU to rounding";
  constexpr int32_t kBehind = 2300, kTokens = 700;
  Prepare({kBehind + kTokens});
  const TensorView q = RandomQ(kTokens), whole = OutputLike(q);
  auto attend = [&](int32_t first, int32_t count, const TensorView& out) {
    PagedKv kv = kv_;
    kv.seq_lens = PutInts({kBehind + first + count}, {1});
    backend().AttentionPrefill({.q = q.Rows(first, count),
                                .q_starts = PutInts({0, count}, {2}),
                                .kv = kv,
                                .rule = rule_,
                                .out = out.Rows(first, count),
                                .max_q_len = count,
                                .max_seq_len = kBehind + first + count});
  };
  ForEachRule([&] {
    attend(0, kTokens, whole);
    const Bytes want = GetBytes(whole);
    for (int32_t chunk : {5, 33, 64, 200, 500}) {
      SCOPED_TRACE(chunk);
      const TensorView out = OutputLike(q);
      for (int32_t first = 0; first < kTokens; first += chunk) {
        attend(first, std::min(chunk, kTokens - first), out);
      }
      EXPECT_TRUE(SameBits(GetBytes(out), want, DTypeBytes(act())));
    }
  });
}

// The CPU has one way for all shapes.
std::vector<OpCase<HeadShape>> AllCases() {
  std::vector<OpCase<HeadShape>> cases =
      Cases<HeadShape>(CudaCaches(), {{"gqa", 16, 8, 64, 64},
                                      {"mha", 8, 8, 128, 16},
                                      {"group8", 16, 2, 64, 64},
                                      {"group16", 32, 2, 64, 32}});
  for (const BackendCase& on : CudaCaches()) {
    if (!on.has_all_head_dims()) continue;
    cases.push_back({on, {"d80", 4, 4, 80, 16}});
    cases.push_back({on, {"d96", 4, 4, 96, 16}});
    cases.push_back({on, {"d256", 8, 4, 256, 32}});
  }
  const HeadShape group8 = {"group8", 16, 2, 64, 64};
  cases.push_back({{DeviceType::kCpu, DType::kFloat32}, group8});
  cases.push_back({{DeviceType::kCpu, DType::kFloat32, DType::kFloat8}, group8});
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Backends, OpBatchInvariantAttention, ::testing::ValuesIn(AllCases()),
                         CaseNameOf<OpCase<HeadShape>>);

}  // namespace
}  // namespace tidal::test
