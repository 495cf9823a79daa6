// AppendShadow, ScoreKeys from a shadow, ScoreChosen and SelectTopK among candidates: how a scored
// layer chooses by keys of 4 bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
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
    if (!GetParam().on.is_cpu()) GTEST_SKIP() << "a shadow is made on the CPU only";
    Open(GetParam().on, Limits());
    sequences_ = RandomSequences(random_, shape(), seq_lens_, dtype());
    balance_ = random_.Normal(heads() * dim(), DType::kFloat32, 1.0);
    for (double& factor : balance_) factor = static_cast<float>(std::exp(0.5 * factor));
    q_ = random_.Normal(rows() * shape().num_q_heads * dim(), act(), 1.0);
  }

  int64_t rows() const { return static_cast<int64_t>(seq_lens_.size()); }
  int64_t heads() const { return shape().num_kv_heads; }
  int64_t dim() const { return shape().head_dim; }

  ShadowKeys EmptyShadow(const PagedKv& kv) {
    const int64_t pages = kv.k_pages.dim(0), page_size = kv.k_pages.dim(2);
    return {.codes = Output(DType::kUInt8, {pages, heads(), page_size, dim() / 2}),
            .scales = Output(DType::kFloat16, {pages, heads(), page_size}),
            .balance = Put(balance_, DType::kFloat32, {heads(), dim()})};
  }

  // The shadow of all tokens of all rows, a pass of them at a time.
  ShadowKeys FullShadow(const PagedKv& kv) {
    ShadowKeys shadow = EmptyShadow(kv);
    Ints positions, seq_idx;
    for (int64_t b = 0; b < rows(); ++b) {
      for (int32_t t = 0; t < seq_lens_[b]; ++t) {
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
            .sm_scale = static_cast<float>(sm_scale()),
            .scores = Output(DType::kFloat32, {rows(), shape().num_q_heads, kMaxLen}),
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
        const double bound = 0.51 / 127.0 * largest * magnitude + 1e-5;
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
        ASSERT_NEAR(got, std::log(sum), 1e-4);
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
  for (int32_t page_size : {1, 7, 8, 64, 256}) {
    SCOPED_TRACE(page_size);
    const PagedKv kv = PutCache(sequences_, page_size);
    const ScoreKeysArgs args = ScoreArgs(kv, FullShadow(kv));
    backend().ScoreKeys(args);
    if (scores.empty()) {
      scores = GetBytes(args.scores);
      lse = GetBytes(args.lse);
    }
    EXPECT_TRUE(SameBits(GetBytes(args.scores), scores, 4));
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

TEST_P(OpShadow, ChosenPositionsHaveTheirExactScores) {
  const PagedKv kv = PutCache(sequences_, shape().page_size);
  const ScoreKeysArgs all = ScoreArgs(kv, {});
  backend().ScoreKeys(all);
  const Values want = Get(all.scores);
  const int64_t budget = 100;
  for (int64_t num_sets : {int64_t{1}, heads(), shape().num_q_heads}) {
    SCOPED_TRACE(num_sets);
    Ints token_idx(rows() * num_sets * budget, -1), num_selected;
    for (int64_t i = 0; i < rows() * num_sets; ++i) {
      const int64_t n = seq_lens_[i / num_sets];
      const Ints chosen = random_.Subset(std::min<int64_t>(n, budget), n);
      std::copy(chosen.begin(), chosen.end(), token_idx.begin() + i * budget);
      num_selected.push_back(static_cast<int32_t>(chosen.size()));
    }
    const ScoreChosenArgs args = {
        .q = all.q,
        .kv = kv,
        .sm_scale = all.sm_scale,
        .token_idx = PutInts(token_idx, {rows(), num_sets, budget}),
        .num_selected = PutInts(num_selected, {rows(), num_sets}),
        .scores = Output(DType::kFloat32, {rows(), shape().num_q_heads, budget})};
    backend().ScoreChosen(args);
    const Values got = Get(args.scores);
    for (int64_t b = 0; b < rows(); ++b) {
      for (int64_t head = 0; head < shape().num_q_heads; ++head) {
        const int64_t set = b * num_sets + head * num_sets / shape().num_q_heads;
        const int64_t query = b * shape().num_q_heads + head;
        for (int64_t i = 0; i < budget; ++i) {
          const double score = got[query * budget + i];
          if (i >= num_selected[set]) {
            ASSERT_TRUE(std::isnan(score));
          } else {
            ASSERT_EQ(score, want[query * kMaxLen + token_idx[set * budget + i]]);
          }
        }
      }
    }
  }
}

// Among all positions in order, candidates change nothing; among some, the set is theirs.
TEST_P(OpShadow, ASetOfCandidatesIsThatOfTheirScores) {
  const PagedKv kv = PutCache(sequences_, shape().page_size);
  const ScoreKeysArgs all = ScoreArgs(kv, {});
  backend().ScoreKeys(all);
  for (Granularity granularity : {Granularity::kLayer, Granularity::kKvHead, Granularity::kHead}) {
    for (float top_p_mass : {1.0f, 0.8f}) {
      const int64_t num_sets = NumSets(granularity, shape().num_q_heads, heads()), budget = 40;
      auto top_k = [&](const TensorView& scores, int64_t count) {
        return SelectTopKArgs{.scores = scores,
                              .lse = all.lse,
                              .seq_lens = kv.seq_lens,
                              .num_kv_heads = heads(),
                              .granularity = granularity,
                              .sink_tokens = 2,
                              .recent_tokens = 3,
                              .candidates = {},
                              .top_p_mass = top_p_mass,
                              .min_tokens = 8,
                              .token_idx = Output(DType::kInt32, {rows(), num_sets, count}),
                              .num_selected = Output(DType::kInt32, {rows(), num_sets})};
      };
      const SelectTopKArgs direct = top_k(all.scores, budget);
      backend().SelectTopK(direct);
      // Twice as many, their scores, and the best of those.
      SelectTopKArgs wide = top_k(all.scores, 2 * budget);
      wide.top_p_mass = 1.0f;
      backend().SelectTopK(wide);
      const ScoreChosenArgs exact = {
          .q = all.q,
          .kv = kv,
          .sm_scale = all.sm_scale,
          .token_idx = wide.token_idx,
          .num_selected = wide.num_selected,
          .scores = Output(DType::kFloat32, {rows(), shape().num_q_heads, 2 * budget})};
      backend().ScoreChosen(exact);
      SelectTopKArgs narrow = top_k(exact.scores, budget);
      narrow.candidates = wide.token_idx;
      backend().SelectTopK(narrow);
      EXPECT_EQ(GetInts(narrow.token_idx), GetInts(direct.token_idx));
      EXPECT_EQ(GetInts(narrow.num_selected), GetInts(direct.num_selected));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, OpShadow,
                         ::testing::ValuesIn(Cases(AllBackends(), CommonHeadShapes(),
                                                   OddHeadShapes())),
                         CaseNameOf<OpCase<HeadShape>>);

// The same key and query on every instruction set: their product is an integer.
TEST(ShadowCode, KeepsProductsAndRefusesWhatIsNotFinite) {
  Random random(3);
  for (int head_dim : {2, 64, 80, 96, 128}) {
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
