// SelectTopK: which positions a sparse layer sees. Sets are compared exactly: ties, NaN and -inf
// included.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "backend_test.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kNumQHeads = 16, kNumKvHeads = 2;
// Two exp() in float32 differ by less than this, relatively, even after pooling.
constexpr double kSafeMargin = 1e-5;

struct SelectShape {
  std::string name;
  Granularity granularity = Granularity::kKvHead;
  Pooling pooling = Pooling::kSum;
};

struct Problem {
  Ints seq_lens;
  int64_t token_budget = 64;
  int64_t sink_tokens = 1;
  int64_t recent_tokens = 1;
  float top_p_mass = 1.0f;
  int64_t min_tokens = 0;
  std::vector<float> scores = {};  // [B, Hq, max_len]
  std::vector<float> lse = {};     // [B, Hq]

  // Longer than any row, and odd.
  int64_t max_len() const { return *std::max_element(seq_lens.begin(), seq_lens.end()) + 3; }
  float& score(int64_t b, int64_t head, int64_t t) {
    return scores[(b * kNumQHeads + head) * max_len() + t];
  }
};

class OpSelectTopK : public OpTest<SelectShape> {
 protected:
  // Room for scores; whatever lies past a row's end would win if it were read.
  static void MakeRoom(Problem& problem) {
    const size_t heads = problem.seq_lens.size() * kNumQHeads;
    problem.scores.assign(heads * problem.max_len(), kInf);
    problem.lse.assign(heads, -kInf);
  }

  // score(b, head, t) for every position, and lse = their log-sum-exp over finite ones.
  template <typename ScoreOf>
  static void Fill(Problem& problem, const ScoreOf& score_of) {
    MakeRoom(problem);
    for (size_t b = 0; b < problem.seq_lens.size(); ++b) {
      for (int64_t head = 0; head < kNumQHeads; ++head) {
        double sum = 0.0;
        for (int32_t t = 0; t < problem.seq_lens[b]; ++t) {
          const float score = score_of(static_cast<int64_t>(b), head, t);
          problem.score(b, head, t) = score;
          if (std::isfinite(score)) sum += std::exp(static_cast<double>(score));
        }
        const bool usable = problem.seq_lens[b] > 0 && sum > 0.0;
        problem.lse[b * kNumQHeads + head] = usable ? static_cast<float>(std::log(sum)) : -kInf;
      }
    }
  }

  // Random scores whose last chosen and first refused positions are further apart than rounding.
  void FillSeparated(Problem& problem) const {
    for (uint64_t seed = 1; seed < 100; ++seed) {
      Random random(seed);
      Fill(problem, [&](int64_t, int64_t, int32_t) {
        return static_cast<float>(random.Normal(1, DType::kFloat32, 3.0)[0]);
      });
      double margin = 0.0;
      bool separated = true;
      for (size_t b = 0; b < problem.seq_lens.size(); ++b) {
        reference::SelectTopK(RowProblem(problem, b), &margin);
        separated = separated && margin > kSafeMargin;
      }
      if (separated) return;
    }
    FAIL() << "no seed gives separated scores";
  }

  reference::SelectProblem RowProblem(const Problem& problem, size_t b) const {
    return {.scores = &problem.scores[b * kNumQHeads * problem.max_len()],
            .lse = &problem.lse[b * kNumQHeads],
            .max_len = problem.max_len(),
            .num_q_heads = kNumQHeads,
            .num_kv_heads = kNumKvHeads,
            .seq_len = problem.seq_lens[b],
            .token_budget = problem.token_budget,
            .sink_tokens = problem.sink_tokens,
            .recent_tokens = problem.recent_tokens,
            .top_p_mass = problem.top_p_mass,
            .min_tokens = problem.min_tokens,
            .granularity = shape().granularity,
            .pooling = shape().pooling};
  }

  void OpenFor(const Problem& problem) {
    StepLimits limits = SmallLimits(dtype());
    limits.model.num_q_heads = kNumQHeads;
    limits.model.num_kv_heads = kNumKvHeads;
    limits.max_seq_len = problem.max_len();
    limits.token_budget = problem.token_budget;
    limits.granularity = shape().granularity;
    Open(GetParam().on, limits);
  }

  // Runs the op; its outputs are in what is returned.
  SelectTopKArgs RunOp(const Problem& problem, DType score_dtype = DType::kFloat32) {
    const int64_t rows = static_cast<int64_t>(problem.seq_lens.size());
    const int64_t num_sets = NumSets(shape().granularity, kNumQHeads, kNumKvHeads);
    const Shape scores_shape = {rows, kNumQHeads, problem.max_len()};
    SelectTopKArgs args;
    args.scores =
        Put(Values(problem.scores.begin(), problem.scores.end()), score_dtype, scores_shape);
    args.lse =
        Put(Values(problem.lse.begin(), problem.lse.end()), DType::kFloat32, {rows, kNumQHeads});
    args.seq_lens = PutInts(problem.seq_lens, {rows});
    args.num_kv_heads = kNumKvHeads;
    args.granularity = shape().granularity;
    args.pooling = shape().pooling;
    args.sink_tokens = problem.sink_tokens;
    args.recent_tokens = problem.recent_tokens;
    args.top_p_mass = problem.top_p_mass;
    args.min_tokens = problem.min_tokens;
    args.token_idx = PutInts(Ints(rows * num_sets * problem.token_budget, 123456789),
                             {rows, num_sets, problem.token_budget});
    args.num_selected = Output(DType::kInt32, {rows, num_sets});
    backend().SelectTopK(args);
    return args;
  }

  // Runs the op and compares token_idx, padding included, and num_selected with the reference.
  void RunAndCheck(const Problem& problem) {
    const int64_t rows = static_cast<int64_t>(problem.seq_lens.size());
    const int64_t num_sets = NumSets(shape().granularity, kNumQHeads, kNumKvHeads);
    OpenFor(problem);
    const SelectTopKArgs args = RunOp(problem);
    const Ints got = GetInts(args.token_idx), num_selected = GetInts(args.num_selected);
    for (int64_t b = 0; b < rows; ++b) {
      const auto sets = reference::SelectTopK(RowProblem(problem, static_cast<size_t>(b)));
      for (int64_t set = 0; set < num_sets; ++set) {
        Ints want = sets[set];
        EXPECT_EQ(num_selected[b * num_sets + set], static_cast<int64_t>(want.size()))
            << "row " << b << ", set " << set;
        want.resize(problem.token_budget, -1);
        const auto begin = got.begin() + (b * num_sets + set) * problem.token_budget;
        EXPECT_EQ(Ints(begin, begin + problem.token_budget), want)
            << "row " << b << " of " << problem.seq_lens[b] << " tokens, set " << set;
      }
    }
  }
};

TEST_P(OpSelectTopK, TakesTheBestOfRandomScores) {
  Problem problem{.seq_lens = {1, 63, 64, 65, 500, 5000, 0, 2048}};
  FillSeparated(problem);
  RunAndCheck(problem);
}

TEST_P(OpSelectTopK, RowsThatAreReadInWholeVectors) {
  Problem problem{.seq_lens = {13, 66, 1027, 5001, 0, 4099}, .sink_tokens = 3};
  ASSERT_EQ(problem.max_len() % 4, 0);
  FillSeparated(problem);
  RunAndCheck(problem);
}

// Scores as a shadow gives them.
TEST_P(OpSelectTopK, ScoresOfAShadowChooseAlike) {
  for (float top_p_mass : {1.0f, 0.8f}) {
    if (top_p_mass < 1.0f && shape().pooling == Pooling::kMax) continue;
    SCOPED_TRACE(top_p_mass);
    Problem problem{.seq_lens = {1, 64, 65, 500, 5000, 0, 2048},
                    .sink_tokens = 2,
                    .recent_tokens = 3,
                    .top_p_mass = top_p_mass,
                    .min_tokens = 8};
    FillSeparated(problem);
    OpenFor(problem);
    const DType score_dtype = backend().shadow_score_dtype();
    for (float& score : problem.scores) {
      score = static_cast<float>(Rounded({score}, score_dtype)[0]);
    }
    const SelectTopKArgs want = RunOp(problem), got = RunOp(problem, score_dtype);
    EXPECT_EQ(GetInts(got.token_idx), GetInts(want.token_idx));
    EXPECT_EQ(GetInts(got.num_selected), GetInts(want.num_selected));
  }
}

TEST_P(OpSelectTopK, BudgetThatCoversTheRowTakesEverything) {
  Problem problem{.seq_lens = {100, 99, 1, 2}, .token_budget = 100};
  FillSeparated(problem);
  RunAndCheck(problem);
}

TEST_P(OpSelectTopK, BudgetOfOneTakesTheNewest) {
  Problem problem{.seq_lens = {300, 1, 0, 2}, .token_budget = 1, .sink_tokens = 0};
  FillSeparated(problem);
  RunAndCheck(problem);
}

TEST_P(OpSelectTopK, SinksAndRecentsAreAlwaysIn) {
  for (int64_t token_budget : {20, 21, 64}) {  // 20: no place left for a best score
    SCOPED_TRACE(token_budget);
    Problem problem{.seq_lens = {1000, 21, 20, 19, 3},
                    .token_budget = token_budget,
                    .sink_tokens = 4,
                    .recent_tokens = 16};
    // The always-chosen positions have the lowest scores.
    Fill(problem, [&](int64_t b, int64_t head, int32_t t) {
      const int32_t n = problem.seq_lens[b];
      const bool always = t < 4 || t >= n - 16;
      return always ? -9.0f : 0.02f * static_cast<float>((t * 7 + head) % 500);
    });
    RunAndCheck(problem);
  }
}

// What a backend keeps from one op to the next must not depend on what that op had to do.
TEST_P(OpSelectTopK, LeavesNothingBehindForTheNextChoice) {
  Problem best{.seq_lens = {5000, 300, 2048}};
  FillSeparated(best);
  Problem nothing_to_choose{.seq_lens = {4000, 21, 5000}, .sink_tokens = 4};
  nothing_to_choose.recent_tokens = nothing_to_choose.token_budget - 4;
  FillSeparated(nothing_to_choose);
  Problem ties{.seq_lens = {5000, 4999, 100}};
  Fill(ties, [](int64_t, int64_t, int32_t) { return 0.5f; });
  OpenFor(best);
  const Ints want = GetInts(RunOp(best).token_idx);
  for (const Problem* between : {&nothing_to_choose, &ties}) {
    RunOp(*between);
    EXPECT_EQ(GetInts(RunOp(best).token_idx), want);
  }
}

TEST_P(OpSelectTopK, AllScoresEqualTakesTheLowestPositions) {
  for (float score : {0.0f, 1.7f, -30.0f}) {
    SCOPED_TRACE(score);
    Problem problem{.seq_lens = {777, 5003, 65, 66}};
    Fill(problem, [&](int64_t, int64_t, int32_t) { return score; });
    RunAndCheck(problem);
  }
}

TEST_P(OpSelectTopK, TieGoesToTheLowerPosition) {
  for (uint64_t seed : {1, 2, 3}) {
    SCOPED_TRACE(seed);
    Problem problem{.seq_lens = {2001, 130, 5000}, .token_budget = 129};
    const Ints levels = Random(seed).Below(3 * 5000, 4);  // the same for all heads
    Fill(problem, [&](int64_t b, int64_t, int32_t t) {
      return 0.5f * static_cast<float>(levels[b * 5000 + t]);
    });
    RunAndCheck(problem);
  }
}

TEST_P(OpSelectTopK, MinusZeroTiesWithZero) {
  Problem problem{.seq_lens = {401}};
  Fill(problem, [](int64_t, int64_t, int32_t t) { return t % 3 == 0 ? -0.0f : 0.0f; });
  RunAndCheck(problem);
}

// Weights that underflow to 0 tie, however far apart their scores are; raw scores do not.
TEST_P(OpSelectTopK, UnderflowedWeightsTie) {
  Problem problem{.seq_lens = {1000}};
  const Ints rank = Random(8).Permutation(1000);
  Fill(problem, [&](int64_t, int64_t, int32_t t) {
    return rank[t] < 10 ? static_cast<float>(rank[t]) : -200.0f - static_cast<float>(rank[t]);
  });
  RunAndCheck(problem);
}

TEST_P(OpSelectTopK, NanRanksBelowMinusInfinity) {
  // 20 finite, 30 of -inf, the others NaN: a budget of 40 needs some of the -inf ones, 64 all and
  // some NaN.
  const Ints rank = Random(9).Permutation(500);
  for (int64_t token_budget : {10, 40, 64}) {
    SCOPED_TRACE(token_budget);
    Problem problem{.seq_lens = {500}, .token_budget = token_budget};
    Fill(problem, [&](int64_t, int64_t, int32_t t) {
      if (rank[t] < 20) return 0.1f * static_cast<float>(rank[t]);
      return rank[t] < 50 ? -kInf : std::numeric_limits<float>::quiet_NaN();
    });
    RunAndCheck(problem);
  }
}

TEST_P(OpSelectTopK, RowsOfNanOnlyGiveTheLowestPositions) {
  for (float nan :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN()}) {
    Problem problem{.seq_lens = {300, 64, 70}};
    Fill(problem, [&](int64_t, int64_t, int32_t) { return nan; });
    for (float& lse : problem.lse) lse = nan;  // as attention over NaN leaves it
    RunAndCheck(problem);
  }
}

TEST_P(OpSelectTopK, LongRow) {
  Problem problem{.seq_lens = {70000}, .token_budget = 1024, .sink_tokens = 2, .recent_tokens = 5};
  FillSeparated(problem);
  RunAndCheck(problem);
}

TEST_P(OpSelectTopK, LongRowOfFewDistinctScores) {
  Problem problem{.seq_lens = {70000}, .token_budget = 1000};
  const Ints levels = Random(10).Below(70000, 50);
  Fill(problem,
       [&](int64_t, int64_t, int32_t t) { return -0.25f * static_cast<float>(levels[t]); });
  RunAndCheck(problem);
}

// A length that vectors of scores divide, a first position that they do not, and rows that leave
// most blocks of a cluster nothing to do.
TEST_P(OpSelectTopK, LongAndShortRowsTogether) {
  for (int64_t sink_tokens : {1, 2, 3}) {
    SCOPED_TRACE(sink_tokens);
    Problem problem{.seq_lens = {40001, 65, 66, 71, 64, 0, 2100},
                    .token_budget = 64,
                    .sink_tokens = sink_tokens,
                    .recent_tokens = 2};
    FillSeparated(problem);
    RunAndCheck(problem);
  }
}

TEST_P(OpSelectTopK, LongRowMostlyOfNan) {
  // The -inf ones and the NaNs tie across many blocks; 400 needs some -inf, 2000 some NaN.
  const Ints rank = Random(12).Permutation(40001);
  for (int64_t token_budget : {400, 2000}) {
    SCOPED_TRACE(token_budget);
    Problem problem{.seq_lens = {40001}, .token_budget = token_budget};
    Fill(problem, [&](int64_t, int64_t, int32_t t) {
      if (rank[t] < 100) return 0.1f * static_cast<float>(rank[t]);
      return rank[t] < 1000 ? -kInf : std::numeric_limits<float>::quiet_NaN();
    });
    RunAndCheck(problem);
  }
}

TEST_P(OpSelectTopK, LastBitsOfRawScoresDecide) {
  if (shape().granularity != Granularity::kHead) GTEST_SKIP() << "their weights are equal";
  Problem problem{.seq_lens = {9001}, .token_budget = 1000};
  const Ints rank = Random(13).Permutation(9001);
  Fill(problem, [&](int64_t, int64_t, int32_t t) {
    return std::ldexp(static_cast<float>((1 << 23) + rank[t] / 2), -23);  // pairs tie
  });
  RunAndCheck(problem);
}

// More keys than the shared memory of one cluster of blocks holds.
TEST_P(OpSelectTopK, VeryLongRow) {
  constexpr int32_t kLength = 900000;
  Problem problem{.seq_lens = {kLength, 3000}, .token_budget = 2000, .sink_tokens = 1};
  const Ints levels = Random(11).Below(kLength, 3000);
  Fill(problem,
       [&](int64_t, int64_t, int32_t t) { return -0.004f * static_cast<float>(levels[t]); });
  RunAndCheck(problem);
}

// Scores whose sets reach the mass with few positions in some rows and never in others.
TEST_P(OpSelectTopK, MassDecidesHowManyAreTaken) {
  if (shape().pooling == Pooling::kMax) GTEST_SKIP() << "top_p_mass needs pooling kSum";
  for (float top_p_mass : {0.5f, 0.9f, 0.98f}) {
    for (int64_t min_tokens : {6, 20, 300}) {
      SCOPED_TRACE(Concat("mass ", top_p_mass, ", at least ", min_tokens));
      Problem problem{.seq_lens = {5000, 5, 6, 7, 21, 299, 301, 0, 800, 3000},
                      .token_budget = 300,
                      .sink_tokens = 2,
                      .recent_tokens = 4,
                      .top_p_mass = top_p_mass,
                      .min_tokens = min_tokens};
      FillSeparated(problem);
      RunAndCheck(problem);
    }
  }
}

TEST_P(OpSelectTopK, MassOfTiesTakesTheLowerPositions) {
  if (shape().pooling == Pooling::kMax) GTEST_SKIP() << "top_p_mass needs pooling kSum";
  // Every position holds 1 / 1000 of the mass; 0.2505 of it are 251 positions, 3 of them forced.
  Problem problem{.seq_lens = {1000, 1000},
                  .token_budget = 400,
                  .sink_tokens = 1,
                  .recent_tokens = 2,
                  .top_p_mass = 0.2505f,
                  .min_tokens = 3};
  Fill(problem, [](int64_t, int64_t, int32_t) { return 0.25f; });
  RunAndCheck(problem);
}

TEST_P(OpSelectTopK, MassOfSinksAndRecentsMayBeEnough) {
  if (shape().pooling == Pooling::kMax) GTEST_SKIP() << "top_p_mass needs pooling kSum";
  Problem problem{.seq_lens = {2000},
                  .token_budget = 128,
                  .sink_tokens = 1,
                  .recent_tokens = 8,
                  .top_p_mass = 0.9f,
                  .min_tokens = 9};
  Fill(problem, [](int64_t, int64_t head, int32_t t) {
    return t == 0 ? 20.0f : 0.001f * static_cast<float>((t * 7 + head) % 500);
  });
  RunAndCheck(problem);
}

TEST_P(OpSelectTopK, MassThatIsNeverReachedTakesTheBudget) {
  if (shape().pooling == Pooling::kMax) GTEST_SKIP() << "top_p_mass needs pooling kSum";
  Problem problem{
      .seq_lens = {3000, 64, 65}, .token_budget = 64, .top_p_mass = 0.999f, .min_tokens = 2};
  const Ints levels = Random(14).Permutation(3000);
  Fill(problem, [&](int64_t, int64_t, int32_t t) { return 1e-4f * static_cast<float>(levels[t]); });
  RunAndCheck(problem);
}

TEST_P(OpSelectTopK, MassCountsNanAsNothing) {
  if (shape().pooling == Pooling::kMax) GTEST_SKIP() << "top_p_mass needs pooling kSum";
  const Ints rank = Random(15).Permutation(900);
  Problem problem{.seq_lens = {900}, .token_budget = 100, .top_p_mass = 0.8f, .min_tokens = 2};
  Fill(problem, [&](int64_t, int64_t, int32_t t) {
    if (rank[t] < 30) return 0.3f * static_cast<float>(rank[t]);
    return rank[t] < 50 ? -kInf : std::numeric_limits<float>::quiet_NaN();
  });
  RunAndCheck(problem);
}

// More positions than a block keeps the keys of.
TEST_P(OpSelectTopK, MassOfALargeBudget) {
  if (shape().pooling == Pooling::kMax) GTEST_SKIP() << "top_p_mass needs pooling kSum";
  Problem problem{
      .seq_lens = {40001, 30000}, .token_budget = 20000, .top_p_mass = 0.7f, .min_tokens = 64};
  const Ints levels = Random(16).Permutation(40001);
  Fill(problem, [&](int64_t, int64_t, int32_t t) {
    return std::log(0.5f + static_cast<float>(levels[t] % 20000));
  });
  RunAndCheck(problem);
}

INSTANTIATE_TEST_SUITE_P(Backends, OpSelectTopK,
                         ::testing::ValuesIn(Cases<SelectShape>(
                             EachDevice(), {{"kv_head_sum", Granularity::kKvHead, Pooling::kSum},
                                            {"kv_head_max", Granularity::kKvHead, Pooling::kMax},
                                            {"head", Granularity::kHead, Pooling::kSum},
                                            {"layer_sum", Granularity::kLayer, Pooling::kSum},
                                            {"layer_max", Granularity::kLayer, Pooling::kMax}})),
                         CaseNameOf<OpCase<SelectShape>>);

}  // namespace
}  // namespace tidal::test
