// AppendShadow, ScoreKeys from a shadow, and both in one: how a scored layer chooses by keys of 4
// bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "core/shadow_code.h"
#include "paged_cache.h"

namespace tidal::test {
namespace {

constexpr int64_t kMaxLen = 1204;

// H(x) in double precision, by its definition: the sign of an entry is the parity of the common
// bits of row and column.
Values Rotated(const Values& x) {
  const auto dim = static_cast<int64_t>(x.size());
  const int64_t block = dim & -dim;
  Values out(x.size(), 0.0);
  for (int64_t i = 0; i < dim; ++i) {
    for (int64_t j = i / block * block; j < (i / block + 1) * block; ++j) {
      const int parity = __builtin_popcountll(static_cast<uint64_t>((i % block) & (j % block))) % 2;
      out[i] += (parity == 0 ? 1.0 : -1.0) * ShadowSign(static_cast<int>(j)) * x[j];
    }
    out[i] /= std::sqrt(static_cast<double>(block));
  }
  return out;
}

class OpShadow : public AttentionTest {
 protected:
  void SetUp() override {
    AttentionTest::SetUp();
    if (IsSkipped()) return;
    Open(GetParam().on, Limits());
    sequences_ = RandomSequences(random_, shape(), seq_lens_, kv_dtype());
    balance_ = random_.Normal(heads() * dim(), DType::kFloat32, 1.0);
    for (double& factor : balance_) factor = static_cast<float>(std::exp(0.5 * factor));
    q_ = random_.Normal(rows() * shape().num_q_heads * dim(), act(), 1.0);
  }

  DType score_dtype() { return backend().shadow_score_dtype(); }
  int64_t rows() const { return static_cast<int64_t>(seq_lens_.size()); }
  int64_t heads() const { return shape().num_kv_heads; }
  int64_t dim() const { return shape().head_dim; }

  ShadowKeys EmptyShadow(const PagedKv& kv) {
    const int64_t pages = kv.k_pages.dim(0), page_size = kv.k_pages.dim(2);
    return {.codes = Output(DType::kUInt8, {pages, heads(), page_size, dim() / 2}),
            .scales = Output(DType::kFloat16, {pages, heads(), page_size}),
            .balance = Put(balance_, DType::kFloat32, {heads(), dim()})};
  }

  // The shadow of all tokens of all rows but the newest `num_left_out` of each.
  ShadowKeys FullShadow(const PagedKv& kv, int32_t num_left_out = 0) {
    ShadowKeys shadow = EmptyShadow(kv);
    Ints positions, seq_idx;
    for (int64_t b = 0; b < rows(); ++b) {
      for (int32_t t = 0; t < seq_lens_[b] - num_left_out; ++t) {
        positions.push_back(t);
        seq_idx.push_back(static_cast<int32_t>(b));
      }
    }
    const auto count = static_cast<int64_t>(positions.size());
    backend().AppendShadow({.kv = kv,
                            .positions = PutInts(positions, {count}),
                            .seq_idx = PutInts(seq_idx, {count}),
                            .shadow = shadow});
    return shadow;
  }

  ScoreKeysArgs ScoreArgs(const PagedKv& kv, const ShadowKeys& shadow) {
    return {.q = Put(q_, act(), {rows(), shape().num_q_heads, dim()}),
            .kv = kv,
            .shadow = shadow,
            .rule = {.sm_scale = static_cast<float>(sm_scale())},
            .scores = Output(shadow.codes ? score_dtype() : DType::kFloat32,
                             {rows(), shape().num_q_heads, kMaxLen}),
            .lse = Output(DType::kFloat32, {rows(), shape().num_q_heads})};
  }

  // Where the token of a row lies: index of its key among all slots of a layer.
  int64_t Slot(const Ints& page_table, const PagedKv& kv, int64_t row, int64_t head, int64_t t) {
    const int64_t page_size = kv.k_pages.dim(2);
    const int64_t page = page_table[row * kv.page_table.dim(1) + t / page_size];
    return (page * heads() + head) * page_size + t % page_size;
  }

  Values Key(int64_t row, int64_t head, int64_t t) const {
    const auto first = sequences_[row].k.begin() + (t * heads() + head) * dim();
    return Values(first, first + dim());
  }

  Random random_{5};
  Ints seq_lens_ = {0, 1, 9, 64, 513, 1204};
  std::vector<reference::Sequence> sequences_;
  Values balance_, q_;
};

TEST_P(OpShadow, CodesAreTheNearestToTheRotatedKey) {
  const PagedKv kv = PutCache(sequences_, shape().page_size);
  const ShadowKeys shadow = FullShadow(kv);
  const Bytes codes = GetBytes(shadow.codes);
  const Values scales = Get(shadow.scales);
  const Ints page_table = GetInts(kv.page_table);
  for (int64_t b = 0; b < rows(); ++b) {
    for (int64_t t = 0; t < seq_lens_[b]; t += 7) {
      for (int64_t head = 0; head < heads(); ++head) {
        Values key = Key(b, head, t);
        for (int64_t d = 0; d < dim(); ++d) key[d] /= balance_[head * dim() + d];
        const Values want = Rotated(key);
        const int64_t slot = Slot(page_table, kv, b, head, t);
        double largest = 0.0;
        for (double value : want) largest = std::max(largest, std::fabs(value));
        ASSERT_NEAR(scales[slot], largest / 7.0, largest / 7.0 * 6e-4) << b << " " << t;
        for (int64_t d = 0; d < dim(); ++d) {
          const auto both = static_cast<uint8_t>(codes[(slot * dim() + d) / 2]);
          const int code = (d % 2 == 0 ? both & 15 : both >> 4) - 8;
          ASSERT_GE(code, -7);
          ASSERT_LE(code, 7);
          const double step = scales[slot];
          ASSERT_LE(std::fabs(code * step - want[d]), 0.5 * step + 1e-3 * largest) << "dim " << d;
        }
      }
    }
  }
}

// Codes, scales and scores are the same bits on every device.
TEST_P(OpShadow, HasTheBitsOfTheRule) {
  const PagedKv kv = PutCache(sequences_, shape().page_size);
  const ShadowKeys shadow = FullShadow(kv);
  const ScoreKeysArgs args = ScoreArgs(kv, shadow);
  backend().ScoreKeys(args);
  const Bytes codes = GetBytes(shadow.codes), scales = GetBytes(shadow.scales);
  const Values scores = Get(args.scores);
  const Ints page_table = GetInts(kv.page_table);
  const auto width = static_cast<size_t>(dim());
  const int64_t group = shape().num_q_heads / heads();
  const std::vector<float> balance(balance_.begin(), balance_.end());
  auto rounded = [&](const Values& values) {
    const Values stored = StoredKeys(values, dim(), kv_dtype());
    return std::vector<float>(stored.begin(), stored.end());
  };
  for (int64_t b = 0; b < rows(); ++b) {
    for (int64_t head = 0; head < heads(); ++head) {
      const float* factors = &balance[static_cast<size_t>(head * dim())];
      std::vector<std::vector<int8_t>> query_codes;
      std::vector<ShadowQuery> queries;
      for (int64_t i = 0; i < group; ++i) {
        const auto first = q_.begin() + (b * shape().num_q_heads + head * group + i) * dim();
        const std::vector<float> query(first, first + dim());
        query_codes.emplace_back(width);
        queries.push_back(EncodeShadowQuery(query.data(), factors, static_cast<int>(dim()),
                                            query_codes.back().data()));
      }
      for (int64_t t = 0; t < seq_lens_[b]; ++t) {
        const std::vector<float> key = rounded(Key(b, head, t));
        std::vector<uint8_t> want(width / 2);
        Float16 scale;
        EncodeShadowKey(key.data(), factors, static_cast<int>(dim()), want.data(), &scale);
        const auto slot = static_cast<size_t>(Slot(page_table, kv, b, head, t));
        ASSERT_EQ(std::memcmp(&codes[slot * width / 2], want.data(), width / 2), 0)
            << b << " " << t;
        ASSERT_EQ(std::memcmp(&scales[2 * slot], &scale, 2), 0) << b << " " << t;
        for (int64_t i = 0; i < group; ++i) {
          const auto& query = queries[static_cast<size_t>(i)];
          const auto& q_codes = query_codes[static_cast<size_t>(i)];
          int32_t product = 0;
          for (size_t d = 0; d < width; ++d) {
            const int code = d % 2 == 0 ? want[d / 2] & 15 : want[d / 2] >> 4;
            product += q_codes[d % 2 * (width / 2) + d / 2] * (code - kShadowCodeBias);
          }
          const float factor = query.factor * args.rule.sm_scale;
          const float score = static_cast<float>(product) * (ToFloat(scale) * factor);
          const int64_t row = b * shape().num_q_heads + head * group + i;
          ASSERT_EQ(scores[row * kMaxLen + t], Rounded({score}, score_dtype())[0])
              << b << " " << t << " head " << i;
        }
      }
    }
  }
}

TEST_P(OpShadow, TheNewestTokenIsAppendedAndScoredInOne) {
  const PagedKv kv = PutCache(sequences_, shape().page_size);
  ScoreKeysArgs apart = ScoreArgs(kv, FullShadow(kv));
  apart.rule.softcap = 0.7f;
  backend().ScoreKeys(apart);
  Ints newest, seq_idx;
  for (int64_t b = 0; b < rows(); ++b) {
    newest.push_back(seq_lens_[b] - 1);
    seq_idx.push_back(static_cast<int32_t>(b));
  }
  ScoreKeysArgs both = ScoreArgs(kv, FullShadow(kv, 1));
  both.rule = apart.rule;
  backend().AppendShadowScoreKeys({.append = {.kv = kv,
                                              .positions = PutInts(newest, {rows()}),
                                              .seq_idx = PutInts(seq_idx, {rows()}),
                                              .shadow = both.shadow},
                                   .score = both});
  EXPECT_EQ(GetBytes(both.shadow.codes), GetBytes(apart.shadow.codes));
  EXPECT_EQ(GetBytes(both.shadow.scales), GetBytes(apart.shadow.scales));
  EXPECT_TRUE(SameBits(GetBytes(both.scores), GetBytes(apart.scores), DTypeBytes(score_dtype())));
  EXPECT_TRUE(Close(Get(both.lse), Get(apart.lse), {.abs = 1e-5, .rel = 1e-6}));
}

TEST_P(OpShadow, ScoresAreCapped) {
  constexpr double kCap = 0.7;
  const PagedKv kv = PutCache(sequences_, shape().page_size);
  const ShadowKeys shadow = FullShadow(kv);
  const ScoreKeysArgs plain = ScoreArgs(kv, shadow);
  ScoreKeysArgs capped = ScoreArgs(kv, shadow);
  capped.rule.softcap = static_cast<float>(kCap);
  backend().ScoreKeys(plain);
  backend().ScoreKeys(capped);
  Values want = Get(plain.scores), got = Get(capped.scores), want_lse;
  for (double& score : want) score = kCap * std::tanh(score / kCap);
  const double rounding = score_dtype() == DType::kFloat16 ? 1e-3 : 1e-5;
  EXPECT_TRUE(Close(got, want, {.abs = rounding, .rel = rounding}));
  for (int64_t row = 0; row < rows() * shape().num_q_heads; ++row) {
    const auto first = want.begin() + row * kMaxLen;
    want_lse.push_back(
        std::log(std::accumulate(first, first + seq_lens_[row / shape().num_q_heads], 0.0,
                                 [](double sum, double score) { return sum + std::exp(score); })));
  }
  EXPECT_TRUE(Close(Get(capped.lse), want_lse, {.abs = rounding, .rel = rounding}));
}

TEST_P(OpShadow, ScoresAreThoseOfTheCodesToTheQuerysRounding) {
  const PagedKv kv = PutCache(sequences_, shape().page_size);
  const ShadowKeys shadow = FullShadow(kv);
  const ScoreKeysArgs args = ScoreArgs(kv, shadow);
  backend().ScoreKeys(args);
  const Bytes codes = GetBytes(shadow.codes);
  const Values scales = Get(shadow.scales), scores = Get(args.scores), lse = Get(args.lse);
  const Ints page_table = GetInts(kv.page_table);
  const int64_t group = shape().num_q_heads / heads();
  for (int64_t b = 0; b < rows(); ++b) {
    for (int64_t head = 0; head < shape().num_q_heads; ++head) {
      Values query(dim());
      for (int64_t d = 0; d < dim(); ++d) {
        query[d] =
            q_[(b * shape().num_q_heads + head) * dim() + d] * balance_[head / group * dim() + d];
      }
      query = Rotated(query);
      double largest = 0.0, sum = 0.0;
      for (double value : query) largest = std::max(largest, std::fabs(value));
      const int64_t first = (b * shape().num_q_heads + head) * kMaxLen;
      for (int64_t t = 0; t < seq_lens_[b]; ++t) {
        const int64_t slot = Slot(page_table, kv, b, head / group, t);
        double want = 0.0, magnitude = 0.0;
        for (int64_t d = 0; d < dim(); ++d) {
          const auto both = static_cast<uint8_t>(codes[(slot * dim() + d) / 2]);
          const int code = (d % 2 == 0 ? both & 15 : both >> 4) - 8;
          want += query[d] * code * scales[slot];
          magnitude += std::abs(code) * scales[slot];
        }
        // Each dim of the query is off by half a step of 1/127 of its largest, at most.
        const double bound = 0.51 / 127.0 * largest * magnitude + 1e-5 +
                             (score_dtype() == DType::kFloat16 ? 5e-4 * std::fabs(want) : 0.0);
        ASSERT_LE(std::fabs(scores[first + t] - sm_scale() * want), sm_scale() * bound)
            << "row " << b << ", head " << head << ", token " << t;
        sum += std::exp(scores[first + t]);
      }
      for (int64_t t = seq_lens_[b]; t < kMaxLen; ++t) {
        ASSERT_TRUE(std::isnan(scores[first + t])) << "wrote past row " << b << " at " << t;
      }
      const double got = lse[b * shape().num_q_heads + head];
      if (seq_lens_[b] == 0) {
        ASSERT_EQ(got, -std::numeric_limits<double>::infinity());
      } else {
        // It is of the scores before they are rounded.
        ASSERT_NEAR(got, std::log(sum), score_dtype() == DType::kFloat16 ? 2e-3 : 1e-4);
      }
    }
  }
}

// Keys are read in 4 bits, and still most of what is best is among twice as many.
TEST_P(OpShadow, TheBestAreAmongTwiceAsMany) {
  const PagedKv kv = PutCache(sequences_, shape().page_size);
  const ScoreKeysArgs exact = ScoreArgs(kv, {}), coarse = ScoreArgs(kv, FullShadow(kv));
  backend().ScoreKeys(exact);
  backend().ScoreKeys(coarse);
  const Values want = Get(exact.scores), got = Get(coarse.scores);
  const int64_t row = rows() - 1, n = seq_lens_[row], best = 64;
  int64_t found = 0;
  for (int64_t head = 0; head < shape().num_q_heads; ++head) {
    const int64_t first = (row * shape().num_q_heads + head) * kMaxLen;
    auto ranked = [&](const Values& scores) {
      Ints order(n);
      std::iota(order.begin(), order.end(), 0);
      std::sort(order.begin(), order.end(),
                [&](int32_t a, int32_t b) { return scores[first + a] > scores[first + b]; });
      return order;
    };
    const Ints by_exact = ranked(want), by_coarse = ranked(got);
    for (int64_t i = 0; i < best; ++i) {
      const auto end = by_coarse.begin() + 2 * best;
      found += std::find(by_coarse.begin(), end, by_exact[i]) != end;
    }
  }
  EXPECT_GE(static_cast<double>(found) / static_cast<double>(best * shape().num_q_heads), 0.97);
}

TEST_P(OpShadow, PageSizeDoesNotChangeBits) {
  Bytes scores, lse;
  std::vector<int32_t> page_sizes = {8, 64, 256};
  if (on().is_cpu()) page_sizes.insert(page_sizes.end(), {1, 7});
  for (int32_t page_size : page_sizes) {
    SCOPED_TRACE(page_size);
    const PagedKv kv = PutCache(sequences_, page_size);
    const ScoreKeysArgs args = ScoreArgs(kv, FullShadow(kv));
    backend().ScoreKeys(args);
    if (scores.empty()) {
      scores = GetBytes(args.scores);
      lse = GetBytes(args.lse);
    }
    EXPECT_TRUE(SameBits(GetBytes(args.scores), scores, DTypeBytes(score_dtype())));
    EXPECT_TRUE(SameBits(GetBytes(args.lse), lse, 4));
  }
}

TEST_P(OpShadow, OnlyTheGivenTokensAreWritten) {
  const PagedKv kv = PutCache(sequences_, shape().page_size);
  const ShadowKeys shadow = EmptyShadow(kv), full = FullShadow(kv);
  backend().AppendShadow({.kv = kv,
                          .positions = PutInts({8, -1, 600}, {3}),
                          .seq_idx = PutInts({2, 0, 5}, {3}),
                          .shadow = shadow});
  const Bytes codes = GetBytes(shadow.codes), want = GetBytes(full.codes);
  const Ints page_table = GetInts(kv.page_table);
  for (int64_t head = 0; head < heads(); ++head) {
    for (const auto& [row, t] : {std::pair{2, 8}, std::pair{5, 600}}) {
      const int64_t first = Slot(page_table, kv, row, head, t) * dim() / 2;
      EXPECT_TRUE(std::equal(codes.begin() + first, codes.begin() + first + dim() / 2,
                             want.begin() + first));
    }
  }
  const auto written = std::count_if(codes.begin(), codes.end(),
                                     [](char code) { return static_cast<uint8_t>(code) != 0xff; });
  EXPECT_LE(written, 2 * heads() * dim() / 2);  // a code of 15 and 15 looks unwritten
}

// A key that is not finite spoils its own score and the lse of the heads that read it.
TEST_P(OpShadow, NanStaysInItsToken) {
  sequences_[4].k[0] = std::nan("");
  sequences_[5].k[3 * heads() * dim()] = std::numeric_limits<double>::infinity();
  const PagedKv kv = PutCache(sequences_, shape().page_size);
  const ScoreKeysArgs args = ScoreArgs(kv, FullShadow(kv));
  backend().ScoreKeys(args);
  const Values scores = Get(args.scores);
  const int64_t group = shape().num_q_heads / heads();
  for (int64_t b = 0; b < rows(); ++b) {
    for (int64_t head = 0; head < shape().num_q_heads; ++head) {
      for (int64_t t = 0; t < seq_lens_[b]; ++t) {
        const bool wants_nan = head < group && ((b == 4 && t == 0) || (b == 5 && t == 3));
        ASSERT_EQ(std::isnan(scores[(b * shape().num_q_heads + head) * kMaxLen + t]), wants_nan)
            << "row " << b << ", head " << head << ", token " << t;
      }
    }
  }
}

TEST_P(OpShadow, ZeroKeysAndQueriesScoreZero) {
  for (reference::Sequence& sequence : sequences_) {
    std::fill(sequence.k.begin(), sequence.k.end(), 0.0);
  }
  const PagedKv kv = PutCache(sequences_, shape().page_size);
  ScoreKeysArgs args = ScoreArgs(kv, FullShadow(kv));
  backend().ScoreKeys(args);
  EXPECT_EQ(Get(args.scores)[(rows() - 1) * shape().num_q_heads * kMaxLen], 0.0);
  std::fill(q_.begin(), q_.end(), 0.0);
  args = ScoreArgs(kv, args.shadow);
  backend().ScoreKeys(args);
  EXPECT_EQ(Get(args.scores)[(rows() - 1) * shape().num_q_heads * kMaxLen], 0.0);
}

INSTANTIATE_TEST_SUITE_P(Backends, OpShadow,
                         ::testing::ValuesIn(HeadCases(AllCaches(), CommonHeadShapes())),
                         CaseNameOf<OpCase<HeadShape>>);

// The same key and query on every instruction set: their product is an integer.
TEST(ShadowCode, KeepsProductsAndRefusesWhatIsNotFinite) {
  Random random(3);
  for (int head_dim : {2, 64, 80, 96, 128, 256}) {
    const Values key = random.Normal(head_dim, DType::kFloat32, 1.0);
    const Values query = random.Normal(head_dim, DType::kFloat32, 1.0);
    std::vector<float> k(key.begin(), key.end()), q(query.begin(), query.end());
    double before = 0.0, after = 0.0;
    for (int i = 0; i < head_dim; ++i) before += static_cast<double>(k[i]) * q[i];
    RotateForShadow(k.data(), head_dim);
    RotateForShadow(q.data(), head_dim);
    for (int i = 0; i < head_dim; ++i) after += static_cast<double>(k[i]) * q[i];
    EXPECT_NEAR(after, before, 1e-4) << head_dim;
    std::vector<float> ones(static_cast<size_t>(head_dim), 1.0f);
    std::vector<uint8_t> codes(static_cast<size_t>(head_dim / 2));
    Float16 scale;
    k[static_cast<size_t>(head_dim - 1)] = std::numeric_limits<float>::infinity();
    EncodeShadowKey(k.data(), ones.data(), head_dim, codes.data(), &scale);
    EXPECT_TRUE(std::isnan(ToFloat(scale)));
  }
}

}  // namespace
}  // namespace tidal::test
