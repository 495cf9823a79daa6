// What the layers of a model may do to attention (AttentionRule): windows, sinks and soft caps, in
// every attention op.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "paged_cache.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

constexpr int32_t kLongest = 800;
constexpr int32_t kLongContext = 9000;

struct RuleCase {
  std::string name;
  double softcap;
  int64_t window;
  double sinks;  // their standard deviation; 0: none
};

const std::vector<RuleCase>& Rules() {
  static const auto* rules = new std::vector<RuleCase>{
      {"window of the token itself", 0.0, 1, 0.0},
      {"window within a block", 0.0, 7, 0.0},
      {"window of a block", 0.0, 64, 0.0},
      {"window over blocks", 0.0, 129, 0.0},
      {"window over spans", 0.0, 700, 0.0},
      {"window that nothing reaches", 0.0, 4096, 0.0},
      {"soft cap", 5.0, 0, 0.0},
      {"sinks", 0.0, 0, 4.0},
      {"sinks above all scores", 0.0, 0, 40.0},
      {"all at once", 3.0, 100, 6.0},
  };
  return *rules;
}

class OpAttentionRule : public AttentionTest {
 protected:
  void SetUp() override {
    AttentionTest::SetUp();
    if (IsSkipped()) return;
    StepLimits limits = Limits();
    limits.max_seq_len = kLongContext;
    Open(GetParam().on, limits);
  }

  int64_t q_size() const { return shape().num_q_heads * shape().head_dim; }

  // Makes the engine's rule, and what the reference is to know of it.
  AttentionRule Make(const RuleCase& rule, reference::AttendRule& want) {
    want.softcap = rule.softcap;
    want.window = rule.window;
    AttentionRule made = {.sm_scale = static_cast<float>(sm_scale()),
                          .softcap = static_cast<float>(rule.softcap),
                          .window = rule.window};
    if (rule.sinks > 0.0) {
      want.sinks = random_.Normal(shape().num_q_heads, DType::kFloat32, rule.sinks);
      made.sinks = Put(want.sinks, DType::kFloat32, {shape().num_q_heads});
    }
    return made;
  }

  // Chunks of q_lens[b] queries at the end of sequences of seq_lens[b] tokens; whether a decode
  // step asks.
  void ExpectMatch(const Ints& seq_lens, const Ints& q_lens, bool decodes,
                   const std::vector<RuleCase>& rules = Rules()) {
    const auto sequences = RandomSequences(random_, shape(), seq_lens, kv_dtype());
    const int64_t tokens = std::accumulate(q_lens.begin(), q_lens.end(), int64_t{0});
    const Values q = random_.Normal(tokens * q_size(), act(), 3.0);
    for (const RuleCase& rule : rules) {
      SCOPED_TRACE(rule.name);
      ExpectRule(rule, sequences, q, q_lens, decodes);
    }
  }

  void ExpectRule(const RuleCase& rule, std::vector<reference::Sequence> sequences, const Values& q,
                  const Ints& q_lens, bool decodes) {
    Ints seq_lens;
    for (const auto& sequence : sequences) {
      seq_lens.push_back(static_cast<int32_t>(sequence.seq_len()));
    }
    reference::AttendRule reference_rule(sm_scale());
    const AttentionRule made = Make(rule, reference_rule);
    Values want;
    Ints q_starts = {0};
    const double* next = q.data();
    for (size_t b = 0; b < seq_lens.size(); ++b) {
      q_starts.push_back(q_starts.back() + q_lens[b]);
      for (int32_t end = seq_lens[b] - q_lens[b] + 1; end <= seq_lens[b]; ++end) {
        const Values row =
            reference::AttendRange(next, shape().num_q_heads, sequences[b], end, reference_rule);
        want.insert(want.end(), row.begin(), row.end());
        next += q_size();
      }
      if (rule.window > 0) ForgetOld(sequences[b], seq_lens[b] - q_lens[b] - rule.window);
    }
    const PagedKv kv = PutCache(sequences, shape().page_size);
    const Shape q_shape = {q_starts.back(), shape().num_q_heads, shape().head_dim};
    const TensorView query = Put(q, act(), q_shape), out = Output(act(), q_shape);
    if (decodes) {
      backend().AttentionFull({.q = query, .kv = kv, .rule = made, .out = out});
    } else {
      backend().AttentionPrefill(
          {.q = query,
           .q_starts = PutInts(q_starts, {static_cast<int64_t>(q_starts.size())}),
           .kv = kv,
           .rule = made,
           .out = out,
           .max_q_len = *std::max_element(q_lens.begin(), q_lens.end()),
           .max_seq_len = *std::max_element(seq_lens.begin(), seq_lens.end())});
    }
    EXPECT_TRUE(Close(Get(out), want, ToleranceFor(Op::kAttention, act())));
  }

  // What lies a block and more behind every window is not read: it may be anything.
  void ForgetOld(reference::Sequence& sequence, int64_t window_begin) const {
    constexpr int64_t kBlock = 256;
    const int64_t old = std::max<int64_t>(window_begin - kBlock, 0);
    const int64_t count = old * sequence.num_kv_heads * sequence.head_dim;
    std::fill_n(sequence.k.begin(), count, std::numeric_limits<double>::quiet_NaN());
    std::fill_n(sequence.v.begin(), count, std::numeric_limits<double>::quiet_NaN());
  }

  Random random_{21};
};

TEST_P(OpAttentionRule, DecodeMatchesReference) {
  ExpectMatch({1, 64, 0, 130, kLongest}, {1, 1, 1, 1, 1}, true);
}

TEST_P(OpAttentionRule, PromptsMatchReference) {
  ExpectMatch({40, 0, 345, kLongest}, {40, 0, 70, 35}, false);
}

TEST_P(OpAttentionRule, AFewQueriesMatchReference) {
  ExpectMatch({3, 40, 0, 775}, {3, 1, 0, 9}, false);
}

// Tokens are split among processors, and so are those of a window.
TEST_P(OpAttentionRule, WindowsBehindLongContextsMatchReference) {
  const std::vector<RuleCase> rules = {{"a window of few tokens", 0.0, 1000, 0.0},
                                       {"a window of many, and the others", 4.0, 4500, 5.0}};
  const Ints seq_lens = {kLongContext, 6001};
  ExpectMatch(seq_lens, {1, 1}, true, rules);
  ExpectMatch(seq_lens, {5, 17}, false, rules);
  // Prompts are not split there, and the reference would take minutes.
  if (!on().is_cpu()) ExpectMatch(seq_lens, {70, 40}, false, rules);
}

// So on the CPU a pass over drafts draws what decode steps would, wherever a window begins.
TEST_P(OpAttentionRule, AFewQueriesEqualDecodeStepsBitwiseOnTheCpu) {
  if (!on().is_cpu()) GTEST_SKIP() << "elsewhere they do to rounding";
  constexpr int32_t kQueries = 9;
  for (int32_t seq_len : {90, 517}) {
    const PagedKv kv =
        PutCache(RandomSequences(random_, shape(), {seq_len}, kv_dtype()), shape().page_size);
    const Shape q_shape = {kQueries, shape().num_q_heads, shape().head_dim};
    const TensorView q = Put(random_.Normal(kQueries * q_size(), act(), 3.0), act(), q_shape);
    for (const RuleCase& rule : Rules()) {
      SCOPED_TRACE(Concat(rule.name, " at ", seq_len));
      reference::AttendRule unused(sm_scale());
      const AttentionRule made = Make(rule, unused);
      const TensorView out = Output(act(), q_shape);
      backend().AttentionPrefill({.q = q,
                                  .q_starts = PutInts({0, kQueries}, {2}),
                                  .kv = kv,
                                  .rule = made,
                                  .out = out,
                                  .max_q_len = kQueries,
                                  .max_seq_len = seq_len});
      for (int32_t i = 0; i < kQueries; ++i) {
        PagedKv seen = kv;
        seen.seq_lens = PutInts({seq_len - kQueries + 1 + i}, {1});
        const TensorView decoded = Output(act(), {1, shape().num_q_heads, shape().head_dim});
        backend().AttentionFull({.q = q.Rows(i, 1), .kv = seen, .rule = made, .out = decoded});
        ASSERT_TRUE(SameBits(GetBytes(out.Rows(i, 1)), GetBytes(decoded), DTypeBytes(act())));
      }
    }
  }
}

// Layers that choose have no windows. Scores and lse are about tokens alone, capped.
TEST_P(OpAttentionRule, ChoosingAndChosenMatchReference) {
  const Ints seq_lens = {70, 600};
  const int64_t heads = shape().num_q_heads, max_len = 600;
  for (const RuleCase& rule : Rules()) {
    if (rule.window > 0) continue;
    SCOPED_TRACE(rule.name);
    const auto sequences = RandomSequences(random_, shape(), seq_lens, kv_dtype());
    const Values q = random_.Normal(2 * q_size(), act(), 3.0);
    reference::AttendRule reference_rule(sm_scale());
    const PagedKv kv = PutCache(sequences, shape().page_size);
    const AttentionArgs attention = {.q = Put(q, act(), {2, heads, shape().head_dim}),
                                     .kv = kv,
                                     .rule = Make(rule, reference_rule),
                                     .out = Output(act(), {2, heads, shape().head_dim})};
    const AttentionSelectArgs select = {.attention = attention,
                                        .scores = Output(DType::kFloat32, {2, heads, max_len}),
                                        .lse = Output(DType::kFloat32, {2, heads})};
    backend().AttentionSelect(select);
    const TensorView full = Output(act(), {2, heads, shape().head_dim});
    backend().AttentionFull({.q = attention.q, .kv = kv, .rule = attention.rule, .out = full});
    EXPECT_TRUE(SameBits(GetBytes(attention.out), GetBytes(full), DTypeBytes(act())));
    const ScoreKeysArgs scored = {.q = attention.q,
                                  .kv = kv,
                                  .shadow = {},
                                  .rule = attention.rule,
                                  .scores = Output(DType::kFloat32, {2, heads, max_len}),
                                  .lse = Output(DType::kFloat32, {2, heads})};
    backend().ScoreKeys(scored);
    EXPECT_TRUE(SameBits(GetBytes(scored.scores), GetBytes(select.scores), 4));

    Values want_lse, want_out, got_scores, want_scores;
    const Values scores = Get(select.scores);
    const Ints chosen = {0, 3, 17, 40, 69};
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t head = 0; head < heads; ++head) {
        const double* q_head = &q[(b * heads + head) * shape().head_dim];
        const int64_t kv_head = head * shape().num_kv_heads / heads;
        const auto all =
            reference::AttendHead(q_head, sequences[b], kv_head,
                                  Random(0).Subset(seq_lens[b], seq_lens[b]), reference_rule);
        want_lse.push_back(all.lse);
        want_scores.insert(want_scores.end(), all.scores.begin(), all.scores.end());
        const auto begin = scores.begin() + (b * heads + head) * max_len;
        got_scores.insert(got_scores.end(), begin, begin + seq_lens[b]);
        const auto sink =
            reference_rule.sinks.empty() ? std::nullopt : std::optional(reference_rule.sinks[head]);
        const Values out =
            reference::AttendHead(q_head, sequences[b], kv_head, chosen, reference_rule, sink).out;
        want_out.insert(want_out.end(), out.begin(), out.end());
      }
    }
    EXPECT_TRUE(Close(Get(select.lse), want_lse, ToleranceFor(Op::kScores, DType::kFloat32)));
    EXPECT_TRUE(Close(Get(scored.lse), want_lse, ToleranceFor(Op::kScores, DType::kFloat32)));
    EXPECT_TRUE(Close(got_scores, want_scores, ToleranceFor(Op::kScores, DType::kFloat32)));

    Ints token_idx = chosen;
    token_idx.insert(token_idx.end(), chosen.begin(), chosen.end());
    const auto size = static_cast<int32_t>(chosen.size());
    backend().AttentionSparse({.attention = attention,
                               .token_idx = PutInts(token_idx, {2, 1, size}),
                               .num_selected = PutInts({size, size}, {2, 1})});
    EXPECT_TRUE(Close(Get(attention.out), want_out, ToleranceFor(Op::kAttention, act())));
  }
}

std::vector<HeadShape> RuleShapes() {
  std::vector<HeadShape> shapes = FewHeadShapes();
  shapes.insert(shapes.end(), {{"group3_d64_page32", 6, 2, 64, 32},
                               {"group8_d128_page256", 8, 1, 128, 256},
                               {"group12_d64_page64", 12, 1, 64, 64}});
  return shapes;
}

INSTANTIATE_TEST_SUITE_P(Backends, OpAttentionRule,
                         ::testing::ValuesIn(HeadCases(AllCaches(), RuleShapes())),
                         CaseNameOf<OpCase<HeadShape>>);

}  // namespace
}  // namespace tidal::test
