// The edge of the ops: a tensor whose shape or dtype does not fit the others is refused by name.
#include "backend/check_args.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

// Nothing is read: any address will do.
char memory;

TensorView Tensor(DType dtype, std::initializer_list<int64_t> shape) {
  return {&memory, dtype, shape};
}
TensorView Float(std::initializer_list<int64_t> shape) {
  return Tensor(DType::kFloat32, shape);
}
TensorView Int(std::initializer_list<int64_t> shape) {
  return Tensor(DType::kInt32, shape);
}
TensorView Half(std::initializer_list<int64_t> shape) {
  return Tensor(DType::kBFloat16, shape);
}

// B = 2, Hq = 6, Hkv = 2, D = 20, page_size 7.
PagedKv Cache() {
  return {.k_pages = Half({9, 2, 7, 20}),
          .v_pages = Half({9, 2, 7, 20}),
          .page_table = Int({2, 4}),
          .seq_lens = Int({2})};
}

AttentionArgs Attention() {
  return {
      .q = Float({2, 6, 20}), .kv = Cache(), .rule = {.sm_scale = 1.0f}, .out = Float({2, 6, 20})};
}

template <typename Args>
void ExpectRefused(const Args& args, std::initializer_list<std::string> parts) {
  EXPECT_TRUE(Throws<InvalidArgument>([&] { Check(args); }, parts));
}

TEST(CheckArgs, EmbedTiesTokensAndWidth) {
  const EmbedArgs good = {.token_ids = Int({3}), .table = Half({50, 8}), .out = Float({3, 8})};
  EXPECT_NO_THROW(Check(good));
  EmbedArgs bad = good;
  bad.out = Float({4, 8});
  ExpectRefused(bad, {"Embed", "out", "[4, 8]", "T = 3"});
  bad = good;
  bad.token_ids = Float({3});
  ExpectRefused(bad, {"Embed", "token_ids", "float32", "int32"});
  bad = good;
  bad.table.ptr = nullptr;
  ExpectRefused(bad, {"Embed", "table", "no memory"});
}

TEST(CheckArgs, AnInt8CacheNeedsItsScales) {
  AttentionArgs args = Attention();
  args.kv.k_pages = args.kv.v_pages = Tensor(DType::kInt8, {9, 2, 7, 20});
  ExpectRefused(args, {"k_scales", "[num_pages = 9, Hkv = 2, page_size = 7]"});
  args.kv.k_scales = args.kv.v_scales = Float({9, 2, 7});
  EXPECT_NO_THROW(Check(args));
}

TEST(CheckArgs, OnlyAnFp8CacheHasOneScale) {
  AttentionArgs args = Attention();
  args.kv.v_scale = 0.5f;
  ExpectRefused(args, {"v_scale", "0.5", "1 of pages other than fp8"});
  args.kv.k_pages = args.kv.v_pages = Tensor(DType::kFloat8, {9, 2, 7, 20});
  EXPECT_NO_THROW(Check(args));
  for (float scale : {0.0f, -1.0f, std::nanf(""), INFINITY}) {
    args.kv.k_scale = scale;
    ExpectRefused(args, {"k_scale", "a finite number > 0"});
  }
}

TEST(CheckArgs, LinearTiesItsThreeSizes) {
  LinearArgs good;
  good.x = Half({3, 16});
  good.weight = Half({5, 16});
  good.out = Half({3, 5});
  EXPECT_NO_THROW(Check(good)) << "the bias may be absent";
  good.bias = Half({5});
  EXPECT_NO_THROW(Check(good));
  LinearArgs bad = good;
  bad.weight = Half({5, 17});
  ExpectRefused(bad, {"Linear", "weight", "[5, 17]", "K = 16"});
  bad = good;
  bad.bias = Half({6});
  ExpectRefused(bad, {"Linear", "bias", "[6]", "N = 5"});
  bad = good;
  bad.bias = Float({5});
  ExpectRefused(bad, {"Linear", "bias", "float32", "bfloat16"});
  bad = good;
  bad.out = Half({3});
  ExpectRefused(bad, {"Linear", "out", "[3]"});
}

TEST(CheckArgs, LinearAccumulatesIntoFloat32Only) {
  LinearArgs args;
  args.x = Half({3, 16});
  args.weight = Half({5, 16});
  args.out = Float({3, 5});
  EXPECT_NO_THROW(Check(args));
  args.output = LinearOutput::kAccumulate;
  EXPECT_NO_THROW(Check(args));
  args.out = Half({3, 5});
  ExpectRefused(args, {"Linear", "out", "bfloat16", "float32"});
}

TEST(CheckArgs, AttentionTiesTheCacheToTheQuery) {
  EXPECT_NO_THROW(Check(Attention()));
  AttentionArgs bad = Attention();
  bad.kv.k_pages = Half({9, 2, 7, 24});
  ExpectRefused(bad, {"k_pages", "[9, 2, 7, 24]", "D = 20"});
  bad = Attention();
  bad.kv.v_pages = Half({8, 2, 7, 20});
  ExpectRefused(bad, {"v_pages", "num_pages = 9"});
  bad = Attention();
  bad.kv.v_pages = Float({9, 2, 7, 20});
  ExpectRefused(bad, {"v_pages", "float32", "bfloat16"});
  bad = Attention();
  bad.kv.seq_lens = Int({3});
  ExpectRefused(bad, {"seq_lens", "[3]", "B = 2"});
  bad = Attention();
  bad.q = Float({2, 5, 20});
  bad.out = Float({2, 5, 20});
  ExpectRefused(bad, {"Hq = 5", "Hkv = 2"});
}

TEST(CheckArgs, TheNewestTokensAreOneOfEachRow) {
  const RopeAppendKvArgs good = {.qkv = Float({3, 200}),
                                 .cos_sin = Float({3, 20}),
                                 .q_norm = {},
                                 .k_norm = {},
                                 .positions = Int({3}),
                                 .seq_idx = Int({3}),
                                 .q = Float({3, 6, 20}),
                                 .kv = Cache()};
  EXPECT_NO_THROW(Check(good));
  RopeAppendKvArgs bad = good;
  bad.appended = Appended::kNewestOfEachRow;
  ExpectRefused(bad, {"RopeAppendKv", "3 tokens", "2 rows"});
}

TEST(CheckArgs, ABackendsActivationDtypeIsKept) {
  const AttentionArgs args = Attention();
  EXPECT_NO_THROW(Check(args, DType::kFloat32));
  EXPECT_TRUE(Throws<InvalidArgument>([&] { Check(args, DType::kBFloat16); },
                                      {"q", "float32", "bfloat16", "act"}));
}

TEST(CheckArgs, SelectTopKTiesSetsToGranularity) {
  SelectTopKArgs good;
  good.scores = Float({2, 6, 100});
  good.lse = Float({2, 6});
  good.seq_lens = Int({2});
  good.num_kv_heads = 2;
  good.token_idx = Int({2, 2, 8});
  good.num_selected = Int({2, 2});
  EXPECT_NO_THROW(Check(good));
  SelectTopKArgs bad = good;
  bad.granularity = Granularity::kHead;
  ExpectRefused(bad, {"SelectTopK", "token_idx", "num_sets = 6"});
  bad = good;
  bad.granularity = Granularity::kLayer;
  ExpectRefused(bad, {"SelectTopK", "token_idx", "num_sets = 1"});
  bad = good;
  bad.sink_tokens = 8;
  ExpectRefused(bad, {"SelectTopK", "sink_tokens 8", "token_budget = 8"});
  bad = good;
  bad.recent_tokens = 0;
  ExpectRefused(bad, {"SelectTopK", "recent_tokens 0"});
  bad = good;
  bad.num_selected = Int({2});
  ExpectRefused(bad, {"SelectTopK", "num_selected"});
}

TEST(CheckArgs, SelectTopKTakesAMassOfASum) {
  SelectTopKArgs good;
  good.scores = Float({2, 6, 100});
  good.lse = Float({2, 6});
  good.seq_lens = Int({2});
  good.num_kv_heads = 2;
  good.top_p_mass = 0.9f;
  good.min_tokens = 4;
  good.token_idx = Int({2, 2, 8});
  good.num_selected = Int({2, 2});
  EXPECT_NO_THROW(Check(good));
  for (float top_p_mass : {0.0f, 1.5f, -1.0f, std::numeric_limits<float>::quiet_NaN()}) {
    SelectTopKArgs bad = good;
    bad.top_p_mass = top_p_mass;
    ExpectRefused(bad, {"SelectTopK", "top_p_mass", "expected in (0, 1]"});
  }
  SelectTopKArgs bad = good;
  bad.pooling = Pooling::kMax;
  ExpectRefused(bad, {"SelectTopK", "top_p_mass", "kSum"});
  for (int64_t min_tokens : {0, 9}) {
    bad = good;
    bad.min_tokens = min_tokens;
    ExpectRefused(bad, {"SelectTopK", "min_tokens"});
  }
}

TEST(CheckArgs, ExpertsHaveABiasForEachOutput) {
  ExpertLinearArgs good = {.x = Float({3, 8}),
                           .weight = Weight(Half({20, 8})),
                           .bias = Half({20}),
                           .expert_ids = Int({3, 2}),
                           .out = Float({6, 5})};
  EXPECT_NO_THROW(Check(good));
  ExpertLinearArgs bad = good;
  bad.bias = Half({5});
  ExpectRefused(bad, {"ExpertLinear", "bias", "[5]", "E * N = 20"});
  bad.bias = Float({20});
  ExpectRefused(bad, {"ExpertLinear", "bias", "float32", "bfloat16"});
}

TEST(CheckArgs, ACorrectionIsOfEachExpert) {
  SelectExpertsArgs good = {.logits = Float({3, 8}),
                            .correction = Float({8}),
                            .expert_ids = Int({3, 2}),
                            .weights = Float({3, 2})};
  EXPECT_NO_THROW(Check(good));
  SelectExpertsArgs bad = good;
  bad.correction = Float({3});
  ExpectRefused(bad, {"SelectExperts", "correction", "[3]", "E = 8"});
  bad.correction = Half({8});
  ExpectRefused(bad, {"SelectExperts", "correction", "bfloat16", "float32"});
}

TEST(CheckArgs, AGateOfRowsIsOneRow) {
  GateRowsArgs good = {.x = Float({3, 8}), .weight = Half({1, 8}), .out = Float({3, 20})};
  EXPECT_NO_THROW(Check(good));
  GateRowsArgs bad = good;
  bad.weight = Half({2, 8});
  ExpectRefused(bad, {"GateRows", "weight", "[2, 8]"});
  bad = good;
  bad.out = Float({4, 20});
  ExpectRefused(bad, {"GateRows", "x", "T"});
}

TEST(CheckArgs, SparseTakesAnyKindOfSet) {
  AttentionSparseArgs args;
  args.attention = Attention();
  for (int64_t num_sets : {2, 6, 1}) {
    args.token_idx = Int({2, num_sets, 8});
    args.num_selected = Int({2, num_sets});
    EXPECT_NO_THROW(Check(args)) << num_sets;
  }
  args.token_idx = Int({2, 3, 8});
  args.num_selected = Int({2, 3});
  ExpectRefused(args, {"token_idx"});
}

TEST(CheckArgs, SampleRowsAreBytes) {
  SampleArgs good = {.logits = Float({2, 50}),
                     .rows = Tensor(DType::kUInt8, {2, 48}),
                     .seq_lens = Int({2}),
                     .history = Int({7, 50}),
                     .biases = Tensor(DType::kUInt8, {7, 80}),
                     .masks = Int({2, 2}),
                     .copies = Float({1, 50}),
                     .token_ids = Int({2})};
  EXPECT_NO_THROW(Check(good));
  SampleArgs bad = good;
  bad.rows = Tensor(DType::kUInt8, {2, 24});
  ExpectRefused(bad, {"Sample", "rows", "[2, 24]", "48"});
  bad = good;
  bad.history = Int({7, 51});
  ExpectRefused(bad, {"Sample", "history", "V = 50"});
  bad = good;
  bad.biases = Tensor(DType::kUInt8, {6, 80});
  ExpectRefused(bad, {"Sample", "biases", "num_slots = 7"});
  bad = good;
  bad.masks = Int({2, 1});
  ExpectRefused(bad, {"Sample", "masks", "W = 2"});
  bad = good;
  bad.copies = Float({1, 49});
  ExpectRefused(bad, {"Sample", "copies", "V = 50"});
}

TEST(CheckArgs, LogprobsOfRowsHaveAsManyValuesAsIds) {
  LogprobsArgs good = {.logits = Float({4, 50}),
                       .rows = Int({3}),
                       .token_ids = Int({3}),
                       .logprobs = Float({3, 6}),
                       .ids = Int({3, 6})};
  EXPECT_NO_THROW(Check(good));
  LogprobsArgs bad = good;
  bad.ids = Int({3, 5});
  ExpectRefused(bad, {"Logprobs", "ids", "1 + K = 6"});
  bad = good;
  bad.token_ids = Int({4});
  ExpectRefused(bad, {"Logprobs", "token_ids", "R = 3"});
}

TEST(CheckArgs, PrefillCountsOneStartMoreThanRows) {
  AttentionPrefillArgs args;
  args.q = args.out = Float({5, 6, 20});
  args.kv = Cache();
  args.q_starts = Int({3});
  EXPECT_NO_THROW(Check(args));
  args.q_starts = Int({2});
  ExpectRefused(args, {"AttentionPrefill", "q_starts", "B + 1 = 3"});
}

}  // namespace
}  // namespace tidal::test
