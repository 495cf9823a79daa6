// What a scored layer does for its attention: scores of all keys, from the keys or from their
// shadows, the set, and attention to it; as a whole, and its parts.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "rows.h"

namespace tidal {
namespace {

constexpr int64_t kBudget = 1024;
constexpr int64_t kMaxCaches = 16;

struct Row {
  std::string op;
  int64_t batch_size;
  int64_t seq_len;
  Granularity granularity = Granularity::kLayer;
};

std::vector<Row> Rows() {
  std::vector<Row> rows = {{"score_shadow", 1, 131072}, {"score_shadow", 8, 32768}};
  for (Granularity granularity : {Granularity::kLayer, Granularity::kKvHead}) {
    for (int64_t b : {1, 4}) {
      for (const char* op : {"scored_layer", "scored_layer_shadow"}) {
        rows.push_back({op, b, 131072, granularity});
      }
    }
  }
  return rows;
}

struct Inputs {
  std::vector<PagedKv> caches;
  std::vector<ShadowKeys> shadows;
  TensorView q, out, scores, shadow_scores, lse, positions, seq_idx;
  TensorView token_idx, num_selected;
};

ShadowKeys MakeShadow(BenchDevice& bench, const Row& row, const PagedKv& kv) {
  const int64_t num_pages = kv.k_pages.dim(0);
  const std::vector<float> ones(kKvHeads * kHeadDim, 1.0f);
  ShadowKeys shadow = {
      .codes = bench.Tensor(DType::kUInt8, {num_pages, kKvHeads, kPageSize, kHeadDim / 2}),
      .scales = bench.Tensor(DType::kFloat16, {num_pages, kKvHeads, kPageSize}),
      .balance = bench.Tensor(DType::kFloat32, {kKvHeads, kHeadDim})};
  bench.backend().Upload(shadow.balance, ones.data());
  for (int64_t b = 0; b < row.batch_size; ++b) {
    std::vector<int32_t> positions(static_cast<size_t>(row.seq_len));
    std::iota(positions.begin(), positions.end(), 0);
    const std::vector<int32_t> rows(positions.size(), static_cast<int32_t>(b));
    bench.backend().AppendShadow({.kv = kv,
                                  .positions = bench.Ints(positions, {row.seq_len}),
                                  .seq_idx = bench.Ints(rows, {row.seq_len}),
                                  .shadow = shadow});
  }
  return shadow;
}

Inputs MakeInputs(BenchDevice& bench, const Row& row, int64_t num_caches) {
  const int64_t b = row.batch_size, pages_per_row = (row.seq_len + kPageSize - 1) / kPageSize;
  const int64_t sets = NumSets(row.granularity, kQHeads, kKvHeads);
  Inputs in;
  TensorView page_table = bench.PageTable(b, pages_per_row);
  const std::vector<int32_t> lens(static_cast<size_t>(b), static_cast<int32_t>(row.seq_len));
  const std::vector<int32_t> newest(static_cast<size_t>(b), static_cast<int32_t>(row.seq_len - 1));
  std::vector<int32_t> seq_idx(static_cast<size_t>(b));
  std::iota(seq_idx.begin(), seq_idx.end(), 0);
  TensorView seq_lens = bench.Ints(lens, {b});
  for (int64_t i = 0; i < num_caches; ++i) {
    TensorView k = bench.RandomHalf({b * pages_per_row, kKvHeads, kPageSize, kHeadDim});
    TensorView v = bench.RandomHalf({b * pages_per_row, kKvHeads, kPageSize, kHeadDim});
    in.caches.push_back(
        {.k_pages = k, .v_pages = v, .page_table = page_table, .seq_lens = seq_lens});
    in.shadows.push_back(MakeShadow(bench, row, in.caches.back()));
  }
  in.q = bench.RandomHalf({b, kQHeads, kHeadDim});
  in.out = bench.Tensor(kDType, {b, kQHeads, kHeadDim});
  in.scores = bench.Tensor(DType::kFloat32, {b, kQHeads, row.seq_len});
  in.shadow_scores = bench.Tensor(bench.backend().shadow_score_dtype(), {b, kQHeads, row.seq_len});
  in.lse = bench.Tensor(DType::kFloat32, {b, kQHeads});
  in.positions = bench.Ints(newest, {b});
  in.seq_idx = bench.Ints(seq_idx, {b});
  in.token_idx = bench.Tensor(DType::kInt32, {b, sets, kBudget});
  in.num_selected = bench.Tensor(DType::kInt32, {b, sets});
  return in;
}

// The steps of a scored layer (decode/decode_step.cc) on one of the caches.
class Layer {
 public:
  Layer(Backend& backend, const Row& row, const Inputs& in)
      : backend_(backend), row_(row), in_(in) {}

  void Score(size_t cache) const { backend_.ScoreKeys(ScoreArgs(cache, {})); }

  void ScoreShadow(size_t cache) const {
    backend_.AppendShadowScoreKeys({.append = {.kv = in_.caches[cache],
                                               .positions = in_.positions,
                                               .seq_idx = in_.seq_idx,
                                               .shadow = in_.shadows[cache]},
                                    .score = ScoreArgs(cache, in_.shadows[cache])});
  }

  void Select(const TensorView& scores) const {
    backend_.SelectTopK({.scores = scores,
                         .lse = in_.lse,
                         .seq_lens = in_.caches[0].seq_lens,
                         .num_kv_heads = kKvHeads,
                         .granularity = row_.granularity,
                         .pooling = Pooling::kSum,
                         .sink_tokens = 4,
                         .recent_tokens = kBudget / 4,
                         .top_p_mass = 1.0f,
                         .min_tokens = 0,
                         .token_idx = in_.token_idx,
                         .num_selected = in_.num_selected});
  }

  void Attend(size_t cache) const {
    backend_.AttentionSparse({.attention = {.q = in_.q,
                                            .kv = in_.caches[cache],
                                            .rule = {.sm_scale = kScale},
                                            .out = in_.out},
                              .token_idx = in_.token_idx,
                              .num_selected = in_.num_selected,
                              .set_sizes = SetSizes::kEqual,
                              .dense_len = 0});
  }

 private:
  static constexpr float kScale = 0.088388348f;  // 1 / sqrt(kHeadDim)

  ScoreKeysArgs ScoreArgs(size_t cache, const ShadowKeys& shadow) const {
    return {.q = in_.q,
            .kv = in_.caches[cache],
            .shadow = shadow,
            .rule = {.sm_scale = kScale},
            .scores = shadow.codes ? in_.shadow_scores : in_.scores,
            .lse = in_.lse};
  }

  Backend& backend_;
  const Row& row_;
  const Inputs& in_;
};

std::function<void(size_t)> OpOf(const Row& row, const Layer& layer, const Inputs& in) {
  if (row.op == "score_shadow") return [&](size_t i) { layer.ScoreShadow(i); };
  if (row.op == "scored_layer") {
    return [&](size_t i) {
      layer.Score(i);
      layer.Select(in.scores);
      layer.Attend(i);
    };
  }
  return [&](size_t i) {
    layer.ScoreShadow(i);
    layer.Select(in.shadow_scores);
    layer.Attend(i);
  };
}

int64_t BytesRead(const Row& row) {
  const int64_t keys = row.batch_size * row.seq_len * kKvHeads;
  return row.op == "scored_layer" ? 2 * keys * kHeadDim : keys * (kHeadDim / 2 + 2);
}

void Measure(BenchDevice& bench, const Row& row) {
  bench.Clear();
  const int64_t bytes = BytesRead(row);
  const auto wanted = static_cast<int64_t>(std::ceil(kBytesPerReplay / static_cast<double>(bytes)));
  const int64_t cache_bytes = 5 * row.batch_size * row.seq_len * kKvHeads * kHeadDim;
  const int64_t room = bench.backend().info().free_bytes / 2 / cache_bytes;
  const int64_t num_caches = std::max<int64_t>(1, std::min({wanted, kMaxCaches, room}));
  const Inputs in = MakeInputs(bench, row, num_caches);
  const Layer layer(bench.backend(), row, in);
  layer.ScoreShadow(0);  // real scores, whatever is measured
  const std::function<void(size_t)> op = OpOf(row, layer, in);
  auto step = [&] {
    for (size_t i = 0; i < static_cast<size_t>(num_caches); ++i) op(i);
  };
  const double us = bench.TimeOfStep(step, num_caches);
  std::printf(
      "{\"op\": \"%s\", \"granularity\": \"%s\", \"batch_size\": %lld, \"seq_len\": %lld, "
      "\"token_budget\": %lld, \"caches\": %lld, \"median_of\": %d, \"us\": %.2f, "
      "\"tb_per_s\": %.3f}\n",
      row.op.c_str(), row.granularity == Granularity::kLayer ? "layer" : "kv_head",
      static_cast<long long>(row.batch_size), static_cast<long long>(row.seq_len),
      static_cast<long long>(kBudget), static_cast<long long>(num_caches), bench.samples(), us,
      static_cast<double>(bytes) / us * 1e-6);
  std::fflush(stdout);
}

}  // namespace

void MeasureScoredLayers(BenchDevice& bench, const std::string& filter) {
  for (const Row& row : Rows()) {
    if (row.op.find(filter) != std::string::npos) Measure(bench, row);
  }
}

}  // namespace tidal
