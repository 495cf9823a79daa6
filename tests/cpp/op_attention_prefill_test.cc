// AttentionPrefill: causal attention of prompt chunks over the paged cache.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "paged_cache.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

// Row b: the last q_lens[b] of seq_lens[b] tokens are the chunk's queries.
struct Chunk {
  std::string name;
  Ints seq_lens;
  Ints q_lens;
};

const std::vector<Chunk>& Chunks() {
  static const auto* chunks = new std::vector<Chunk>{
      {"whole prompts from position 0", {1, 77, 128}, {1, 77, 128}},
      {"chunks in the middle", {300, 513}, {64, 129}},
      {"one query each", {1, 2, 65, 400}, {1, 1, 1, 1}},
      {"ragged, with rows that have no query", {0, 130, 50, 333, 17}, {0, 37, 0, 95, 17}},
      {"one long chunk", {611}, {251}},
      {"a few queries over long rows", {3000, 1, 40, 0, 2500}, {5, 1, 32, 0, 17}},
      {"more than a few", {600, 50}, {33, 1}},
      {"several tiles of queries, from the start and later", {385, 600, 257}, {385, 190, 129}},
      {"whole tiles", {256, 384}, {256, 128}},
      {"some behind long contexts, beside others", {2000, 40, 0, 1500, 90}, {40, 40, 0, 1, 33}},
  };
  return *chunks;
}

class OpAttentionPrefill : public AttentionTest {
 protected:
  void SetUp() override {
    AttentionTest::SetUp();
    if (!IsSkipped()) Open(GetParam().on, Limits());
  }

  int64_t q_size() const { return shape().num_q_heads * shape().head_dim; }

  AttentionPrefillArgs Args(const PagedKv& kv, const Chunk& chunk, const Values& q) {
    Ints q_starts = {0};
    for (int32_t q_len : chunk.q_lens) q_starts.push_back(q_starts.back() + q_len);
    const Shape q_shape = {q_starts.back(), shape().num_q_heads, shape().head_dim};
    return {.q = Put(q, act(), q_shape),
            .q_starts = PutInts(q_starts, {static_cast<int64_t>(q_starts.size())}),
            .kv = kv,
            .rule = {.sm_scale = static_cast<float>(sm_scale())},
            .out = Output(act(), q_shape),
            .max_q_len = *std::max_element(chunk.q_lens.begin(), chunk.q_lens.end()),
            .max_seq_len = *std::max_element(chunk.seq_lens.begin(), chunk.seq_lens.end())};
  }

  Values RandomQ(Random& random, const Chunk& chunk) {
    const int64_t rows = std::accumulate(chunk.q_lens.begin(), chunk.q_lens.end(), int64_t{0});
    return random.Normal(rows * q_size(), act(), 3.0);
  }

  Values Want(const Chunk& chunk, const std::vector<reference::Sequence>& sequences,
              const Values& q) const {
    Values want;
    const double* next = q.data();
    for (size_t b = 0; b < sequences.size(); ++b) {
      for (int32_t end = chunk.seq_lens[b] - chunk.q_lens[b] + 1; end <= chunk.seq_lens[b]; ++end) {
        const Values row =
            reference::AttendRange(next, shape().num_q_heads, sequences[b], end, sm_scale());
        want.insert(want.end(), row.begin(), row.end());
        next += q_size();
      }
    }
    return want;
  }

  // The last `count` tokens of `behind` + count in `kv`, which may hold more. Of many queries
  // behind a long context only some are compared, since the reference is slow.
  void ExpectChunkMatches(const reference::Sequence& sequence, PagedKv kv, int32_t behind,
                          const Values& q, int32_t count) {
    SCOPED_TRACE(Concat(count, " tokens behind ", behind));
    const Chunk chunk = {"", {behind + count}, {count}};
    kv.seq_lens = PutInts(chunk.seq_lens, {1});
    const Values queries(q.begin(), q.begin() + count * q_size());
    const AttentionPrefillArgs args = Args(kv, chunk, queries);
    backend().AttentionPrefill(args);
    const Values out = Get(args.out);
    Values got, want;
    for (int32_t query = 0; query < count; query += 1 + behind / 700) {
      const Values row = reference::AttendRange(q.data() + query * q_size(), shape().num_q_heads,
                                                sequence, behind + query + 1, sm_scale());
      want.insert(want.end(), row.begin(), row.end());
      got.insert(got.end(), out.begin() + query * q_size(), out.begin() + (query + 1) * q_size());
    }
    EXPECT_TRUE(Close(got, want, ToleranceFor(Op::kAttention, act())));
  }

  // Writes no row past the last, and reads nothing from there that matters.
  void ExpectIdleTokens(const Chunk& chunk) {
    Random random(4);
    const auto sequences = RandomSequences(random, shape(), chunk.seq_lens, kv_dtype());
    const PagedKv kv = PutCache(sequences, shape().page_size);
    Values q = RandomQ(random, chunk);
    AttentionPrefillArgs args = Args(kv, chunk, q);
    backend().AttentionPrefill(args);
    Bytes want = GetBytes(args.out);
    const size_t idle = static_cast<size_t>(7 * q_size());
    want.resize(want.size() + idle * DTypeBytes(act()), 0xff);

    q.resize(q.size() + idle, std::nan(""));
    const Shape q_shape = {args.q.dim(0) + 7, shape().num_q_heads, shape().head_dim};
    args.q = Put(q, act(), q_shape);
    args.out = Output(act(), q_shape);
    args.max_q_len += 8;
    args.max_seq_len = 1000;
    backend().AttentionPrefill(args);
    EXPECT_TRUE(SameBits(GetBytes(args.out), want, DTypeBytes(act())));
  }
};

TEST_P(OpAttentionPrefill, MatchesReference) {
  Random random(1);
  for (const Chunk& chunk : Chunks()) {
    SCOPED_TRACE(chunk.name);
    const auto sequences = RandomSequences(random, shape(), chunk.seq_lens, kv_dtype());
    const Values q = RandomQ(random, chunk);
    const AttentionPrefillArgs args = Args(PutCache(sequences, shape().page_size), chunk, q);
    backend().AttentionPrefill(args);
    EXPECT_TRUE(
        Close(Get(args.out), Want(chunk, sequences, q), ToleranceFor(Op::kAttention, act())));
  }
}

// Where few queries see many tokens CUDA splits the tokens; 600 puts the end of a split among the
// positions of a tile's queries.
TEST_P(OpAttentionPrefill, ShortChunksBehindLongContexts) {
  constexpr int32_t kMost = 520;
  Random random(11);
  const Values q = RandomQ(random, {"", {}, {kMost}});
  for (int32_t behind : {0, 63, 600, 1000, 5000, 20000}) {
    if (on().is_cpu() && behind > 63) continue;  // it splits nothing, and would take minutes
    const auto sequences = RandomSequences(random, shape(), {behind + kMost}, kv_dtype());
    const PagedKv kv = PutCache(sequences, shape().page_size);
    for (int32_t count : {1, 7, 64, 100, 200, kMost}) {
      ExpectChunkMatches(sequences[0], kv, behind, q, count);
    }
  }
}

// Whichever block of a tile ends last, and in a recorded step as well.
TEST_P(OpAttentionPrefill, ASplitChunkHasTheSameBitsEveryTime) {
  if (on().is_cpu()) GTEST_SKIP() << "splits nothing";
  Random random(12);
  for (const Chunk& chunk : {Chunk{"few", {3000}, {40}}, Chunk{"more", {4100, 2500}, {200, 64}}}) {
    SCOPED_TRACE(chunk.name);
    const auto sequences = RandomSequences(random, shape(), chunk.seq_lens, kv_dtype());
    const AttentionPrefillArgs args =
        Args(PutCache(sequences, shape().page_size), chunk, RandomQ(random, chunk));
    ExpectStepEqualsOps([&] { backend().AttentionPrefill(args); }, {args.out});
    const Bytes first = GetBytes(args.out);
    for (int round = 0; round < 5; ++round) {
      backend().AttentionPrefill(args);
      ASSERT_TRUE(SameBits(GetBytes(args.out), first, DTypeBytes(act())));
    }
  }
}

TEST_P(OpAttentionPrefill, PageSizeDoesNotChangeBits) {
  Random random(2);
  const Chunk chunk = {"", {300, 77, 1600}, {129, 77, 50}};
  const auto sequences = RandomSequences(random, shape(), chunk.seq_lens, kv_dtype());
  const Values q = RandomQ(random, chunk);
  Ints page_sizes = {8, 16, 32, 64, 128, 256};
  if (on().is_cpu()) page_sizes.insert(page_sizes.end(), {1, 7});
  Bytes first;
  for (int32_t page_size : page_sizes) {
    SCOPED_TRACE(page_size);
    StepLimits limits = Limits();
    limits.page_size = page_size;
    Open(GetParam().on, limits);
    const AttentionPrefillArgs args = Args(PutCache(sequences, page_size), chunk, q);
    backend().AttentionPrefill(args);
    const Bytes out = GetBytes(args.out);
    if (first.empty()) first = out;
    EXPECT_TRUE(SameBits(out, first, DTypeBytes(act())));
  }
}

// What a chunk's last query sees is what a decode step with the same query sees.
TEST_P(OpAttentionPrefill, LastQueryEqualsDecodeToRounding) {
  Random random(3);
  const Chunk chunk = {"", {400, 65}, {1, 1}};
  const auto sequences = RandomSequences(random, shape(), chunk.seq_lens, kv_dtype());
  const Values q = RandomQ(random, chunk);
  const PagedKv kv = PutCache(sequences, shape().page_size);
  const AttentionPrefillArgs prefill = Args(kv, chunk, q);
  const TensorView decoded = Output(act(), {2, shape().num_q_heads, shape().head_dim});
  backend().AttentionPrefill(prefill);
  backend().AttentionFull({.q = prefill.q, .kv = kv, .rule = prefill.rule, .out = decoded});
  EXPECT_TRUE(Close(Get(prefill.out), Get(decoded), ToleranceFor(Op::kAttention, act())));
}

// A recorded pass has room for more tokens than its rows may have, and bounds that fit any.
TEST_P(OpAttentionPrefill, TokensPastTheLastRowAreIdle) {
  for (const Chunk& chunk : {Chunk{"a few queries", {300, 0, 77}, {5, 0, 9}},
                             Chunk{"many", {300, 0, 77}, {135, 0, 77}}}) {
    SCOPED_TRACE(chunk.name);
    ExpectIdleTokens(chunk);
  }
}

// So on the CPU a pass over drafts draws what decode steps would.
TEST_P(OpAttentionPrefill, AFewQueriesEqualDecodeStepsBitwiseOnTheCpu) {
  if (!on().is_cpu()) GTEST_SKIP() << "elsewhere they do to rounding";
  Random random(5);
  const Chunk chunk = {"", {520, 66}, {17, 3}};
  const auto sequences = RandomSequences(random, shape(), chunk.seq_lens, kv_dtype());
  const PagedKv kv = PutCache(sequences, shape().page_size);
  const AttentionPrefillArgs args = Args(kv, chunk, RandomQ(random, chunk));
  backend().AttentionPrefill(args);
  for (int32_t i = 0; i < 17; ++i) {
    PagedKv seen = kv;
    seen.seq_lens = PutInts({504 + i}, {1});
    seen.page_table = kv.page_table.Rows(0, 1);
    const TensorView decoded = Output(act(), {1, shape().num_q_heads, shape().head_dim});
    backend().AttentionFull(
        {.q = args.q.Rows(i, 1), .kv = seen, .rule = args.rule, .out = decoded});
    EXPECT_TRUE(SameBits(GetBytes(args.out.Rows(i, 1)), GetBytes(decoded), DTypeBytes(act())));
  }
}

// The same through cuDNN, where it is installed. It does not promise bits, passes of a few queries
// never come to it, and it multiplies free slots by 0, so here they hold numbers.
class OpAttentionPrefillCudnn : public OpAttentionPrefill {
 protected:
  static constexpr double kFreeSlots = 1000.0;

  void SetUp() override {
    AttentionTest::SetUp();
    if (IsSkipped()) return;
    Open(GetParam().on, Limits(), {.device = {}, .prefill_attention = PrefillAttention::kCudnn});
    const std::string with = backend().info().prefill_attention;
    if (with.rfind("cuDNN", 0) != 0) GTEST_SKIP() << "needs cuDNN: " << with;
  }

  void ExpectMatch(Random& random, const Chunk& chunk, int64_t page_size) {
    SCOPED_TRACE(chunk.name);
    const auto sequences = RandomSequences(random, shape(), chunk.seq_lens, kv_dtype());
    const Values q = RandomQ(random, chunk);
    const AttentionPrefillArgs args = Args(PutCache(sequences, page_size, kFreeSlots), chunk, q);
    backend().AttentionPrefill(args);
    EXPECT_TRUE(
        Close(Get(args.out), Want(chunk, sequences, q), ToleranceFor(Op::kAttention, act())));
  }
};

TEST_P(OpAttentionPrefillCudnn, MatchesReference) {
  Random random(6);
  for (const Chunk& chunk : Chunks()) ExpectMatch(random, chunk, shape().page_size);
}

// One sequence, as the engine reads prompts: first, middle and last chunks, lengths around the
// kernels' tiles.
TEST_P(OpAttentionPrefillCudnn, MatchesReferenceOnChunksOfOnePrompt) {
  Random random(7);
  const std::vector<std::pair<int32_t, int32_t>> lengths = {
      {256, 256}, {512, 256}, {600, 88}, {33, 33}, {129, 128}, {1025, 255}, {640, 640}, {701, 301}};
  for (const auto& [seq_len, q_len] : lengths) {
    ExpectMatch(random, {Concat(q_len, " of ", seq_len), {seq_len}, {q_len}}, shape().page_size);
  }
}

TEST_P(OpAttentionPrefillCudnn, MatchesReferenceAtEveryPageSize) {
  Random random(8);
  for (int64_t page_size : {16, 32, 64, 128}) {
    ExpectMatch(random, {Concat("pages of ", page_size), {300, 77}, {129, 77}}, page_size);
  }
}

TEST_P(OpAttentionPrefillCudnn, TokensPastTheLastRowAreIdle) {
  Random random(9);
  const Chunk chunk = {"", {300, 77}, {130, 40}};
  const auto sequences = RandomSequences(random, shape(), chunk.seq_lens, kv_dtype());
  Values q = RandomQ(random, chunk);
  AttentionPrefillArgs args = Args(PutCache(sequences, shape().page_size, kFreeSlots), chunk, q);
  backend().AttentionPrefill(args);
  Bytes want = GetBytes(args.out);
  const size_t idle = static_cast<size_t>(150 * q_size());
  want.resize(want.size() + idle * DTypeBytes(act()), 0xff);

  q.resize(q.size() + idle, std::nan(""));
  const Shape q_shape = {170 + 150, shape().num_q_heads, shape().head_dim};
  args.q = Put(q, act(), q_shape);
  args.out = Output(act(), q_shape);
  backend().AttentionPrefill(args);
  EXPECT_TRUE(SameBits(GetBytes(args.out), want, DTypeBytes(act())));
}

TEST_P(OpAttentionPrefillCudnn, ARecordedStepIsLeftToTheOwnKernel) {
  Random random(10);
  const Chunk chunk = {"", {300}, {200}};
  const auto sequences = RandomSequences(random, shape(), chunk.seq_lens, kv_dtype());
  const AttentionPrefillArgs args =
      Args(PutCache(sequences, shape().page_size, kFreeSlots), chunk, RandomQ(random, chunk));
  Bytes eager;
  for (int round = 0; round < 3; ++round) {
    backend().RunStep({.batch_size = 1}, [&] { backend().AttentionPrefill(args); });
    if (round == 0) eager = GetBytes(args.out);
    EXPECT_TRUE(SameBits(GetBytes(args.out), eager, DTypeBytes(act())));
  }
}

INSTANTIATE_TEST_SUITE_P(Cudnn, OpAttentionPrefillCudnn,
                         ::testing::ValuesIn(Cases({{DeviceType::kCuda, DType::kBFloat16},
                                                    {DeviceType::kCuda, DType::kFloat16}},
                                                   CommonHeadShapes())),
                         CaseNameOf<OpCase<HeadShape>>);

INSTANTIATE_TEST_SUITE_P(Backends, OpAttentionPrefill,
                         ::testing::ValuesIn(HeadCases(AllCaches(), CommonHeadShapes())),
                         CaseNameOf<OpCase<HeadShape>>);

}  // namespace
}  // namespace tidal::test
