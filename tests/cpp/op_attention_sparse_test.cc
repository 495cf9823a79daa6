// AttentionSparse: attention to chosen positions, for each kind of set.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "paged_cache.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

constexpr Granularity kGranularities[] = {Granularity::kKvHead, Granularity::kHead,
                                          Granularity::kLayer};

class OpAttentionSparse : public AttentionTest {
 protected:
  // Sets of one batch: sets[b][set] is ascending and holds the newest token.
  using Sets = std::vector<std::vector<Ints>>;

  void Prepare(Granularity granularity, int64_t token_budget, const Ints& seq_lens) {
    granularity_ = granularity;
    token_budget_ = token_budget;
    seq_lens_ = seq_lens;
    StepLimits limits = Limits();
    limits.granularity = granularity;
    limits.token_budget = token_budget;
    Open(GetParam().on, limits);
    random_ = Random(7);
    sequences_ = RandomSequences(random_, shape(), seq_lens_, kv_dtype());
    q_ = random_.Normal(batch_size() * q_size(), act(), 3.0);
  }

  int64_t batch_size() const { return static_cast<int64_t>(seq_lens_.size()); }
  int64_t q_size() const { return shape().num_q_heads * shape().head_dim; }
  int64_t num_sets() const {
    return NumSets(granularity_, shape().num_q_heads, shape().num_kv_heads);
  }

  Sets RandomSets() {
    Sets sets(seq_lens_.size());
    for (size_t b = 0; b < sets.size(); ++b) {
      const int64_t n = seq_lens_[b], size = std::min(token_budget_, n);
      for (int64_t set = 0; set < num_sets() && n > 0; ++set) {
        sets[b].push_back(random_.Subset(size - 1, n - 1));
        sets[b].back().push_back(static_cast<int32_t>(n - 1));
      }
    }
    return sets;
  }

  AttentionSparseArgs Args(const PagedKv& kv, const Sets& sets, int64_t dense_len = 0) {
    const int64_t rows = batch_size();
    const Shape q_shape = {rows, shape().num_q_heads, shape().head_dim};
    Ints token_idx(rows * num_sets() * token_budget_, -1), num_selected(rows * num_sets(), 0);
    for (int64_t b = 0; b < rows; ++b) {
      for (size_t set = 0; set < sets[b].size(); ++set) {
        num_selected[b * num_sets() + set] = static_cast<int32_t>(sets[b][set].size());
        std::copy(sets[b][set].begin(), sets[b][set].end(),
                  token_idx.begin() + (b * num_sets() + set) * token_budget_);
      }
    }
    return {.attention = {.q = Put(q_, act(), q_shape),
                          .kv = kv,
                          .rule = {.sm_scale = static_cast<float>(sm_scale())},
                          .out = Output(act(), q_shape)},
            .token_idx = PutInts(token_idx, {rows, num_sets(), token_budget_}),
            .num_selected = PutInts(num_selected, {rows, num_sets()}),
            .dense_len = dense_len};
  }

  Values Want(const Sets& sets) const {
    Values want;
    const int64_t heads = shape().num_q_heads;
    for (int64_t b = 0; b < batch_size(); ++b) {
      for (int64_t head = 0; head < heads; ++head) {
        const Ints positions = sets[b].empty() ? Ints{} : sets[b][head * num_sets() / heads];
        const Values out =
            reference::AttendHead(&q_[(b * heads + head) * shape().head_dim], sequences_[b],
                                  head * shape().num_kv_heads / heads, positions, sm_scale())
                .out;
        want.insert(want.end(), out.begin(), out.end());
      }
    }
    return want;
  }

  Random random_{7};
  Granularity granularity_ = Granularity::kKvHead;
  int64_t token_budget_ = 0;
  Ints seq_lens_;
  std::vector<reference::Sequence> sequences_;
  Values q_;
};

// Sets of one row that differ in size by far, and one that holds the newest token only.
TEST_P(OpAttentionSparse, SetsOfAnySize) {
  for (Granularity granularity : kGranularities) {
    for (int64_t token_budget : {300, 2000, 5000}) {
      if (on().is_cpu() && token_budget > 300) continue;  // it splits no set
      SCOPED_TRACE(
          Concat("granularity ", static_cast<int>(granularity), ", budget ", token_budget));
      Prepare(granularity, token_budget, {6000, 0, 1, 2500, 301});
      Sets sets = RandomSets();
      int64_t number = 0;
      for (auto& row : sets) {
        for (Ints& set : row) {
          // Every third set keeps one position, the others a share.
          const auto size = static_cast<int64_t>(set.size());
          const int64_t kept = number % 3 == 0 ? 1 : std::max<int64_t>(1, size * (number % 7) / 7);
          set.erase(set.begin(), set.end() - kept);
          ++number;
        }
      }
      AttentionSparseArgs args = Args(PutCache(sequences_, shape().page_size), sets);
      args.set_sizes = SetSizes::kRagged;
      backend().AttentionSparse(args);
      EXPECT_TRUE(Close(Get(args.attention.out), Want(sets), ToleranceFor(Op::kAttention, act())));
      const Values ragged = Get(args.attention.out);
      args.set_sizes = SetSizes::kEqual;
      backend().AttentionSparse(args);
      EXPECT_TRUE(Close(Get(args.attention.out), ragged, ToleranceFor(Op::kAttention, act())));
    }
  }
}

// Idle rows, rows shorter than the budget (so num_selected < capacity), and long ones in one batch.
TEST_P(OpAttentionSparse, MatchesReferenceForEveryGranularity) {
  for (Granularity granularity : kGranularities) {
    for (int64_t token_budget : {1, 33, 256}) {
      SCOPED_TRACE(
          Concat("granularity ", static_cast<int>(granularity), ", budget ", token_budget));
      Prepare(granularity, token_budget, {700, 0, 20, 1, 1203, 257});
      const Sets sets = RandomSets();
      const AttentionSparseArgs args = Args(PutCache(sequences_, shape().page_size), sets);
      backend().AttentionSparse(args);
      EXPECT_TRUE(Close(Get(args.attention.out), Want(sets), ToleranceFor(Op::kAttention, act())));
    }
  }
}

TEST_P(OpAttentionSparse, AllPositionsEqualDense) {
  for (Granularity granularity : kGranularities) {
    SCOPED_TRACE(static_cast<int>(granularity));
    Prepare(granularity, 520, {520, 511, 3});
    const PagedKv kv = PutCache(sequences_, shape().page_size);
    const AttentionSparseArgs sparse = Args(kv, RandomSets());
    AttentionArgs full = sparse.attention;
    full.out = Output(act(), {3, shape().num_q_heads, shape().head_dim});
    backend().AttentionSparse(sparse);
    backend().AttentionFull(full);
    EXPECT_TRUE(
        Close(Get(sparse.attention.out), Get(full.out), ToleranceFor(Op::kAttention, act())));
  }
}

TEST_P(OpAttentionSparse, RowsUpToDenseLenAreDense) {
  constexpr int64_t kDenseLen = 300;
  for (Granularity granularity : kGranularities) {
    SCOPED_TRACE(static_cast<int>(granularity));
    Prepare(granularity, 16, {300, 301, 0, 5, 900});
    const PagedKv kv = PutCache(sequences_, shape().page_size);
    const Sets sets = RandomSets();
    const AttentionSparseArgs sparse = Args(kv, sets, kDenseLen);
    AttentionArgs full = sparse.attention;
    full.out = Output(act(), {batch_size(), shape().num_q_heads, shape().head_dim});
    backend().AttentionSparse(sparse);
    backend().AttentionFull(full);
    const Values want = Want(sets);
    for (int64_t b = 0; b < batch_size(); ++b) {
      SCOPED_TRACE(seq_lens_[b]);
      const TensorView got = sparse.attention.out.Rows(b, 1), dense = full.out.Rows(b, 1);
      if (seq_lens_[b] > kDenseLen) {
        const auto begin = want.begin() + b * q_size();
        EXPECT_TRUE(
            Close(Get(got), Values(begin, begin + q_size()), ToleranceFor(Op::kAttention, act())));
      } else if (on().is_cpu()) {
        EXPECT_TRUE(SameBits(GetBytes(got), GetBytes(dense), DTypeBytes(act())));
      } else {
        EXPECT_TRUE(Close(Get(got), Get(dense), ToleranceFor(Op::kAttention, act())));
      }
    }
  }
}

// So much room for dense rows that a row's splits are too many for a cluster of blocks, on a GPU.
TEST_P(OpAttentionSparse, LongDenseRowsBesideShortSets) {
  constexpr int64_t kDenseLen = 2100;
  for (int64_t token_budget : {64, 1500}) {
    SCOPED_TRACE(token_budget);
    Prepare(Granularity::kKvHead, token_budget, {2100, 2101, 3000});
    const Sets sets = RandomSets();
    Sets attended = sets;
    for (Ints& positions : attended[0]) {
      positions.resize(kDenseLen);
      std::iota(positions.begin(), positions.end(), 0);
    }
    const AttentionSparseArgs args = Args(PutCache(sequences_, shape().page_size), sets, kDenseLen);
    backend().AttentionSparse(args);
    EXPECT_TRUE(
        Close(Get(args.attention.out), Want(attended), ToleranceFor(Op::kAttention, act())));
  }
}

TEST_P(OpAttentionSparse, PageSizeDoesNotChangeBits) {
  Prepare(Granularity::kKvHead, 64, {700, 1203});
  const Sets sets = RandomSets();
  Bytes first;
  for (int32_t page_size : {8, 16, 64, 256}) {
    SCOPED_TRACE(page_size);
    StepLimits limits = Limits();
    limits.page_size = page_size;
    Open(GetParam().on, limits);
    const AttentionSparseArgs args = Args(PutCache(sequences_, page_size), sets);
    backend().AttentionSparse(args);
    const Bytes out = GetBytes(args.attention.out);
    if (first.empty()) first = out;
    EXPECT_TRUE(SameBits(out, first, DTypeBytes(act())));
  }
}

TEST_P(OpAttentionSparse, BatchRowEqualsRowAlone) {
  Prepare(Granularity::kKvHead, 64, {700, 0, 20, 1203});
  const Sets sets = RandomSets();
  const auto sequences = sequences_;
  const Values q = q_;
  const Ints seq_lens = seq_lens_;
  const AttentionSparseArgs together = Args(PutCache(sequences, shape().page_size), sets);
  backend().AttentionSparse(together);
  for (size_t b = 0; b < sequences.size(); ++b) {
    SCOPED_TRACE(seq_lens[b]);
    seq_lens_ = {seq_lens[b]};
    q_ = Values(q.begin() + b * q_size(), q.begin() + (b + 1) * q_size());
    const AttentionSparseArgs alone = Args(PutCache({sequences[b]}, shape().page_size), {sets[b]});
    backend().AttentionSparse(alone);
    const TensorView row = together.attention.out.Rows(static_cast<int64_t>(b), 1);
    if (on().is_cpu()) {
      EXPECT_TRUE(SameBits(GetBytes(row), GetBytes(alone.attention.out), DTypeBytes(act())));
    } else {
      EXPECT_TRUE(Close(Get(row), Get(alone.attention.out), ToleranceFor(Op::kAttention, act())));
    }
  }
}

// In a step the kernel in front has just written the queries and each row's newest token, which is
// in every set, wherever in the row; or the sets.
TEST_P(OpAttentionSparse, StepSeesWhatTheOpsInFrontWrite) {
  for (Granularity granularity : kGranularities) {
    SCOPED_TRACE(static_cast<int>(granularity));
    Prepare(granularity, 128, {700, 0, 20, 1, 1203, 257});
    const PagedKv kv = PutCache(sequences_, shape().page_size);
    const AttentionSparseArgs sparse = Args(kv, RandomSets(), 200);
    const AttentionArgs& attention = sparse.attention;
    const RopeAppendKvArgs append = RandomNewest(random_, kv, seq_lens_, attention.q);
    ExpectStepEqualsOps(
        [&] {
          backend().RopeAppendKv(append);
          backend().AttentionSparse(sparse);
        },
        {kv.k_pages, kv.v_pages, attention.q, attention.out});

    constexpr int64_t kMaxLen = 1203;
    const int64_t rows = batch_size(), heads = shape().num_q_heads;
    AttentionSelectArgs select = {.attention = attention,
                                  .scores = Output(DType::kFloat32, {rows, heads, kMaxLen}),
                                  .lse = Output(DType::kFloat32, {rows, heads})};
    select.attention.out = Output(act(), {rows, heads, shape().head_dim});
    const SelectTopKArgs top_k = {.scores = select.scores,
                                  .lse = select.lse,
                                  .seq_lens = kv.seq_lens,
                                  .num_kv_heads = shape().num_kv_heads,
                                  .granularity = granularity,
                                  .token_idx = sparse.token_idx,
                                  .num_selected = sparse.num_selected};
    ExpectStepEqualsOps(
        [&] {
          backend().RopeAppendKv(append);
          backend().AttentionSelect(select);
          backend().SelectTopK(top_k);
          backend().AttentionSparse(sparse);
        },
        {kv.k_pages, kv.v_pages, attention.q, select.attention.out, select.scores, select.lse,
         sparse.token_idx, sparse.num_selected, attention.out});
  }
}

// Nothing of an op is left behind for the next, whatever its shape.
TEST_P(OpAttentionSparse, RepeatsBitwise) {
  Prepare(Granularity::kKvHead, 512, {700, 0, 20, 1203});
  const Sets sets = RandomSets();
  const PagedKv kv = PutCache(sequences_, shape().page_size);
  Bytes first;
  for (int round = 0; round < 4; ++round) {
    SCOPED_TRACE(round);
    const AttentionSparseArgs args = Args(kv, sets);
    backend().AttentionSparse(args);
    if (round == 0) first = GetBytes(args.attention.out);
    EXPECT_TRUE(SameBits(GetBytes(args.attention.out), first, DTypeBytes(act())));
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, OpAttentionSparse,
                         ::testing::ValuesIn(HeadCases(AllCaches(), CommonHeadShapes())),
                         CaseNameOf<OpCase<HeadShape>>);

}  // namespace
}  // namespace tidal::test
