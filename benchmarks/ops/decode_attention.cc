#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "rows.h"

namespace tidal {
namespace {

struct Shape {
  std::string name;  // "gqa", "mha"
  int64_t num_q_heads;
  int64_t num_kv_heads;
};

struct Row {
  std::string op;
  Shape shape;
  int64_t batch_size;
  int64_t seq_len;
  int64_t token_budget = 0;
  Granularity granularity = Granularity::kKvHead;
  // select_top_k: below 1 an adaptive budget. attention_sparse: below 1 sets as such a budget might
  // leave them, of RaggedSize() positions.
  float top_p_mass = 1.0f;
  SetSizes set_sizes = SetSizes::kEqual;  // as the op is told
  DType kv_dtype = kDType;

  int64_t head_bytes() const { return kHeadDim * DTypeBytes(kv_dtype); }  // of K or V of a token
};

// Between 64 and token_budget, mostly few, now and then all: for 4096, 819 on average.
int64_t RaggedSize(int64_t set, int64_t token_budget) {
  constexpr int64_t kShares[] = {64, 32, 16, 8, 1, 32, 64, 4, 16, 2};
  return std::max<int64_t>(64, token_budget / kShares[set % std::ssize(kShares)]);
}

constexpr int64_t kMaxCaches = 32;

std::vector<Row> Rows() {
  const Shape gqa = {"gqa", 32, 8}, mha = {"mha", 32, 32};
  std::vector<Row> rows;
  for (int64_t n : {10240, 32768, 131072}) rows.push_back({"attention_full", gqa, 1, n});
  for (int64_t n : {10240, 102400}) rows.push_back({"attention_full", mha, 1, n});
  rows.push_back({"attention_full", gqa, 8, 32768});
  rows.push_back({"attention_select", gqa, 1, 131072});
  for (int64_t n : {10240, 32768, 131072}) rows.push_back({"score_keys", gqa, 1, n});
  rows.push_back({"score_keys", gqa, 8, 32768});
  rows.push_back({"select_top_k", gqa, 1, 131072, 1024, Granularity::kLayer});
  rows.push_back({"select_top_k", gqa, 1, 2048, 1024, Granularity::kLayer});
  rows.push_back({"select_top_k", gqa, 1, 2048, 1024});
  rows.push_back({"select_top_k", gqa, 1, 131072, 1024});
  rows.push_back({"select_top_k", mha, 1, 102400, 1024, Granularity::kHead});
  rows.push_back({"select_top_k", gqa, 1, 131072, 4096});
  rows.push_back({"select_top_k", gqa, 1, 131072, 4096, Granularity::kKvHead, 0.98f});
  for (int64_t b : {1, 8}) rows.push_back({"attention_sparse", gqa, b, 131072 / b, 1024});
  for (int64_t b : {1, 8}) {
    rows.push_back({"attention_sparse", gqa, b, 131072 / b, 819});
    for (SetSizes sizes : {SetSizes::kEqual, SetSizes::kRagged}) {
      rows.push_back(
          {"attention_sparse", gqa, b, 131072 / b, 4096, Granularity::kKvHead, 0.98f, sizes});
    }
  }
  for (int64_t k : {256, 1024, 4096}) rows.push_back({"attention_sparse", mha, 1, 102400, k});
  std::vector<Row> coded = {
      {"attention_full", gqa, 1, 10240},          {"attention_full", gqa, 1, 32768},
      {"attention_full", gqa, 1, 131072},         {"attention_full", gqa, 8, 32768},
      {"attention_select", gqa, 1, 131072},       {"score_keys", gqa, 1, 131072},
      {"attention_sparse", gqa, 1, 131072, 1024}, {"attention_sparse", gqa, 8, 16384, 1024}};
  for (Row& row : coded) {
    row.kv_dtype = DType::kFloat8;
    rows.push_back(row);
  }
  return rows;
}

struct Inputs {
  std::vector<PagedKv> caches;
  TensorView q, out, scores, lse, token_idx, num_selected;
};

// Positions in all sets of an attention_sparse row.
int64_t NumSelected(const Row& row) {
  int64_t total = 0;
  for (int64_t set = 0; set < row.batch_size * row.shape.num_kv_heads; ++set) {
    total += row.top_p_mass < 1.0f ? RaggedSize(set, row.token_budget) : row.token_budget;
  }
  return total;
}

std::vector<int32_t> RandomSets(int64_t num_sets, int64_t budget, int64_t seq_len,
                                std::mt19937& engine) {
  std::vector<int32_t> all(static_cast<size_t>(seq_len)), sets;
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
  for (int64_t set = 0; set < num_sets; ++set) {
    std::vector<int32_t> chosen;
    std::sample(all.begin(), all.end(), std::back_inserter(chosen), budget, engine);
    sets.insert(sets.end(), chosen.begin(), chosen.end());
  }
  return sets;
}

AttentionArgs Attention(const Inputs& in, int64_t cache) {
  return {.q = in.q,
          .kv = in.caches[static_cast<size_t>(cache)],
          .rule = {.sm_scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim))},
          .out = in.out};
}

Inputs MakeInputs(BenchDevice& bench, const Row& row, int64_t num_pages, int64_t pages_per_row,
                  int64_t num_caches) {
  std::mt19937 engine(2);
  int64_t b = row.batch_size, hq = row.shape.num_q_heads, hkv = row.shape.num_kv_heads;
  Inputs in;
  TensorView page_table = bench.PageTable(b, pages_per_row);
  std::vector<int32_t> lens(static_cast<size_t>(b), static_cast<int32_t>(row.seq_len));
  TensorView seq_lens = bench.Ints(lens, {b});
  for (int64_t i = 0; i < num_caches; ++i) {
    TensorView k = bench.Random(row.kv_dtype, {num_pages, hkv, kPageSize, kHeadDim});
    TensorView v = bench.Random(row.kv_dtype, {num_pages, hkv, kPageSize, kHeadDim});
    in.caches.push_back(
        {.k_pages = k, .v_pages = v, .page_table = page_table, .seq_lens = seq_lens});
  }
  in.q = bench.RandomHalf({b, hq, kHeadDim});
  in.out = bench.Tensor(kDType, {b, hq, kHeadDim});
  in.scores = bench.Tensor(DType::kFloat32, {b, hq, row.seq_len});
  in.lse = bench.Tensor(DType::kFloat32, {b, hq});
  if (row.token_budget > 0) {
    int64_t sets = NumSets(row.granularity, hq, hkv);
    if (row.op == "attention_sparse") sets = hkv;
    in.token_idx = bench.Ints(RandomSets(b * sets, row.token_budget, row.seq_len, engine),
                              {b, sets, row.token_budget});
    std::vector<int32_t> counts(static_cast<size_t>(b * sets),
                                static_cast<int32_t>(row.token_budget));
    for (size_t set = 0; row.top_p_mass < 1.0f && set < counts.size(); ++set) {
      counts[set] = static_cast<int32_t>(RaggedSize(static_cast<int64_t>(set), row.token_budget));
    }
    in.num_selected = bench.Ints(counts, {b, sets});
  }
  // Real scores and lse for select_top_k.
  bench.backend().AttentionSelect(
      {.attention = Attention(in, 0), .scores = in.scores, .lse = in.lse});
  return in;
}

std::function<void(int64_t)> OpOf(BenchDevice& bench, const Row& row, const Inputs& in) {
  if (row.op == "attention_full") {
    return [&](int64_t i) { bench.backend().AttentionFull(Attention(in, i)); };
  }
  if (row.op == "attention_select") {
    return [&](int64_t i) {
      bench.backend().AttentionSelect(
          {.attention = Attention(in, i), .scores = in.scores, .lse = in.lse});
    };
  }
  if (row.op == "score_keys") {
    return [&](int64_t i) {
      AttentionArgs attention = Attention(in, i);
      bench.backend().ScoreKeys({.q = attention.q,
                                 .kv = attention.kv,
                                 .shadow = {},
                                 .rule = attention.rule,
                                 .scores = in.scores,
                                 .lse = in.lse});
    };
  }
  if (row.op == "attention_sparse") {
    return [&](int64_t i) {
      bench.backend().AttentionSparse({.attention = Attention(in, i),
                                       .token_idx = in.token_idx,
                                       .num_selected = in.num_selected,
                                       .set_sizes = row.set_sizes,
                                       .dense_len = 0});
    };
  }
  return [&](int64_t) {
    bench.backend().SelectTopK({.scores = in.scores,
                                .lse = in.lse,
                                .seq_lens = in.caches[0].seq_lens,
                                .num_kv_heads = row.shape.num_kv_heads,
                                .granularity = row.granularity,
                                .pooling = Pooling::kSum,
                                .sink_tokens = 1,
                                .recent_tokens = 1,
                                .top_p_mass = row.top_p_mass,
                                .min_tokens = 64,
                                .token_idx = in.token_idx,
                                .num_selected = in.num_selected});
  };
}

void Report(const Row& row, int64_t num_caches, int64_t bytes, int samples, double us) {
  std::printf(
      "{\"op\": \"%s\", \"shape\": \"%s\", \"kv_dtype\": \"%s\", \"num_q_heads\": %lld, "
      "\"num_kv_heads\": %lld, "
      "\"head_dim\": %lld, \"batch_size\": %lld, \"seq_len\": %lld, \"token_budget\": %lld, "
      "\"top_p_mass\": %.2f, \"set_sizes\": \"%s\", \"caches\": %lld, \"median_of\": %d, "
      "\"us\": %.2f, \"tb_per_s\": %.3f}\n",
      row.op.c_str(), row.shape.name.c_str(), DTypeName(row.kv_dtype),
      static_cast<long long>(row.shape.num_q_heads), static_cast<long long>(row.shape.num_kv_heads),
      static_cast<long long>(kHeadDim), static_cast<long long>(row.batch_size),
      static_cast<long long>(row.seq_len), static_cast<long long>(row.token_budget),
      static_cast<double>(row.top_p_mass), row.set_sizes == SetSizes::kRagged ? "ragged" : "equal",
      static_cast<long long>(num_caches), samples, us,
      row.op == "select_top_k" ? 0.0 : static_cast<double>(bytes) / us * 1e-6);
  std::fflush(stdout);
}

void Measure(BenchDevice& bench, const Row& row) {
  bench.Clear();
  int64_t pages_per_row = (row.seq_len + kPageSize - 1) / kPageSize;
  int64_t num_pages = pages_per_row * row.batch_size;
  int64_t cache_bytes = 2 * num_pages * kPageSize * row.shape.num_kv_heads * row.head_bytes();
  int64_t read_bytes = cache_bytes;
  if (row.op == "score_keys") read_bytes /= 2;  // no values
  if (row.op == "attention_sparse") read_bytes = 2 * row.head_bytes() * NumSelected(row);
  // Caches of sparse rows need not be whole: few of them already leave the L2 cold.
  auto wanted = static_cast<int64_t>(std::ceil(kBytesPerReplay / static_cast<double>(read_bytes)));
  int64_t num_caches = std::clamp<int64_t>(wanted, 4, kMaxCaches);
  int64_t memory = bench.backend().info().free_bytes / 2;
  num_caches = std::max<int64_t>(1, std::min(num_caches, memory / cache_bytes));

  Inputs in = MakeInputs(bench, row, num_pages, pages_per_row, num_caches);
  std::function<void(int64_t)> op = OpOf(bench, row, in);
  auto step = [&] {
    for (int64_t i = 0; i < num_caches; ++i) op(i);
  };
  Report(row, num_caches, read_bytes, bench.samples(), bench.TimeOfStep(step, num_caches));
}

}  // namespace

void MeasureDecodeAttention(BenchDevice& bench, const std::string& filter) {
  for (const Row& row : Rows()) {
    if (row.op.find(filter) != std::string::npos) Measure(bench, row);
  }
}

}  // namespace tidal
