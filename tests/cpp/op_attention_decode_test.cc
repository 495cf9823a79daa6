// AttentionFull and AttentionSelect: dense attention of one query a row, with and without its
// scores; ScoreKeys: the scores alone.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "paged_cache.h"

namespace tidal::test {
namespace {

constexpr int64_t kMaxLen = 1501;  // of the scores; longer than any row, and odd

// So many rows that a device has no reason to split them: one block takes a row, however long.
Ints ManyRows(const Ints& seq_lens) {
  Ints rows(200, 0);
  for (size_t i = 0; i < seq_lens.size(); ++i) rows[7 * i + 3] = seq_lens[i];
  return rows;
}

class OpAttentionDecode : public AttentionTest {
 protected:
  void SetUp() override {
    AttentionTest::SetUp();
    if (IsSkipped()) return;
    const int32_t page = static_cast<int32_t>(shape().page_size);
    // Idle, one token, a partial page, whole pages, one more, and long ones of different lengths.
    Prepare({0, 1, std::max(page - 1, 1), 2 * page, page + 1, 1037, 300, 1500});
  }

  void Prepare(const Ints& seq_lens) {
    StepLimits limits = Limits();
    for (int32_t seq_len : seq_lens) {
      limits.max_seq_len = std::max<int64_t>(limits.max_seq_len, seq_len);
    }
    Open(GetParam().on, limits);
    seq_lens_ = seq_lens;
    sequences_ = RandomSequences(random_, shape(), seq_lens_, kv_dtype());
    q_ = random_.Normal(batch_size() * q_size(), act(),
                        3.0);  // scores of stddev 3: a peaked softmax
  }

  int64_t batch_size() const { return static_cast<int64_t>(seq_lens_.size()); }
  int64_t q_size() const { return shape().num_q_heads * shape().head_dim; }
  Shape q_shape(int64_t rows) const { return {rows, shape().num_q_heads, shape().head_dim}; }

  AttentionArgs Args(const PagedKv& kv, const Values& q) {
    const int64_t rows = kv.seq_lens.dim(0);
    return {.q = Put(q, act(), q_shape(rows)),
            .kv = kv,
            .rule = {.sm_scale = static_cast<float>(sm_scale())},
            .out = Output(act(), q_shape(rows))};
  }

  Values Want() const {
    Values want;
    for (int64_t b = 0; b < batch_size(); ++b) {
      const Values row = reference::AttendRange(&q_[b * q_size()], shape().num_q_heads,
                                                sequences_[b], seq_lens_[b], sm_scale());
      want.insert(want.end(), row.begin(), row.end());
    }
    return want;
  }

  AttentionSelectArgs SelectArgs(const AttentionArgs& attention) {
    const int64_t rows = attention.q.dim(0);
    return {.attention = attention,
            .scores = Output(DType::kFloat32, {rows, shape().num_q_heads, kMaxLen}),
            .lse = Output(DType::kFloat32, {rows, shape().num_q_heads})};
  }

  ScoreKeysArgs ScoreArgs(const AttentionArgs& attention, int64_t max_len = kMaxLen) {
    const int64_t rows = attention.q.dim(0);
    return {.q = attention.q,
            .kv = attention.kv,
            .shadow = {},
            .rule = attention.rule,
            .scores = Output(DType::kFloat32, {rows, shape().num_q_heads, max_len}),
            .lse = Output(DType::kFloat32, {rows, shape().num_q_heads})};
  }

  Random random_{1};
  Ints seq_lens_;
  std::vector<reference::Sequence> sequences_;
  Values q_;
};

TEST_P(OpAttentionDecode, FullMatchesReference) {
  const AttentionArgs args = Args(PutCache(sequences_, shape().page_size), q_);
  backend().AttentionFull(args);
  const Values got = Get(args.out);
  EXPECT_TRUE(Close(got, Want(), ToleranceFor(Op::kAttention, act())));
  EXPECT_EQ(Values(got.begin(), got.begin() + q_size()), Values(q_size(), 0.0)) << "the idle row";
}

TEST_P(OpAttentionDecode, SelectOutEqualsFullBitwise) {
  const PagedKv kv = PutCache(sequences_, shape().page_size);
  const AttentionArgs full = Args(kv, q_), select = Args(kv, q_);
  backend().AttentionFull(full);
  backend().AttentionSelect(SelectArgs(select));
  EXPECT_TRUE(SameBits(GetBytes(select.out), GetBytes(full.out), DTypeBytes(act())));
}

TEST_P(OpAttentionDecode, SelectWritesScoresAndLseAndLeavesTheRest) {
  const AttentionSelectArgs args = SelectArgs(Args(PutCache(sequences_, shape().page_size), q_));
  backend().AttentionSelect(args);
  const Bytes untouched(4, 0xff);
  const Bytes score_bytes = GetBytes(args.scores);
  const Values scores = Get(args.scores), lse = Get(args.lse);
  Values got_scores, want_scores, want_lse;
  for (int64_t b = 0; b < batch_size(); ++b) {
    for (int64_t head = 0; head < shape().num_q_heads; ++head) {
      const auto want =
          reference::AttendHead(&q_[(b * shape().num_q_heads + head) * shape().head_dim],
                                sequences_[b], head * shape().num_kv_heads / shape().num_q_heads,
                                Random(0).Subset(seq_lens_[b], seq_lens_[b]), sm_scale());
      want_lse.push_back(want.lse);
      want_scores.insert(want_scores.end(), want.scores.begin(), want.scores.end());
      const int64_t begin = (b * shape().num_q_heads + head) * kMaxLen;
      got_scores.insert(got_scores.end(), scores.begin() + begin,
                        scores.begin() + begin + seq_lens_[b]);
      for (int64_t t = seq_lens_[b]; t < kMaxLen; ++t) {
        const auto bytes = score_bytes.begin() + (begin + t) * 4;
        ASSERT_TRUE(std::equal(untouched.begin(), untouched.end(), bytes))
            << "wrote past row " << b << ", head " << head << ", at " << t;
      }
    }
  }
  const Tolerance tolerance = ToleranceFor(Op::kScores, DType::kFloat32);
  EXPECT_TRUE(Close(got_scores, want_scores, tolerance));
  EXPECT_TRUE(Close(lse, want_lse, tolerance));
}

// A scored layer chooses what a select layer would: its scores are the same bits, and its lse is
// the same to rounding. The values are not looked at.
TEST_P(OpAttentionDecode, ScoreKeysMatchesSelect) {
  for (const Ints& seq_lens :
       {seq_lens_, Ints{1500}, Ints{15, 0, 16, 0, 0, 17}, ManyRows({1500, 1037})}) {
    SCOPED_TRACE(seq_lens.back());
    Prepare(seq_lens);
    const PagedKv kv = PutCache(sequences_, shape().page_size);
    const AttentionArgs attention = Args(kv, q_);
    const AttentionSelectArgs select = SelectArgs(attention);
    backend().AttentionSelect(select);
    for (reference::Sequence& sequence : sequences_) {
      std::fill(sequence.v.begin(), sequence.v.end(), std::nan(""));
    }
    AttentionArgs without_values = attention;
    without_values.kv = PutCache(sequences_, shape().page_size);
    const ScoreKeysArgs scored = ScoreArgs(without_values);
    backend().ScoreKeys(scored);
    EXPECT_TRUE(SameBits(GetBytes(scored.scores), GetBytes(select.scores), 4));
    EXPECT_TRUE(
        Close(Get(scored.lse), Get(select.lse), ToleranceFor(Op::kScores, DType::kFloat32)));
  }
}

// A row has more splits than a warp has lanes; and rows of scores begin at multiples of 16 bytes.
TEST_P(OpAttentionDecode, ScoreKeysOfALongRowMatchesReference) {
  Prepare({4500});
  const ScoreKeysArgs args = ScoreArgs(Args(PutCache(sequences_, shape().page_size), q_), 4500);
  backend().ScoreKeys(args);
  Values want_scores, want_lse;
  for (int64_t head = 0; head < shape().num_q_heads; ++head) {
    const auto want = reference::AttendHead(&q_[head * shape().head_dim], sequences_[0],
                                            head * shape().num_kv_heads / shape().num_q_heads,
                                            Random(0).Subset(4500, 4500), sm_scale());
    want_lse.push_back(want.lse);
    want_scores.insert(want_scores.end(), want.scores.begin(), want.scores.end());
  }
  const Tolerance tolerance = ToleranceFor(Op::kScores, DType::kFloat32);
  EXPECT_TRUE(Close(Get(args.scores), want_scores, tolerance));
  EXPECT_TRUE(Close(Get(args.lse), want_lse, tolerance));
}

TEST_P(OpAttentionDecode, ScoreKeysPageSizeAndRepeatsDoNotChangeBits) {
  Ints page_sizes = {8, 16, 64, 256, 64};
  if (on().is_cpu()) page_sizes.insert(page_sizes.end(), {1, 7});
  Bytes scores, lse;
  for (int32_t page_size : page_sizes) {
    SCOPED_TRACE(page_size);
    StepLimits limits = Limits();
    limits.page_size = page_size;
    Open(GetParam().on, limits);
    const ScoreKeysArgs args = ScoreArgs(Args(PutCache(sequences_, page_size), q_));
    for (int round = 0; round < 2; ++round) {
      backend().ScoreKeys(args);
      if (scores.empty()) {
        scores = GetBytes(args.scores);
        lse = GetBytes(args.lse);
      }
      EXPECT_TRUE(SameBits(GetBytes(args.scores), scores, 4));
      EXPECT_TRUE(SameBits(GetBytes(args.lse), lse, 4));
    }
  }
}

// A NaN key reaches the scores of its token and the lse of the heads that read it, and no others.
TEST_P(OpAttentionDecode, ScoreKeysKeepsNanInItsRow) {
  sequences_[5].k[0] = std::nan("");  // KV head 0, token 0
  const ScoreKeysArgs args = ScoreArgs(Args(PutCache(sequences_, shape().page_size), q_));
  backend().ScoreKeys(args);
  const Values scores = Get(args.scores), lse = Get(args.lse);
  const int64_t group = shape().num_q_heads / shape().num_kv_heads;
  for (int64_t i = 0; i < static_cast<int64_t>(lse.size()); ++i) {
    const int64_t row = i / shape().num_q_heads, head = i % shape().num_q_heads;
    const bool wants_nan = row == 5 && head < group;
    ASSERT_EQ(std::isnan(lse[i]), wants_nan) << "row " << row << ", head " << head;
    for (int64_t t = 0; t < seq_lens_[row]; ++t) {
      ASSERT_EQ(std::isnan(scores[i * kMaxLen + t]), wants_nan && t == 0)
          << "row " << row << ", head " << head << ", at " << t;
    }
  }
}

TEST_P(OpAttentionDecode, PageSizeDoesNotChangeBits) {
  Ints page_sizes = {8, 16, 64, 256};
  if (on().is_cpu()) page_sizes.insert(page_sizes.end(), {1, 7});
  Bytes out, scores, lse;
  for (int32_t page_size : page_sizes) {
    SCOPED_TRACE(page_size);
    StepLimits limits = Limits();
    limits.page_size = page_size;
    Open(GetParam().on, limits);
    const AttentionSelectArgs args = SelectArgs(Args(PutCache(sequences_, page_size), q_));
    backend().AttentionSelect(args);
    if (out.empty()) {
      out = GetBytes(args.attention.out);
      scores = GetBytes(args.scores);
      lse = GetBytes(args.lse);
    }
    EXPECT_TRUE(SameBits(GetBytes(args.attention.out), out, DTypeBytes(act())));
    EXPECT_TRUE(SameBits(GetBytes(args.scores), scores, 4));
    EXPECT_TRUE(SameBits(GetBytes(args.lse), lse, 4));
  }
}

TEST_P(OpAttentionDecode, BatchRowEqualsRowAlone) {
  const AttentionArgs together = Args(PutCache(sequences_, shape().page_size), q_);
  backend().AttentionFull(together);
  for (int64_t b = 0; b < batch_size(); ++b) {
    SCOPED_TRACE(seq_lens_[b]);
    const Values q(q_.begin() + b * q_size(), q_.begin() + (b + 1) * q_size());
    const AttentionArgs alone = Args(PutCache({sequences_[b]}, shape().page_size), q);
    backend().AttentionFull(alone);
    const TensorView row = together.out.Rows(b, 1);
    if (on().is_cpu()) {
      EXPECT_TRUE(SameBits(GetBytes(row), GetBytes(alone.out), DTypeBytes(act())));
    } else {
      EXPECT_TRUE(Close(Get(row), Get(alone.out), ToleranceFor(Op::kAttention, act())));
    }
  }
}

// Scores of some hundreds: exp() without the maximum subtracted would overflow, and one position
// wins.
TEST_P(OpAttentionDecode, LargeScoresStayFinite) {
  for (double& q : q_) q *= 32.0;
  q_ = Rounded(q_, act());
  const AttentionArgs args = Args(PutCache(sequences_, shape().page_size), q_);
  backend().AttentionFull(args);
  EXPECT_TRUE(Close(Get(args.out), Want(), ToleranceFor(Op::kAttentionLargeScores, act())));
}

// A NaN in one row's cache stays in that row, of a value in its dim, and reaches every head that
// reads it.
TEST_P(OpAttentionDecode, NanStaysInItsRow) {
  sequences_[6].v[0] = sequences_[5].k[0] = std::nan("");  // KV head 0, token 0
  const AttentionArgs args = Args(PutCache(sequences_, shape().page_size), q_);
  backend().AttentionFull(args);
  const Values got = Get(args.out);
  const int64_t dim = shape().head_dim, group = shape().num_q_heads / shape().num_kv_heads;
  for (int64_t i = 0; i < static_cast<int64_t>(got.size()); ++i) {
    const int64_t row = i / q_size(), head = i % q_size() / dim;
    const bool wants_nan =
        head < group && (row == 5 || (row == 6 && (i % dim == 0 || SpreadsNan())));
    ASSERT_EQ(std::isnan(got[i]), wants_nan) << "row " << row << ", head " << head << ", at " << i;
  }
}

// A row's tokens may be split over blocks, each of which is to attend to none, to some or to all of
// a tile; and a row has more splits than a warp has lanes.
TEST_P(OpAttentionDecode, EveryNumberOfSplitsMatchesReference) {
  const Ints lengths[] = {{15, 0, 16, 0, 0, 17}, {0, 63, 64, 65, 127, 0, 129}, {0, 0}, {4500}};
  for (const Ints& seq_lens : lengths) {
    SCOPED_TRACE(seq_lens.back());
    Prepare(seq_lens);
    const AttentionArgs args = Args(PutCache(sequences_, shape().page_size), q_);
    backend().AttentionFull(args);
    EXPECT_TRUE(Close(Get(args.out), Want(), ToleranceFor(Op::kAttention, act())));
  }
}

// Nothing of an op is left behind for the next, whatever its shape: the scratch is shared.
TEST_P(OpAttentionDecode, RepeatsBitwise) {
  const PagedKv kv = PutCache(sequences_, shape().page_size);
  const PagedKv one_row = PutCache({sequences_[5]}, shape().page_size);
  const Values one_query(q_.begin(), q_.begin() + q_size());
  Bytes first, first_alone;
  for (int round = 0; round < 4; ++round) {
    SCOPED_TRACE(round);
    const AttentionArgs together = Args(kv, q_), alone = Args(one_row, one_query);
    backend().AttentionFull(together);
    backend().AttentionFull(alone);
    if (round == 0) {
      first = GetBytes(together.out);
      first_alone = GetBytes(alone.out);
    }
    EXPECT_TRUE(SameBits(GetBytes(together.out), first, DTypeBytes(act())));
    EXPECT_TRUE(SameBits(GetBytes(alone.out), first_alone, DTypeBytes(act())));
  }
}

// In a step the kernel in front has just written the queries and each row's newest token.
TEST_P(OpAttentionDecode, StepSeesWhatTheOpInFrontAppends) {
  for (const Ints& seq_lens :
       {seq_lens_, Ints{1, 17, 64}, Ints{4097}, ManyRows({65, 129, 300, 1025})}) {
    SCOPED_TRACE(*std::max_element(seq_lens.begin(), seq_lens.end()));
    Prepare(seq_lens);
    const PagedKv kv = PutCache(sequences_, shape().page_size);
    const AttentionArgs full = Args(kv, q_);
    const RopeAppendKvArgs append = RandomNewest(random_, kv, seq_lens_, full.q);
    ExpectStepEqualsOps(
        [&] {
          backend().RopeAppendKv(append);
          backend().AttentionFull(full);
        },
        {kv.k_pages, kv.v_pages, full.q, full.out});
    if (*std::max_element(seq_lens.begin(), seq_lens.end()) > kMaxLen) continue;
    const AttentionSelectArgs select = SelectArgs(full);
    ExpectStepEqualsOps(
        [&] {
          backend().RopeAppendKv(append);
          backend().AttentionSelect(select);
        },
        {kv.k_pages, kv.v_pages, full.q, full.out, select.scores, select.lse});
    const ScoreKeysArgs scored = ScoreArgs(full);
    ExpectStepEqualsOps(
        [&] {
          backend().RopeAppendKv(append);
          backend().ScoreKeys(scored);
        },
        {kv.k_pages, kv.v_pages, full.q, scored.scores, scored.lse});
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, OpAttentionDecode,
                         ::testing::ValuesIn(HeadCases(AllCaches(), CommonHeadShapes())),
                         CaseNameOf<OpCase<HeadShape>>);

}  // namespace
}  // namespace tidal::test
